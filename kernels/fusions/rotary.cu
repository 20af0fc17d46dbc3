// Rotary embedding of queries and keys, and the keys' and values' way into the cache: a block for each token.
#include <cuda_fp8.h>

#include "fusions/fusions.h"
#include "fusions/vector.cuh"

namespace {

using namespace fusions;

constexpr int MOST = 256;

// As the cache keeps them: what is larger than float8 has becomes its largest, as a clamp before torch's cast makes it.
template <int V, typename T>
__device__ void keep(T* to, const Vector<T, V>& v) { store<V>(to, v); }
template <int V, typename T>
__device__ void keep(__nv_fp8_e4m3* to, const Vector<T, V>& v) {
  Vector<__nv_fp8_storage_t, V> narrowed;
#pragma unroll
  for (int i = 0; i < V; ++i) narrowed.at[i] = __nv_cvt_float_to_fp8(wide(v.at[i]), __NV_SATFINITE, __NV_E4M3);
  store<V>(reinterpret_cast<__nv_fp8_storage_t*>(to), narrowed);
}

// One piece of V pairs (i, i + width / 2) of a head, or V elements past `width`; read, and written where `kept`.
template <int V, typename T, typename C>
__device__ void rotate(const T* from, C* to, const T* cos, const T* sin, int piece, int width, bool kept = true) {
  const int half = width / 2, i = piece * V;
  if (i >= half) {
    const auto v = load<V>(from + i + half);
    if (kept) keep<V>(to + i + half, v);
    return;
  }
  const auto a = load<V>(from + i), b = load<V>(from + i + half), c = load<V>(cos + i), s = load<V>(sin + i);
  Vector<T, V> first, second;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float x = wide(a.at[j]), y = wide(b.at[j]), u = wide(c.at[j]), w = wide(s.at[j]);
    first.at[j] = narrow<T>(rounded<T>(x * u) - rounded<T>(y * w));
    second.at[j] = narrow<T>(rounded<T>(y * u) + rounded<T>(x * w));
  }
  if (!kept) return;
  keep<V>(to + i, first);
  keep<V>(to + i + half, second);
}

template <typename T, typename C, int V>
__global__ void rotary_write(const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v, int64_t v_stride, const T* cos,
                             const T* sin, const int64_t* slots, T* q_out, C* keys, C* values, int heads, int kv_heads, int dim,
                             int width) {
  begin();
  const int64_t token = blockIdx.x, slot = slots[token];  // where to write: no read waits for it
  q += token * q_stride, k += token * k_stride, v += token * v_stride, q_out += token * heads * dim;
  cos += token * (width / 2), sin += token * (width / 2), keys += slot * kv_heads * dim, values += slot * kv_heads * dim;
  const int pieces = (dim - width / 2) / V, copies = kv_heads * dim / V;
  for (int i = threadIdx.x; i < (heads + kv_heads) * pieces; i += blockDim.x) {
    const int head = i / pieces, piece = i % pieces;
    if (head < heads) rotate<V>(q + head * dim, q_out + head * dim, cos, sin, piece, width);
    else rotate<V>(k + (head - heads) * dim, keys + (head - heads) * dim, cos, sin, piece, width, slot >= 0);
  }
  for (int i = threadIdx.x; i < copies; i += blockDim.x) {
    const auto piece = load<V>(v + i * V);
    if (slot >= 0) keep<V>(values + i * V, piece);
  }
}

}  // namespace

extern "C" int quantkit_rotary_write(const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v,
                                     int64_t v_stride, const void* cos, const void* sin, const int64_t* slots, void* q_out,
                                     void* keys, void* values, int64_t tokens, int heads, int kv_heads, int dim, int width,
                                     int type, int fp8, cudaStream_t stream) {
  if (width < 0 || width > dim || width % 2 || tokens > INT32_MAX) return QK_UNSUPPORTED;
  if (tokens == 0 || heads + kv_heads == 0) return 0;
  const bool whole = dim % WIDE == 0 && width / 2 % WIDE == 0 && q_stride % WIDE == 0 && k_stride % WIDE == 0 && v_stride % WIDE == 0 &&
                     aligned(q) && aligned(k) && aligned(v) && aligned(cos) && aligned(sin) && aligned(q_out) && aligned(keys) &&
                     aligned(values);
  const int work = (heads + kv_heads) * (dim - width / 2) / (whole ? WIDE : 1);
  const unsigned threads = work >= MOST ? MOST : unsigned(work + 31) / 32 * 32;
  const auto run = [&](auto zero, auto kept) {
    using T = decltype(zero);
    using C = decltype(kept);
    const auto kernel = whole ? rotary_write<T, C, WIDE> : rotary_write<T, C, 1>;
    return launch(kernel, dim3(unsigned(tokens)), threads, stream, static_cast<const T*>(q), q_stride, static_cast<const T*>(k), k_stride,
                  static_cast<const T*>(v), v_stride, static_cast<const T*>(cos), static_cast<const T*>(sin), slots,
                  static_cast<T*>(q_out), static_cast<C*>(keys), static_cast<C*>(values), heads, kv_heads, dim, width);
  };
  if (type == QK_BF16) return fp8 ? run(__nv_bfloat16(), __nv_fp8_e4m3()) : run(__nv_bfloat16(), __nv_bfloat16());
  return fp8 ? run(__half(), __nv_fp8_e4m3()) : run(__half(), __half());
}
