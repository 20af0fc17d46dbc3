// silu(gate) * up: bound by memory, three transfers of [rows, columns].
#include "fusions/fusions.h"
#include "fusions/vector.cuh"

namespace {

using namespace fusions;

constexpr int THREADS = 256;

template <typename T, int V>
__global__ void silu_mul(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* out, int64_t columns) {
  begin();
  const int64_t row = blockIdx.y;
  const int64_t column = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (column >= columns) return;
  const auto g = load<V>(gate + row * gate_stride + column), u = load<V>(up + row * up_stride + column);
  Vector<T, V> y;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float x = wide(g.at[i]);
    y.at[i] = narrow<T>(rounded<T>(x / (1.0f + expf(-x))) * wide(u.at[i]));
  }
  store<V>(out + row * columns + column, y);
}

template <typename T, int V>
int start(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t columns,
          cudaStream_t stream) {
  const unsigned x = unsigned((columns + int64_t(THREADS) * V - 1) / (int64_t(THREADS) * V));
  const int64_t limit = 65535;  // of a grid's second size
  for (int64_t row = 0; row < rows; row += limit) {
    const int64_t count = rows - row < limit ? rows - row : limit;
    const int error = launch(silu_mul<T, V>, dim3(x, unsigned(count)), THREADS, stream, static_cast<const T*>(gate) + row * gate_stride,
                             gate_stride, static_cast<const T*>(up) + row * up_stride, up_stride, static_cast<T*>(out) + row * columns,
                             columns);
    if (error) return error;
  }
  return 0;
}

}  // namespace

extern "C" int quantkit_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out, int64_t rows,
                                 int64_t columns, int type, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return 0;
  const bool whole = columns % WIDE == 0 && gate_stride % WIDE == 0 && up_stride % WIDE == 0 && aligned(gate) && aligned(up) && aligned(out);
  const auto run = type == QK_BF16 ? (whole ? start<__nv_bfloat16, WIDE> : start<__nv_bfloat16, 1>)
                                   : (whole ? start<__half, WIDE> : start<__half, 1>);
  return run(gate, gate_stride, up, up_stride, out, rows, columns, stream);
}
