// RMS norm, with the residual's addition before it: a block for each row, which it holds where it can.
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

// R vectors of the row in each thread's registers, and of the weight, which is asked for before the row is there; 0: rows of any length.
template <typename T, int V, int R, bool ADD>
__global__ void __launch_bounds__(MOST) rms_norm(const T* x, const T* residual, const T* weight, T* sum, T* out, int64_t columns, float eps,
                                                 float offset) {
  const int64_t row = blockIdx.x * columns, stride = int64_t(blockDim.x) * V, first = int64_t(threadIdx.x) * V;
  const auto added = [&](int64_t column) {
    auto v = load<V>(x + row + column);
    if constexpr (ADD) {
      const auto r = load<V>(residual + row + column);
#pragma unroll
      for (int i = 0; i < V; ++i) v.at[i] = narrow<T>(wide(v.at[i]) + wide(r.at[i]));
      store<V>(sum + row + column, v);
    }
    return v;
  };
  float squares = 0.0f;
  const auto square = [&](const Vector<T, V>& v) {
#pragma unroll
    for (int i = 0; i < V; ++i) squares += wide(v.at[i]) * wide(v.at[i]);
  };
  const auto finish = [&](int64_t column, Vector<T, V> v, const Vector<T, V>& w, float factor) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float quotient = wide(v.at[i]) * factor;
      v.at[i] = narrow<T>(offset == 0.0f ? rounded<T>(quotient) * wide(w.at[i]) : quotient * (offset + wide(w.at[i])));
    }
    store<V>(out + row + column, v);
  };
  if constexpr (R > 0) {
    Vector<T, V> v[R], w[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r * stride < columns) w[r] = load<V>(weight + first + r * stride);
    }
    begin();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r * stride < columns) square(v[r] = added(first + r * stride));
    }
    const float factor = rsqrtf(block_sum(squares) / float(columns) + eps);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r * stride < columns) finish(first + r * stride, v[r], w[r], factor);
    }
  } else {
    begin();
    for (int64_t column = first; column < columns; column += stride) square(added(column));
    const float factor = rsqrtf(block_sum(squares) / float(columns) + eps);
    const T* values = ADD ? sum : x;
    for (int64_t column = first; column < columns; column += stride) {  // a thread reads what it wrote itself
      finish(column, load<V>(values + row + column), load<V>(weight + column), factor);
    }
  }
}

template <typename T, int V, int R>
int start(const void* x, const void* residual, const void* weight, void* sum, void* out, int64_t rows, int64_t columns, float eps,
          float offset, cudaStream_t stream) {
  const int64_t each = R > 0 ? R : 1, warps = (columns + V * WARP * each - 1) / (V * WARP * each);
  const unsigned threads = unsigned(warps * WARP < MOST ? warps * WARP : MOST);
  return launch(residual ? rms_norm<T, V, R, true> : rms_norm<T, V, R, false>, dim3(unsigned(rows)), threads, stream,
                static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight), static_cast<T*>(sum),
                static_cast<T*>(out), columns, eps, offset);
}

template <typename T>
auto chosen(bool whole, int64_t columns) {
  if (!whole) return start<T, 1, 0>;
  return columns <= MOST * WIDE ? start<T, WIDE, 1> : columns <= 2 * MOST * WIDE ? start<T, WIDE, 2> : start<T, WIDE, 0>;
}

}  // namespace

extern "C" int quantkit_rms_norm(const void* x, const void* residual, const void* weight, void* sum, void* out, int64_t rows,
                                 int64_t columns, float eps, float offset, int type, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return 0;
  const bool whole = columns % WIDE == 0 && aligned(x) && aligned(residual) && aligned(weight) && aligned(sum) && aligned(out);
  const auto run = type == QK_BF16 ? chosen<__nv_bfloat16>(whole, columns) : chosen<__half>(whole, columns);
  return run(x, residual, weight, sum, out, rows, columns, eps, offset, stream);
}
