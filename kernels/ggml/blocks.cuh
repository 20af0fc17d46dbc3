// The block types of ggml. A block is cut into PARTS parts of SIZE elements, a thread each; what the parts of a block tell one another and
// the bytes are made of is a Draft. Each part takes the same steps, with all parts of the block between two steps:
//
//   search  the part's scale and first codes, by its values x and their weights w
//   join    the scales of the parts are themselves coded (by one or two of the threads)
//   finish  the part's codes by the stored scales
//   byte    any byte of the block
//
// With WEIGHED the block has importance; w is then made by the caller (weigh), for it needs sums over a block or a row.
#pragma once

#include "searches.cuh"

namespace ggml {

enum class Spread { NONE, ROW, BLOCK };  // what the sum of squares in a weight goes over, if there is one

template <int SIZE>
BOTH float square_mean(const float (&x)[SIZE]) {
    float total = 0.0f;
    UNROLL for (int i = 0; i < SIZE; ++i) total += x[i] * x[i];
    return total / static_cast<float>(SIZE);
}

template <int SIZE>
BOTH void store_codes(const float (&codes)[SIZE], uint8_t* out) {
    UNROLL for (int i = 0; i < SIZE; ++i) out[i] = static_cast<uint8_t>(static_cast<int>(codes[i]));
}

// Codes by the stored scale and low, as code - FLOOR; a zero scale leaves the codes of the search.
template <int FLOOR, int TOP, int SIZE>
BOTH void recode(const float (&x)[SIZE], float scale, float low, float (&codes)[SIZE]) {
    if (scale == 0.0f) return;
    UNROLL for (int i = 0; i < SIZE; ++i) codes[i] = nearest((x[i] + low) / scale, FLOOR, TOP) - static_cast<float>(FLOOR);
}

BOTH uint8_t half_byte(uint16_t half, int k) { return static_cast<uint8_t>(half >> (8 * (k & 1))); }

// Byte k of 64 that hold the low two bits of 256 codes: byte 32a + l holds elements 128a + 32s + l at bit 2s.
BOTH uint8_t crumbs(const uint8_t* codes, int k, int shift) {
    const uint8_t* from = codes + 128 * (k / 32) + k % 32;
    int byte = 0;
    for (int s = 0; s < 4; ++s) byte |= ((from[32 * s] >> shift) & 3) << (2 * s);
    return static_cast<uint8_t>(byte);
}

// Bit s of a byte is bit SHIFT of code 32s + l, for eight s.
BOTH uint8_t bit_plane(const uint8_t* codes, int l, int shift) {
    int byte = 0;
    for (int s = 0; s < 8; ++s) byte |= ((codes[32 * s + l] >> shift) & 1) << s;
    return static_cast<uint8_t>(byte);
}

// Q4_0, Q4_1 (AFFINE), Q5_0 (FIVE), Q5_1 (both).
template <bool FIVE, bool AFFINE>
struct Legacy {
    static constexpr int PARTS = 1, SIZE = 32, BYTES = 18 + (FIVE ? 4 : 0) + (AFFINE ? 2 : 0), HALVES = AFFINE ? 2 : 1;
    static constexpr Spread SPREAD = Spread::ROW;
    static constexpr int TOP = AFFINE ? (FIVE ? 31 : 15) : (FIVE ? 16 : 8);

    struct Draft {
        uint16_t half[HALVES];
        uint8_t codes[32];
    };

    BOTH static void weigh_plain(const float (&)[SIZE], float (&)[SIZE]) {}

    template <bool WEIGHED>
    BOTH static void search(const float (&x)[SIZE], const float (&w)[SIZE], float (&codes)[SIZE], int, Draft& draft) {
        constexpr float nmax = TOP;
        float scale, low = 0.0f;
        if constexpr (WEIGHED && AFFINE) {
            const Fit fit = scale_min_search<SIZE, TOP, false>(x, w, -0.9f, 0.05f, 36, codes);
            scale = fit.scale;
            low = -fit.low;
        } else if constexpr (WEIGHED) {
            scale = symmetric_search<SIZE, TOP, false>(x, w, codes);
        } else {
            if constexpr (AFFINE) {
                low = x[0];
                float most = x[0];
                UNROLL for (int i = 0; i < SIZE; ++i) {
                    low = x[i] < low ? x[i] : low;
                    most = x[i] > most ? x[i] : most;
                }
                scale = (most - low) / nmax;
            } else {
                scale = peak_of(x) / -nmax;
            }
            const float factor = inverse(scale);
            constexpr int highest = AFFINE ? TOP : 2 * TOP - 1;
            UNROLL for (int i = 0; i < SIZE; ++i) {
                const int code = truncate(AFFINE ? (x[i] - low) * factor + 0.5f : x[i] * factor + (nmax + 0.5f));
                codes[i] = static_cast<float>(code < highest ? code : highest);
            }
        }
        draft.half[0] = to_half(scale);
        if constexpr (AFFINE) draft.half[1] = to_half(low);
        store_codes(codes, draft.codes);
    }

    template <bool WEIGHED>
    BOTH static void join(int, Draft&) {}

    BOTH static void finish(const float (&)[SIZE], float (&)[SIZE], int, Draft&) {}

    BOTH static uint8_t byte(const Draft& draft, int k) {
        if (k < 2 * HALVES) return half_byte(draft.half[k / 2], k);
        k -= 2 * HALVES;
        if constexpr (FIVE) {
            if (k < 4) {
                int byte = 0;
                for (int i = 0; i < 8; ++i) byte |= ((draft.codes[8 * k + i] >> 4) & 1) << i;
                return static_cast<uint8_t>(byte);
            }
            k -= 4;
        }
        return static_cast<uint8_t>((draft.codes[k] & 15) | ((draft.codes[k + 16] & 15) << 4));
    }
};

struct Q8_0 {
    static constexpr int PARTS = 1, SIZE = 32, BYTES = 34, HALVES = 1;
    static constexpr Spread SPREAD = Spread::NONE;

    struct Draft {
        uint16_t half[1];
        uint8_t codes[32];
    };

    BOTH static void weigh_plain(const float (&)[SIZE], float (&)[SIZE]) {}

    template <bool WEIGHED>
    BOTH static void search(const float (&x)[SIZE], const float (&)[SIZE], float (&)[SIZE], int, Draft& draft) {
        const float scale = magnitude(peak_of(x)) / 127.0f, factor = inverse(scale);
        draft.half[0] = to_half(scale);
        UNROLL for (int i = 0; i < SIZE; ++i) {  // half away from zero
            const float value = x[i] * factor;  // infinite where the inverse of a denormal scale is
            const int whole = truncate(value);
            const float rest = value - static_cast<float>(whole);
            const int up = rest >= 0.5f && rest < INFINITE, down = rest <= -0.5f && rest > -INFINITE;
            draft.codes[i] = static_cast<uint8_t>(whole + up - down);
        }
    }

    template <bool WEIGHED>
    BOTH static void join(int, Draft&) {}

    BOTH static void finish(const float (&)[SIZE], float (&)[SIZE], int, Draft&) {}

    BOTH static uint8_t byte(const Draft& draft, int k) { return k < 2 ? half_byte(draft.half[0], k) : draft.codes[k - 2]; }
};

// Q2_K (BITS 2), Q4_K (4) and Q5_K (5): codes from 0, a scale and a low for each part, themselves codes of a float16 each.
template <int BITS>
struct WithLows {
    static constexpr int SIZE = BITS == 2 ? 16 : 32, PARTS = 256 / SIZE, HALVES = 2, BYTES = BITS == 2 ? 84 : 16 + 32 * BITS;
    static constexpr Spread SPREAD = Spread::BLOCK;
    static constexpr float FACTOR = BITS == 2 ? 1.0f : 2.0f, DIVISOR = 256.0f;  // of the sum of squares
    static constexpr int TOP = (1 << BITS) - 1, PART_TOP = BITS == 2 ? 15 : 63;

    struct Draft {
        float found[2][PARTS], weight[PARTS], part[2][PARTS];  // scales and lows of the search; sums of weights; codes of both
        float back[2];
        uint16_t half[2];
        uint8_t codes[256];
    };

    BOTH static void weigh_plain(const float (&x)[SIZE], float (&w)[SIZE]) {
        const float root = BITS == 2 ? 0.0f : sqrtf(square_mean(x));
        UNROLL for (int i = 0; i < SIZE; ++i) w[i] = BITS == 2 ? magnitude(x[i]) : root + magnitude(x[i]);
    }

    template <bool WEIGHED>
    BOTH static void search(const float (&x)[SIZE], const float (&w)[SIZE], float (&codes)[SIZE], int part, Draft& draft) {
        constexpr float start = WEIGHED ? -0.9f : (BITS == 4 ? -1.0f : -0.5f), step = WEIGHED ? 0.05f : 0.1f;
        constexpr int steps = WEIGHED ? 36 : (BITS == 4 ? 20 : 15);
        const Fit fit = scale_min_search<SIZE, TOP, BITS == 2 && !WEIGHED>(x, w, start, step, steps, codes);
        draft.found[0][part] = fit.scale;
        draft.found[1][part] = fit.low;
        if constexpr (WEIGHED) {
            float total = 0.0f;
            UNROLL for (int i = 0; i < SIZE; ++i) total += w[i];
            draft.weight[part] = total;
        }
    }

    template <bool WEIGHED>
    BOTH static void join(int part, Draft& draft) {
        if (part > 1) return;  // part 0 codes the scales, part 1 the lows
        float x[PARTS], codes[PARTS], scale;
        UNROLL for (int i = 0; i < PARTS; ++i) x[i] = draft.found[part][i];
        if constexpr (WEIGHED) {
            float w[PARTS];
            UNROLL for (int i = 0; i < PARTS; ++i) w[i] = draft.weight[i];
            scale = positive_search<PARTS, PART_TOP>(x, w, codes);
        } else {
            scale = top_scale<PARTS, PART_TOP>(x, codes);
        }
        draft.half[part] = to_half(checked(scale, x));
        draft.back[part] = from_half(draft.half[part]);
        UNROLL for (int i = 0; i < PARTS; ++i) draft.part[part][i] = codes[i];
    }

    BOTH static void finish(const float (&x)[SIZE], float (&codes)[SIZE], int part, Draft& draft) {
        recode<0, TOP>(x, draft.back[0] * draft.part[0][part], draft.back[1] * draft.part[1][part], codes);
        store_codes(codes, draft.codes + part * SIZE);
    }

    BOTH static int scale(const Draft& draft, int part) { return static_cast<int>(draft.part[0][part]); }
    BOTH static int low(const Draft& draft, int part) { return static_cast<int>(draft.part[1][part]); }

    BOTH static uint8_t byte(const Draft& draft, int k) {
        if constexpr (BITS == 2) {
            if (k < 16) return static_cast<uint8_t>(scale(draft, k) | (low(draft, k) << 4));
            if (k < 80) return crumbs(draft.codes, k - 16, 0);
            return half_byte(draft.half[(k - 80) / 2], k);
        } else {
            if (k < 4) return half_byte(draft.half[k / 2], k);
            if (k < 8) return static_cast<uint8_t>(scale(draft, k - 4) | ((scale(draft, k) >> 4) << 6));
            if (k < 12) return static_cast<uint8_t>(low(draft, k - 8) | ((low(draft, k - 4) >> 4) << 6));
            if (k < 16) return static_cast<uint8_t>((scale(draft, k - 8) & 15) | ((low(draft, k - 8) & 15) << 4));
            k -= 16;
            if constexpr (BITS == 5) {
                if (k < 32) return bit_plane(draft.codes, k, 4);
                k -= 32;
            }
            const uint8_t* from = draft.codes + 64 * (k / 32) + k % 32;
            return static_cast<uint8_t>((from[0] & 15) | ((from[32] & 15) << 4));
        }
    }
};

// Q3_K: codes -4..3 in two bits and a bit of a mask, 16 signed six-bit scales.
struct Q3_K {
    static constexpr int SIZE = 16, PARTS = 16, HALVES = 1, BYTES = 110;
    static constexpr Spread SPREAD = Spread::BLOCK;
    static constexpr float FACTOR = 2.0f, DIVISOR = 256.0f;

    struct Draft {
        float found[PARTS], weight[PARTS], part[PARTS];
        float back;
        uint16_t half[1];
        uint8_t codes[256];
    };

    BOTH static void weigh_plain(const float (&)[SIZE], float (&)[SIZE]) {}

    template <bool WEIGHED>
    BOTH static void search(const float (&x)[SIZE], const float (&w)[SIZE], float (&codes)[SIZE], int part, Draft& draft) {
        if constexpr (WEIGHED) {
            float total = 0.0f;
            UNROLL for (int i = 0; i < SIZE; ++i) total += w[i];
            draft.weight[part] = total;
            draft.found[part] = symmetric_search<SIZE, 4, false>(x, w, codes);
        } else {
            draft.found[part] = refine_search<SIZE, 4>(x, codes);
        }
    }

    template <bool WEIGHED>
    BOTH static void join(int part, Draft& draft) {
        if (part > 0) return;
        float x[PARTS], codes[PARTS], scale;
        UNROLL for (int i = 0; i < PARTS; ++i) x[i] = draft.found[i];
        if constexpr (WEIGHED) {
            float w[PARTS];
            UNROLL for (int i = 0; i < PARTS; ++i) w[i] = draft.weight[i];
            scale = symmetric_search<PARTS, 32, false>(x, w, codes);
        } else {
            const float peak = peak_of(x), ratio = -32.0f / peak;
            const bool none = peak == 0.0f;
            scale = none ? 0.0f : 1.0f / ratio;
            UNROLL for (int i = 0; i < PARTS; ++i) codes[i] = none ? 0.0f : nearest(ratio * x[i], -32, 31) + 32.0f;
        }
        draft.half[0] = to_half(checked(scale, x));
        draft.back = from_half(draft.half[0]);
        UNROLL for (int i = 0; i < PARTS; ++i) draft.part[i] = codes[i];
    }

    BOTH static void finish(const float (&x)[SIZE], float (&codes)[SIZE], int part, Draft& draft) {
        recode<-4, 3>(x, draft.back * (draft.part[part] - 32.0f), 0.0f, codes);
        store_codes(codes, draft.codes + part * SIZE);
    }

    BOTH static uint8_t byte(const Draft& draft, int k) {
        if (k < 32) return bit_plane(draft.codes, k, 2);
        if (k < 96) return crumbs(draft.codes, k - 32, 0);
        if (k >= 108) return half_byte(draft.half[0], k);
        int byte = 0;
        if (k < 104) {
            byte = (static_cast<int>(draft.part[k - 96]) & 15) | ((static_cast<int>(draft.part[k - 88]) & 15) << 4);
        } else {
            for (int i = 0; i < 4; ++i) byte |= (static_cast<int>(draft.part[k - 104 + 4 * i]) >> 4) << (2 * i);
        }
        return static_cast<uint8_t>(byte);
    }
};

// Q6_K: codes -32..31, 16 int8 scales. The weights are the importance itself.
struct Q6_K {
    static constexpr int SIZE = 16, PARTS = 16, HALVES = 1, BYTES = 210;
    static constexpr Spread SPREAD = Spread::NONE;

    struct Draft {
        float found[PARTS], part[PARTS];
        float back;
        bool none;  // all bytes are 0
        uint16_t half[1];
        uint8_t codes[256];
    };

    BOTH static void weigh_plain(const float (&)[SIZE], float (&)[SIZE]) {}

    template <bool WEIGHED>
    BOTH static void search(const float (&x)[SIZE], const float (&w)[SIZE], float (&codes)[SIZE], int part, Draft& draft) {
        draft.found[part] = symmetric_search<SIZE, 32, !WEIGHED>(x, w, codes);
    }

    template <bool WEIGHED>
    BOTH static void join(int part, Draft& draft) {
        if (part > 0) return;
        float x[PARTS];
        UNROLL for (int i = 0; i < PARTS; ++i) x[i] = draft.found[i];
        const float peak = peak_of(x), ratio = -128.0f / peak;
        const bool none = checked(magnitude(peak), x) < TINY;
        draft.none = none;
        draft.half[0] = none ? 0 : to_half(checked(1.0f / ratio, x));
        draft.back = from_half(draft.half[0]);
        UNROLL for (int i = 0; i < PARTS; ++i) draft.part[i] = none ? 0.0f : nearest(ratio * x[i], LOWEST, 127);
    }

    BOTH static void finish(const float (&x)[SIZE], float (&codes)[SIZE], int part, Draft& draft) {
        recode<-32, 31>(x, draft.back * draft.part[part], 0.0f, codes);
        if (draft.none) {
            UNROLL for (int i = 0; i < SIZE; ++i) codes[i] = 0.0f;
        }
        store_codes(codes, draft.codes + part * SIZE);
    }

    BOTH static uint8_t byte(const Draft& draft, int k) {
        if (k < 128) {
            const uint8_t* from = draft.codes + 128 * (k / 64) + k % 64;
            return static_cast<uint8_t>((from[0] & 15) | ((from[64] & 15) << 4));
        }
        if (k < 192) return crumbs(draft.codes, k - 128, 4);
        if (k < 208) return static_cast<uint8_t>(static_cast<int>(draft.part[k - 192]));
        return half_byte(draft.half[0], k);
    }
};

// IQ4_NL (one part) and IQ4_XS (eight, with six-bit scales): codes of sixteen uneven levels.
template <int COUNT>
struct Levels {
    static constexpr int SIZE = 32, PARTS = COUNT, HALVES = 1, BYTES = COUNT == 1 ? 18 : 136;
    static constexpr Spread SPREAD = Spread::BLOCK;
    static constexpr float FACTOR = 1.0f, DIVISOR = SIZE * PARTS / 2;

    struct Draft {
        float found[PARTS], part[PARTS];
        float scale;
        uint16_t half[1];
        uint8_t codes[SIZE * PARTS];
    };

    BOTH static void weigh_plain(const float (&x)[SIZE], float (&w)[SIZE]) {
        UNROLL for (int i = 0; i < SIZE; ++i) w[i] = x[i] * x[i];
    }

    template <bool WEIGHED>
    BOTH static void search(const float (&x)[SIZE], const float (&w)[SIZE], float (&)[SIZE], int part, Draft& draft) {
        draft.found[part] = level_search(x, w);
    }

    template <bool WEIGHED>
    BOTH static void join(int part, Draft& draft) {
        if (part > 0) return;
        if constexpr (PARTS == 1) {
            draft.scale = draft.found[0];
            draft.part[0] = 1.0f;
            draft.half[0] = to_half(draft.scale);
        } else {
            float x[PARTS];
            UNROLL for (int i = 0; i < PARTS; ++i) x[i] = draft.found[i];
            draft.scale = -peak_of(x) / 32.0f;
            draft.half[0] = to_half(checked(draft.scale, x));
            const float ratio = inverse(draft.scale);
            UNROLL for (int i = 0; i < PARTS; ++i) draft.part[i] = nearest(ratio * x[i], -32, 31);
        }
    }

    BOTH static void finish(const float (&x)[SIZE], float (&)[SIZE], int part, Draft& draft) {
        const float factor = inverse(draft.scale * draft.part[part]);
        UNROLL for (int i = 0; i < SIZE; ++i) draft.codes[SIZE * part + i] = static_cast<uint8_t>(level_code(factor * x[i]));
    }

    BOTH static uint8_t byte(const Draft& draft, int k) {
        if (k < 2) return half_byte(draft.half[0], k);
        k -= 2;
        if constexpr (PARTS > 1) {
            int byte = 0;
            if (k < 2) {
                for (int i = 0; i < 4; ++i) byte |= ((static_cast<int>(draft.part[4 * k + i]) + 32) >> 4) << (2 * i);
                return static_cast<uint8_t>(byte);
            }
            k -= 2;
            if (k < 4) {
                for (int i = 0; i < 2; ++i) byte |= ((static_cast<int>(draft.part[2 * k + i]) + 32) & 15) << (4 * i);
                return static_cast<uint8_t>(byte);
            }
            k -= 4;
        }
        const uint8_t* from = draft.codes + 32 * (k / 16) + k % 16;
        return static_cast<uint8_t>(from[0] | (from[16] << 4));
    }
};

// Calls use.template run<Type>() for the type of a name; false where there is none.
template <class Use>
bool with_type(const char* name, Use& use) {
    const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("Q4_0")) return use.template run<Legacy<false, false>>(), true;
    if (is("Q4_1")) return use.template run<Legacy<false, true>>(), true;
    if (is("Q5_0")) return use.template run<Legacy<true, false>>(), true;
    if (is("Q5_1")) return use.template run<Legacy<true, true>>(), true;
    if (is("Q8_0")) return use.template run<Q8_0>(), true;
    if (is("Q2_K")) return use.template run<WithLows<2>>(), true;
    if (is("Q3_K")) return use.template run<Q3_K>(), true;
    if (is("Q4_K")) return use.template run<WithLows<4>>(), true;
    if (is("Q5_K")) return use.template run<WithLows<5>>(), true;
    if (is("Q6_K")) return use.template run<Q6_K>(), true;
    if (is("IQ4_NL")) return use.template run<Levels<1>>(), true;
    if (is("IQ4_XS")) return use.template run<Levels<8>>(), true;
    return false;
}

// importance * sqrt(spread + x^2), or the importance itself (Spread::NONE).
template <class Type>
BOTH void weigh(const float (&x)[Type::SIZE], const float* importance, float spread, float (&w)[Type::SIZE]) {
    UNROLL for (int i = 0; i < Type::SIZE; ++i) {
        if constexpr (Type::SPREAD == Spread::NONE) {
            w[i] = importance[i];
        } else {
            w[i] = importance[i] * sqrtf(spread + x[i] * x[i]);
        }
    }
}

}  // namespace ggml
