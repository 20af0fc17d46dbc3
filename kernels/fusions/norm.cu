// RMS norm, with the residual's addition before it: a block for each row, two passes over it, the second from cache.
#include "fusions/fusions.h"
#include "fusions/vector.cuh"

namespace {

using namespace fusions;

constexpr int WARP = 32, MOST = 1024;

// The sum of x over the block, in every thread.
__device__ float block_sum(float x) {
  __shared__ float parts[MOST / WARP];
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  if (blockDim.x == WARP) return x;
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
  __syncthreads();
  x = threadIdx.x % WARP < blockDim.x / WARP ? parts[threadIdx.x % WARP] : 0.0f;
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

template <typename T, int V, bool ADD>
__global__ void rms_norm(const T* x, const T* residual, const T* weight, T* sum, T* out, int64_t columns, float eps, float offset) {
  begin();
  const int64_t row = blockIdx.x * columns;
  const T* values = ADD ? sum : x;
  float squares = 0.0f;
  for (int64_t column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
    auto v = load<V>(x + row + column);
    if constexpr (ADD) {
      const auto r = load<V>(residual + row + column);
#pragma unroll
      for (int i = 0; i < V; ++i) v.at[i] = narrow<T>(wide(v.at[i]) + wide(r.at[i]));
      store<V>(sum + row + column, v);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) squares += wide(v.at[i]) * wide(v.at[i]);
  }
  const float factor = rsqrtf(block_sum(squares) / float(columns) + eps);
  for (int64_t column = threadIdx.x * V; column < columns; column += blockDim.x * V) {  // a thread reads what it wrote itself
    auto v = load<V>(values + row + column);
    const auto w = load<V>(weight + column);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float quotient = wide(v.at[i]) * factor;
      v.at[i] = narrow<T>(offset == 0.0f ? rounded<T>(quotient) * wide(w.at[i]) : quotient * (offset + wide(w.at[i])));
    }
    store<V>(out + row + column, v);
  }
}

template <typename T, int V>
int start(const void* x, const void* residual, const void* weight, void* sum, void* out, int64_t rows, int64_t columns, float eps,
          float offset, cudaStream_t stream) {
  const int64_t warps = (columns + V * WARP - 1) / (V * WARP);
  const unsigned threads = unsigned(warps * WARP < MOST ? warps * WARP : MOST);
  return launch(residual ? rms_norm<T, V, true> : rms_norm<T, V, false>, dim3(unsigned(rows)), threads, stream, static_cast<const T*>(x),
                static_cast<const T*>(residual), static_cast<const T*>(weight), static_cast<T*>(sum), static_cast<T*>(out), columns, eps,
                offset);
}

}  // namespace

extern "C" int quantkit_rms_norm(const void* x, const void* residual, const void* weight, void* sum, void* out, int64_t rows,
                                 int64_t columns, float eps, float offset, int type, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return 0;
  const bool whole = columns % WIDE == 0 && aligned(x) && aligned(residual) && aligned(weight) && aligned(sum) && aligned(out);
  const auto run = type == QK_BF16 ? (whole ? start<__nv_bfloat16, WIDE> : start<__nv_bfloat16, 1>)
                                   : (whole ? start<__half, WIDE> : start<__half, 1>);
  return run(x, residual, weight, sum, out, rows, columns, eps, offset, stream);
}
