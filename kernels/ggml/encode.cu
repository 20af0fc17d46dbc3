// Encoders of ggml's block types on a GPU: float32 rows in, the bytes of quantkit.ops.ggml.encode out. A plain C interface, loaded with ctypes.
//
// A thread block takes THREADS parts of blocks, one to a thread. Values come in and bytes go out in order, by way of shared memory.
//
//   nvcc -std=c++17 -O3 -fmad=false -shared -Xcompiler -fPIC -gencode arch=compute_90,code=sm_90 -o libggml.so encode.cu

#include <cuda_runtime.h>

#include <climits>

#include "blocks.cuh"

namespace {

using ggml::Spread;

constexpr int THREADS = 128;
constexpr int SUM_ROWS = 32, SUM_COLUMNS = 128;  // the tile of row_spreads
constexpr int UNKNOWN = -1, TOO_LARGE = -2;

// What went wrong, as the first row where it did; the caller fills it with a number above all rows.
struct Flags {
    unsigned long long not_finite, infinite_scale;
};

__device__ void flag(unsigned long long* first, int64_t row) { atomicMin(first, static_cast<unsigned long long>(row)); }

// spreads[row] = sum of x^2 over the row, in order, / columns. One warp adds SUM_ROWS rows, a lane each, while all fetch the next tile.
__global__ void __launch_bounds__(THREADS) row_spreads(const float* __restrict__ values, int64_t rows, int64_t columns, float* __restrict__ spreads) {
    constexpr int each = SUM_ROWS * SUM_COLUMNS / THREADS;
    __shared__ float tile[2][SUM_ROWS][SUM_COLUMNS + 1];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * SUM_ROWS;
    const int thread = static_cast<int>(threadIdx.x);
    float total = 0.0f;
    int buffer = 0;
    for (int64_t start = -SUM_COLUMNS; start < columns; start += SUM_COLUMNS) {
        float next[each];
        UNROLL for (int i = 0; i < each; ++i) {
            const int e = i * THREADS + thread;
            const int64_t row = first + e / SUM_COLUMNS, column = start + SUM_COLUMNS + e % SUM_COLUMNS;
            next[i] = row < rows && column < columns ? values[row * columns + column] : 0.0f;
        }
        if (start >= 0 && thread < SUM_ROWS) {
            const int count = columns - start < SUM_COLUMNS ? static_cast<int>(columns - start) : SUM_COLUMNS;
#pragma unroll 16
            for (int i = 0; i < count; ++i) {
                const float value = tile[buffer][thread][i];
                total += value * value;
            }
        }
        buffer ^= 1;
        UNROLL for (int i = 0; i < each; ++i) {
            const int e = i * THREADS + thread;
            tile[buffer][e / SUM_COLUMNS][e % SUM_COLUMNS] = next[i];
        }
        __syncthreads();
    }
    if (thread < SUM_ROWS && first + thread < rows) spreads[first + thread] = total / static_cast<float>(columns);
}

template <class Type, bool WEIGHED>
__global__ void __launch_bounds__(THREADS)
    encode_blocks(const float* __restrict__ values, int64_t blocks, int64_t blocks_of_row, const float* __restrict__ importance,
                  const float* __restrict__ spreads, uint8_t* __restrict__ out, Flags* __restrict__ flags) {
    constexpr int parts = Type::PARTS, size = Type::SIZE, elements = parts * size, many = THREADS / parts;
    constexpr int pitch = size + 1;  // odd, so that neither rows nor columns of the tile meet in a bank
    __shared__ float tile[THREADS * pitch];
    __shared__ typename Type::Draft drafts[many];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * many;
    const int count = blocks - first < many ? static_cast<int>(blocks - first) : many, thread = static_cast<int>(threadIdx.x);
    const float* from = values + first * elements;
    UNROLL for (int i = 0; i < size; ++i) {
        const int e = i * THREADS + thread;
        const float value = e < count * elements ? from[e] : 0.0f;
        if (!(ggml::magnitude(value) < ggml::INFINITE)) flag(&flags->not_finite, (first + e / elements) / blocks_of_row);
        tile[(e / size) * pitch + e % size] = value;
    }
    __syncthreads();

    const int part = thread % parts;
    const int64_t block = first + thread / parts;
    typename Type::Draft& draft = drafts[thread / parts];
    float x[size], w[size], codes[size];
    UNROLL for (int i = 0; i < size; ++i) x[i] = tile[thread * pitch + i];
    if constexpr (WEIGHED) {
        float spread = 0.0f;
        if constexpr (Type::SPREAD == Spread::ROW) spread = block < blocks ? spreads[block / blocks_of_row] : 0.0f;
        if constexpr (Type::SPREAD == Spread::BLOCK) {
            const float* own = tile + (thread - part) * pitch;
            for (int p = 0; p < parts; ++p) {
                UNROLL for (int i = 0; i < size; ++i) spread += own[p * pitch + i] * own[p * pitch + i];
            }
            spread = Type::FACTOR * spread / Type::DIVISOR;
        }
        ggml::weigh<Type>(x, importance + block % blocks_of_row * elements + part * size, spread, w);
    } else {
        Type::weigh_plain(x, w);
    }
    Type::template search<WEIGHED>(x, w, codes, part, draft);
    __syncwarp();  // the parts of a block are in one warp
    Type::template join<WEIGHED>(part, draft);
    __syncwarp();
    Type::finish(x, codes, part, draft);
    if (part < Type::HALVES && block < blocks && ggml::is_infinite(draft.half[part])) flag(&flags->infinite_scale, block / blocks_of_row);
    if constexpr (parts == 1 && Type::HALVES == 2) {
        if (block < blocks && ggml::is_infinite(draft.half[1])) flag(&flags->infinite_scale, block / blocks_of_row);
    }
    __syncthreads();

    uint8_t* to = out + first * Type::BYTES;  // a multiple of four bytes from out: many blocks are
    static_assert(many * Type::BYTES % 4 == 0, "words of the output");
    const int bytes = count * Type::BYTES;
    for (int k = 4 * thread; k < bytes; k += 4 * THREADS) {
        if (k + 4 <= bytes) {
            uint32_t word = 0;
            UNROLL for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(Type::byte(drafts[(k + i) / Type::BYTES], (k + i) % Type::BYTES)) << (8 * i);
            *reinterpret_cast<uint32_t*>(to + k) = word;
        } else {
            for (int i = k; i < bytes; ++i) to[i] = Type::byte(drafts[i / Type::BYTES], i % Type::BYTES);
        }
    }
}

struct Job {
    const float* values;
    int64_t rows, columns;
    const float* importance;
    float* scratch;
    uint8_t* out;
    Flags* flags;
    cudaStream_t stream;
    int result = 0;

    template <class Type, bool WEIGHED>
    void launch() {
        constexpr int elements = Type::PARTS * Type::SIZE, many = THREADS / Type::PARTS;
        const int64_t blocks_of_row = columns / elements, blocks = rows * blocks_of_row, grid = (blocks + many - 1) / many;
        if (grid > INT_MAX) {
            result = TOO_LARGE;
            return;
        }
        if constexpr (WEIGHED && Type::SPREAD == Spread::ROW) {
            row_spreads<<<static_cast<unsigned>((rows + SUM_ROWS - 1) / SUM_ROWS), THREADS, 0, stream>>>(values, rows, columns, scratch);
            result = cudaGetLastError();
            if (result != cudaSuccess) return;
        }
        encode_blocks<Type, WEIGHED><<<static_cast<unsigned>(grid), THREADS, 0, stream>>>(values, blocks, blocks_of_row, importance, scratch, out, flags);
        result = cudaGetLastError();
    }

    template <class Type>
    void run() {
        if (importance != nullptr) {
            launch<Type, true>();
        } else {
            launch<Type, false>();
        }
    }
};

}  // namespace

// Start to encode values [rows, columns] on a stream of the current device. importance [columns] or null; scratch [rows], used with
// importance; out 4-byte aligned, all of it is written; flags two uint64 filled by the caller with a number above all rows: the least row
// with a value that is not finite, and with a scale that does not fit in float16. Returns 0, a CUDA error, or less than 0.
extern "C" int quantkit_ggml_encode(const char* kind, const float* values, int64_t rows, int64_t columns, const float* importance, float* scratch,
                                    uint8_t* out, void* flags, void* stream) {
    Job job{values, rows, columns, importance, scratch, out, static_cast<Flags*>(flags), static_cast<cudaStream_t>(stream)};
    return ggml::with_type(kind, job) ? job.result : UNKNOWN;
}

// What a result of quantkit_ggml_encode means.
extern "C" const char* quantkit_ggml_error(int result) {
    if (result == UNKNOWN) return "unknown block type";
    if (result == TOO_LARGE) return "too many rows for one launch";
    return cudaGetErrorString(static_cast<cudaError_t>(result));
}
