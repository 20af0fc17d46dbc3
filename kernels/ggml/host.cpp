// The functions of blocks.cuh on the CPU, one block after the other: a test of the GPU's bytes that needs no GPU.
// Build with -O2 -ffp-contract=off.

#include <vector>

#include "blocks.cuh"

namespace {

struct Job {
    const float* values;
    int64_t rows, columns;
    const float* importance;
    uint8_t* out;

    template <class Type, bool WEIGHED>
    void encode() {
        constexpr int parts = Type::PARTS, size = Type::SIZE, elements = parts * size;
        const int64_t blocks_of_row = columns / elements;
        static thread_local float x[parts][size], w[parts][size], codes[parts][size];
        for (int64_t row = 0; row < rows; ++row) {
            float row_spread = 0.0f;
            for (int64_t i = 0; i < columns; ++i) row_spread += values[row * columns + i] * values[row * columns + i];
            row_spread /= static_cast<float>(columns);
            for (int64_t b = 0; b < blocks_of_row; ++b) {
                const float* block = values + row * columns + b * elements;
                typename Type::Draft draft;
                float spread = row_spread;
                if constexpr (Type::SPREAD == ggml::Spread::BLOCK) {
                    spread = 0.0f;
                    for (int i = 0; i < elements; ++i) spread += block[i] * block[i];
                    spread = Type::FACTOR * spread / Type::DIVISOR;
                }
                for (int part = 0; part < parts; ++part) {
                    for (int i = 0; i < size; ++i) x[part][i] = block[part * size + i];
                    if constexpr (WEIGHED) {
                        ggml::weigh<Type>(x[part], importance + b * elements + part * size, spread, w[part]);
                    } else {
                        Type::weigh_plain(x[part], w[part]);
                    }
                    Type::template search<WEIGHED>(x[part], w[part], codes[part], part, draft);
                }
                for (int part = 0; part < parts; ++part) Type::template join<WEIGHED>(part, draft);
                for (int part = 0; part < parts; ++part) Type::finish(x[part], codes[part], part, draft);
                for (int k = 0; k < Type::BYTES; ++k) *out++ = Type::byte(draft, k);
            }
        }
    }

    template <class Type>
    void run() {
        if (importance != nullptr) {
            encode<Type, true>();
        } else {
            encode<Type, false>();
        }
    }
};

}  // namespace

// Returns 0, or -1 for an unknown type. Scales that do not fit in float16 are written as infinite.
extern "C" int quantkit_ggml_encode_host(const char* kind, const float* values, int64_t rows, int64_t columns, const float* importance, uint8_t* out) {
    Job job{values, rows, columns, importance, out};
    return ggml::with_type(kind, job) ? 0 : -1;
}
