// The searches for the scale and the codes of a block, each over the registers of one thread: loops over elements are unrolled, and add in
// order. What they do is said in quantkit/ops/ggml/kernels.py, function by function; here the lanes are threads.
#pragma once

#include "arithmetic.cuh"

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define KEEP _Pragma("unroll 1")
#else
#define UNROLL
#define KEEP
#endif

namespace ggml {

struct Fit {
    float scale, low;
};

// x ~ scale * code - low, codes 0..TOP: of grids around the range, each with its least-squares fit, the one of least weighted error.
template <int SIZE, int TOP, bool ABSOLUTE>
BOTH Fit scale_min_search(const float (&x)[SIZE], const float (&w)[SIZE], float start, float step, int steps, float (&codes)[SIZE]) {
    constexpr float nmax = TOP;
    float least = x[0], most = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    UNROLL for (int i = 1; i < SIZE; ++i) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    least = least > 0.0f ? 0.0f : least;
    const bool flat = most == least;
    float ratio = flat ? 0.0f : nmax / (most - least), scale = flat ? 0.0f : 1.0f / ratio, base = least, best = 0.0f;
    UNROLL for (int i = 0; i < SIZE; ++i) {
        const float miss = scale * nearest(ratio * (x[i] - least), 0, TOP) + least - x[i];
        best += w[i] * (ABSOLUTE ? magnitude(miss) : miss * miss);
    }
    best = flat ? -INFINITE : best;
    KEEP for (int k = 0; k <= steps; ++k) {
        const float r = ((start + step * static_cast<float>(k)) + nmax) / (most - least);
        float a = 0.0f, b = 0.0f, c = 0.0f;
        UNROLL for (int i = 0; i < SIZE; ++i) {
            const float code = nearest(r * (x[i] - least), 0, TOP), weighted = w[i] * code;
            codes[i] = code;
            a += weighted;
            b += weighted * code;
            c += weighted * x[i];
        }
        const float d = sum_w * b - a * a, bottom = (b * sum_x - a * c) / d;
        const bool above = bottom > 0.0f;
        const float new_scale = above ? c / b : (sum_w * c - sum_x * a) / d, new_least = above ? 0.0f : bottom;
        float error = 0.0f;
        UNROLL for (int i = 0; i < SIZE; ++i) {
            const float miss = new_scale * codes[i] + new_least - x[i];
            error += w[i] * (ABSOLUTE ? magnitude(miss) : miss * miss);
        }
        if (d > 0.0f && error < best) {
            ratio = r;
            base = least;
            scale = new_scale;
            least = new_least;
            best = error;
        }
    }
    UNROLL for (int i = 0; i < SIZE; ++i) codes[i] = nearest(ratio * (x[i] - base), 0, TOP);
    return {scale, -least};
}

// The first value of the largest magnitude; 0 where none is above 0.
template <int SIZE>
BOTH float peak_of(const float (&x)[SIZE]) {
    float peak = 0.0f;
    UNROLL for (int i = 0; i < SIZE; ++i) peak = magnitude(x[i]) > magnitude(peak) ? x[i] : peak;
    return peak;
}

// x ~ scale * (code - TOP), codes 0..2 TOP - 1: the grid whose least-squares fit explains most. SQUARES: the weights are x^2.
template <int SIZE, int TOP, bool SQUARES>
BOTH float symmetric_search(const float (&x)[SIZE], const float (&w)[SIZE], float (&codes)[SIZE]) {
    constexpr float nmax = TOP;
    const float peak = peak_of(x);
    float scale = 0.0f, best = 0.0f, ratio = 0.0f;
    KEEP for (int t = -10; t < 10; ++t) {  // -10 is the first guess, 0 would repeat it
        if (t == 0) continue;
        const float r = (t == -10 ? -nmax : -(nmax + 0.1f * static_cast<float>(t))) / peak;
        float p = 0.0f, q = 0.0f;
        UNROLL for (int i = 0; i < SIZE; ++i) {
            const float code = nearest(r * x[i], -TOP, TOP - 1), weight = SQUARES ? x[i] * x[i] : w[i];
            p += weight * x[i] * code;
            q += weight * code * code;
        }
        if (t == -10 || (q > 0.0f && p * p > best * q)) {
            ratio = r;
            scale = t == -10 && q == 0.0f ? 0.0f : p / q;
            best = scale * p;
        }
    }
    const bool none = magnitude(peak) < TINY;
    UNROLL for (int i = 0; i < SIZE; ++i) codes[i] = none ? 0.0f : nearest(ratio * x[i], -TOP, TOP - 1) + nmax;
    return none ? 0.0f : scale;
}

// x ~ scale * (code - TOP), codes 0..2 TOP - 1, weights x^2: sweeps that move one code at a time where that explains more.
template <int SIZE, int TOP>
BOTH float refine_search(const float (&x)[SIZE], float (&codes)[SIZE]) {
    constexpr float nmax = TOP;
    const float peak = peak_of(x), r = -nmax / peak;
    float p = 0.0f, q = 0.0f;
    UNROLL for (int i = 0; i < SIZE; ++i) {
        const float weight = x[i] * x[i], code = nearest(r * x[i], -TOP, TOP - 1);
        codes[i] = code;
        p += weight * x[i] * code;
        q += weight * code * code;
    }
    bool changed = true;
    KEEP for (int sweep = 0; sweep < 5 && changed; ++sweep) {
        changed = false;
        UNROLL for (int i = 0; i < SIZE; ++i) {
            const float weight = x[i] * x[i], old = codes[i];
            const float without_p = p - weight * x[i] * old, without_q = q - weight * old * old;
            const float code = nearest(x[i] * without_q / without_p, -TOP, TOP - 1);
            const float new_p = without_p + weight * x[i] * code, new_q = without_q + weight * code * code;
            if (without_p > 0.0f && code != old && new_q > 0.0f && new_p * new_p * q > p * p * new_q) {
                codes[i] = code;
                p = new_p;
                q = new_q;
                changed = true;
            }
        }
    }
    const bool none = magnitude(peak) < TINY;
    UNROLL for (int i = 0; i < SIZE; ++i) codes[i] = none ? 0.0f : codes[i] + nmax;
    return q > 0.0f && !none ? p / q : 0.0f;
}

// x ~ scale * code, codes 0..TOP, for a block's own scales or lows.
template <int SIZE, int TOP>
BOTH float positive_search(const float (&x)[SIZE], const float (&w)[SIZE], float (&codes)[SIZE]) {
    constexpr float nmax = TOP;
    float most = 0.0f;
    UNROLL for (int i = 0; i < SIZE; ++i) most = x[i] > most ? x[i] : most;
    if (most < TINY) {
        UNROLL for (int i = 0; i < SIZE; ++i) codes[i] = 0.0f;
        return 0.0f;
    }
    float ratio = nmax / most, best = 0.0f;
    KEEP for (int t = -5; t < 5; ++t) {  // -5 is the first guess, 0 would repeat it
        if (t == 0) continue;
        const float r = t == -5 ? ratio : (0.1f * static_cast<float>(t) + nmax) / most, scale = 1.0f / r;
        float error = 0.0f;
        UNROLL for (int i = 0; i < SIZE; ++i) {
            const float miss = x[i] - scale * nearest(r * x[i], LOWEST, t == -5 ? HIGHEST : TOP);
            error += w[i] * miss * miss;
        }
        if (t == -5) {
            best = error;
        } else if (error < best) {
            best = error;
            ratio = r;
        }
    }
    float p = 0.0f, q = 0.0f;
    UNROLL for (int i = 0; i < SIZE; ++i) {
        codes[i] = nearest(ratio * x[i], LOWEST, TOP);
        p += w[i] * x[i] * codes[i];
        q += w[i] * codes[i] * codes[i];
    }
    bool changed = true;
    KEEP for (int sweep = 0; sweep < 5 && changed; ++sweep) {  // each moves one code at a time where that explains more
        changed = false;
        UNROLL for (int i = 0; i < SIZE; ++i) {
            float without_p = p - w[i] * x[i] * codes[i], without_q = q - w[i] * codes[i] * codes[i];
            if (without_p > 0.0f && without_q > 0.0f) {
                const float code = nearest(x[i] * without_q / without_p, LOWEST, TOP);
                if (code != codes[i]) {
                    without_p += w[i] * x[i] * code;
                    without_q += w[i] * code * code;
                    if (without_p * without_p * q > p * p * without_q) {
                        codes[i] = code;
                        p = without_p;
                        q = without_q;
                        changed = true;
                    }
                }
            }
        }
    }
    return q > 0.0f ? p / q : 0.0f;
}

// Codes 0..TOP of a block's scales or lows by its largest; returns the scale before rounding.
template <int SIZE, int TOP>
BOTH float top_scale(const float (&x)[SIZE], float (&codes)[SIZE]) {
    constexpr float nmax = TOP;
    float most = 0.0f;
    UNROLL for (int i = 0; i < SIZE; ++i) most = x[i] > most ? x[i] : most;
    const bool some = most > 0.0f;
    const float ratio = nmax / most;
    UNROLL for (int i = 0; i < SIZE; ++i) codes[i] = some ? nearest(ratio * x[i], LOWEST, TOP) : 0.0f;
    return some ? most / nmax : 0.0f;
}

// The scale of a block, infinite if the search overflowed in one of its parts: the caller refuses what has no float16.
template <int SIZE>
BOTH float checked(float scale, const float (&parts)[SIZE]) {
    UNROLL for (int i = 0; i < SIZE; ++i) scale = magnitude(parts[i]) < INFINITE ? scale : INFINITE;
    return scale;
}

// The sixteen values of IQ4_NL and IQ4_XS by code, and the value from which on each but the first is nearest; not a number takes the last.
#define GGML_LEVELS(LEVEL)                                                                                                                  \
    LEVEL(-115.5f, -104) LEVEL(-93.5f, -83) LEVEL(-74.0f, -65) LEVEL(-57.0f, -49) LEVEL(-42.0f, -35) LEVEL(-28.5f, -22) LEVEL(-16.0f, -10)   \
    LEVEL(-4.5f, 1) LEVEL(7.0f, 13) LEVEL(19.0f, 25) LEVEL(31.5f, 38) LEVEL(45.5f, 53) LEVEL(61.0f, 69) LEVEL(79.0f, 89) LEVEL(101.0f, 113)
constexpr float LEVEL_0 = -127.0f;

BOTH float level_of(float value) {
    float level = LEVEL_0;
#define LEVEL(bound, upper) level = value < bound ? level : upper##.0f;
    GGML_LEVELS(LEVEL)
#undef LEVEL
    return level;
}

BOTH int level_code(float value) {
    int code = 0;
#define LEVEL(bound, upper) code += value < bound ? 0 : 1;
    GGML_LEVELS(LEVEL)
#undef LEVEL
    return code;
}

// x ~ scale * level: the grid whose least-squares fit explains most.
template <int SIZE>
BOTH float level_search(const float (&x)[SIZE], const float (&w)[SIZE]) {
    const float peak = peak_of(x);
    float scale = 0.0f, best = 0.0f;
    KEEP for (int t = -8; t < 8; ++t) {  // -8 is the first guess
        const float r = t == -8 ? 1.0f / (-peak / LEVEL_0) : (static_cast<float>(t) + LEVEL_0) / peak;
        float p = 0.0f, q = 0.0f;
        UNROLL for (int i = 0; i < SIZE; ++i) {
            const float level = level_of(r * x[i]), weighted = w[i] * level;
            p += weighted * x[i];
            q += weighted * level;
        }
        if (t == -8) {
            scale = q > 0.0f ? p / q : 0.0f;
            best = scale * p;
        } else if (q > 0.0f && p * p > best * q) {
            scale = p / q;
            best = scale * p;
        }
    }
    return magnitude(peak) < TINY ? 0.0f : scale;
}

}  // namespace ggml
