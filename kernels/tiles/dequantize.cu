// Tiles -> row-major fp16 or bf16: each weight's float32 value, rounded once. Reference: quantkit/ops/tiles.py: dequantize.
//
// A warp decodes its 16 rows of a tile, 64 columns at a time, in the order of its fragments. Four lanes hold a row's columns in pairs; they
// trade pairs until each has eight neighbours, 16 bytes, so that a warp's store is 64 bytes of each of eight rows: whole sectors.
#include <type_traits>

#include "tiles.cuh"

namespace qk {
namespace {

constexpr int WARPS = 8;

template <class V>
__device__ __forceinline__ V load(const uint8_t* at) {
  return __ldg(reinterpret_cast<const V*>(at));
}

__device__ __forceinline__ uint32_t rounded(float low, float high, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}
__device__ __forceinline__ uint32_t rounded(float low, float high, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ float2 floats(uint32_t pair, __half) { return __half22float2(bits_as<__half2>(pair)); }
__device__ __forceinline__ float2 floats(uint32_t pair, __nv_bfloat16) { return __bfloat1622float2(bits_as<__nv_bfloat162>(pair)); }
// Low or high half of a pair, twice.
template <class T>
__device__ __forceinline__ two_t<T> twice(uint32_t pair, int high) {
  return bits_as<two_t<T>>(__byte_perm(pair, 0, high ? 0x3232 : 0x1010));
}
__device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <int F>
constexpr bool AFFINE = F == QK_Q4_K || F == QK_Q5_K;  // with a minimum

// What a lane holds of its warp's rows of a tile, as it is stored.
template <int F, int G>
struct Packed {
  using L = Tile<F, G>;
  static constexpr int LOADS = F == QK_Q8_0 ? 2 : 1;
  uint4 codes[L::HALVES][LOADS];
  uint2 plane[L::HALVES];
  uint32_t pairs[L::GROUPS];  // scales of r0 and r1
  uint32_t zeros[L::GROUPS];  // or absmax codes
  float2 absmax[L::GROUPS];
  uint4 super[2];
  uint2 d;

  __device__ __forceinline__ void read(const uint8_t* tile, int w, int lane) {
    const int at = rows_at(w, lane);
#pragma unroll
    for (int h = 0; h < L::HALVES; ++h) {
#pragma unroll
      for (int u = 0; u < LOADS; ++u) {
        codes[h][u] = load<uint4>(tile + (F == QK_Q8_0 ? bytes_at(w, h, u, lane) : codes_at<L::KC>(w, h, lane)));
      }
      if constexpr (F == QK_Q5_K) plane[h].x = load<uint32_t>(tile + L::PLANE_AT + plane1_at<L::KC>(w, h, lane));
      if constexpr (F == QK_Q6_K) plane[h] = load<uint2>(tile + L::PLANE_AT + plane2_at<L::KC>(w, h, lane));
    }
    if constexpr (L::SUPER) {
      super[0] = load<uint4>(tile + L::SCALES_AT + at * 16);
      super[1] = load<uint4>(tile + L::SCALES_AT + at * 16 + 16);
      if constexpr (AFFINE<F>) d = load<uint2>(tile + L::SECOND_AT + at * 4);
      if constexpr (F == QK_Q6_K) d.x = load<uint32_t>(tile + L::SECOND_AT + at * 2);
    } else {
#pragma unroll
      for (int j = 0; j < L::GROUPS; ++j) {
        if constexpr (F == QK_NF4) absmax[j] = load<float2>(tile + L::SCALES_AT + (j * ROWS + at) * 4);
        if constexpr (F == QK_NF4N) zeros[j] = load<uint16_t>(tile + L::SCALES_AT + j * ROWS + at);
        if constexpr (F == QK_INT4 || F == QK_INT4Z || F == QK_Q8_0) pairs[j] = load<uint32_t>(tile + L::SCALES_AT + (j * ROWS + at) * 2);
        if constexpr (F == QK_INT4Z) zeros[j] = load<uint16_t>(tile + L::SECOND_AT + j * ROWS + at);
      }
    }
  }

  // q - zero of step s of half h, exact, as pairs of T.
  template <class T>
  __device__ __forceinline__ void integers(int h, int s, two_t<T> out[4]) const {
    const int j = (64 * h + 16 * s) / L::GROUP;
    if constexpr (F == QK_Q8_0) {
      const uint4& both = codes[h][s >> 1];
      unpack8(s & 1 ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y), out);
    } else {
      const uint32_t q = word(codes[h][0], s);
      if constexpr (F == QK_INT4) unpack4(q, Zeros<T>(8, 8), out);
      if constexpr (F == QK_INT4Z) unpack4(q, Zeros<T>(zeros[j] & 255, zeros[j] >> 8), out);
      if constexpr (F == QK_Q4_K) unpack4(q, Zeros<T>(0, 0), out);
      if constexpr (F == QK_Q5_K) unpack5(q, plane[h].x, s, Zeros<T>(0, 0), out);
      if constexpr (F == QK_Q6_K) unpack6(q, s & 2 ? plane[h].y : plane[h].x, s, Zeros<T>(32, 32), out);
    }
  }

  // Scale and minus the minimum of row r (0, 1) in group j.
  template <class S>
  __device__ __forceinline__ float2 scale(int j, int r) const {
    if constexpr (AFFINE<F>) {
      const uint32_t both = word(super[r], j >> 1) >> 16 * (j & 1);
      const float2 ds = floats(r ? d.y : d.x, __half());
      return make_float2(ds.x * static_cast<float>(both & 255), -(ds.y * static_cast<float>(both >> 8 & 255)));
    } else if constexpr (F == QK_Q6_K) {
      const float2 ds = floats(d.x, __half());
      const int sc = static_cast<int8_t>(word(super[r], j >> 2) >> 8 * (j & 3));
      return make_float2((r ? ds.y : ds.x) * static_cast<float>(sc), 0.f);
    } else {
      const float2 both = floats(pairs[j], S());
      return make_float2(r ? both.y : both.x, 0.f);
    }
  }
};

// Four lanes, each with four items: lane t gets item t of every lane, in the order of the lanes.
__device__ __forceinline__ uint4 transposed(uint32_t a, uint32_t b, uint32_t c, uint32_t d, int t) {
  const bool odd = t & 1, upper = t & 2;
  const uint32_t ab = __shfl_xor_sync(~0u, odd ? a : b, 1), cd = __shfl_xor_sync(~0u, odd ? c : d, 1);
  a = odd ? ab : a, b = odd ? b : ab, c = odd ? cd : c, d = odd ? d : cd;
  const uint32_t ac = __shfl_xor_sync(~0u, upper ? a : c, 2), bd = __shfl_xor_sync(~0u, upper ? b : d, 2);
  return upper ? make_uint4(ac, bd, c, d) : make_uint4(a, b, ac, bd);
}

template <class T>
__device__ __forceinline__ void store(T* out, const QkWeight& weight, int64_t row, int64_t column, uint4 v, bool whole) {
  if (row >= weight.n || column >= weight.k) return;
  T* const at = out + row * weight.k + column;
  if (whole) {
    __stcs(reinterpret_cast<uint4*>(at), v);  // evict first: half again as fast where weight and result fit in L2
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t pair = word(v, i >> 1);
    if (column + i < weight.k) at[i] = bits_as<T>(static_cast<uint16_t>(i & 1 ? pair >> 16 : pair));
  }
}

// S: type of the scales. whole: rows of the result are 16-byte aligned.
template <int F, int G, class S, class T>
__global__ void __launch_bounds__(WARPS * 32) dequantize(const QkWeight weight, T* __restrict__ out, uint32_t tiles_k, uint32_t tiles, bool whole) {
  using L = Tile<F, G>;
  constexpr bool BOOK = F == QK_NF4 || F == QK_NF4N;
  // Exact integers times a scale of the same type round once, as float32 does.
  constexpr bool DIRECT = (F == QK_INT4 || F == QK_INT4Z || F == QK_Q8_0) && std::is_same<S, T>::value;
  __shared__ float table[BOOK ? 16 * 32 : 1];  // a copy for each lane: no two meet in a bank
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5 & 3, g = lane >> 2, t = lane & 3;
  const uint32_t tile = blockIdx.x * (WARPS / 4) + (threadIdx.x >> 7);
  if constexpr (BOOK) {
    for (int i = threadIdx.x; i < 16 * 32; i += WARPS * 32) table[i] = static_cast<const float*>(weight.table)[i >> 5];
    __syncthreads();
  }
  if (tile >= tiles) return;
  const uint32_t strip = tile / tiles_k, at = tile % tiles_k;
  Packed<F, G> packed;
  packed.read(static_cast<const uint8_t*>(weight.tiles) + static_cast<int64_t>(tile) * L::BYTES, w, lane);
  const int64_t row = static_cast<int64_t>(strip) * ROWS + 16 * w + g;
  if constexpr (F == QK_NF4N) {
#pragma unroll
    for (int j = 0; j < L::GROUPS; ++j) {
      const float* code = static_cast<const float*>(weight.code);
      packed.absmax[j].x = nested_absmax(weight, code, packed.zeros[j] & 255, row, at * 2 + j);
      packed.absmax[j].y = nested_absmax(weight, code, packed.zeros[j] >> 8, row + 8, at * 2 + j);
    }
  }
#pragma unroll
  for (int h = 0; h < L::HALVES; ++h) {
    uint32_t v[4][4];  // [step][pair]
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int j = (64 * h + 16 * s) / L::GROUP;
      if constexpr (BOOK) {
        const uint32_t q = word(packed.codes[h][0], s);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const float absmax = p & 1 ? packed.absmax[j].y : packed.absmax[j].x;
          const float low = table[(q >> 8 * p & 15) * 32 + lane], high = table[(q >> (8 * p + 4) & 15) * 32 + lane];
          v[s][p] = rounded(low * absmax, high * absmax, T());
        }
      } else if constexpr (DIRECT) {
        two_t<T> q[4];
        packed.template integers<T>(h, s, q);
#pragma unroll
        for (int p = 0; p < 4; ++p) v[s][p] = bits_as<uint32_t>(__hmul2(q[p], twice<T>(packed.pairs[j], p & 1)));
      } else {
        __half2 q[4];
        packed.template integers<__half>(h, s, q);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const float2 scale = packed.template scale<S>(j, p & 1), both = __half22float2(q[p]);
          if constexpr (AFFINE<F>) {  // the product is exact: one rounding, as in float32 it has
            v[s][p] = rounded(fmaf(both.x, scale.x, scale.y), fmaf(both.y, scale.x, scale.y), T());
          } else {
            v[s][p] = rounded(both.x * scale.x, both.y * scale.x, T());
          }
        }
      }
    }
    const int64_t column = static_cast<int64_t>(at) * L::KC + 64 * h + 8 * t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint4 half[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) half[i] = transposed(v[2 * i][r], v[2 * i][2 + r], v[2 * i + 1][r], v[2 * i + 1][2 + r], t);
      store(out, weight, row + 8 * r, column, half[0], whole);
      store(out, weight, row + 8 * r, column + 32, half[1], whole);
    }
  }
}

template <int F, int G, class S, class T>
int run(const QkWeight& weight, void* out, cudaStream_t stream) {
  using L = Tile<F, G>;
  const int64_t tiles_k = (weight.k + L::KC - 1) / L::KC, tiles = (weight.n + ROWS - 1) / ROWS * tiles_k;
  const int64_t blocks = (tiles + WARPS / 4 - 1) / (WARPS / 4);
  if (blocks > INT32_MAX) return QK_UNSUPPORTED;
  if (blocks == 0) return 0;
  const bool whole = weight.k % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  dequantize<F, G, S, T><<<static_cast<uint32_t>(blocks), WARPS * 32, 0, stream>>>(
      weight, static_cast<T*>(out), static_cast<uint32_t>(tiles_k), static_cast<uint32_t>(tiles), whole);
  return cudaGetLastError();
}

template <int F, class S, class T>
int by_group(const QkWeight& weight, void* out, cudaStream_t stream) {
  switch (weight.group) {
    case 32: return run<F, 32, S, T>(weight, out, stream);
    case 64: return run<F, 64, S, T>(weight, out, stream);
    case 128: return run<F, 128, S, T>(weight, out, stream);
    default: return QK_UNSUPPORTED;
  }
}

template <int F, class T>
int by_scale(const QkWeight& weight, void* out, cudaStream_t stream) {
  if (weight.scale_type == QK_FP16) return by_group<F, __half, T>(weight, out, stream);
  return weight.scale_type == QK_BF16 ? by_group<F, __nv_bfloat16, T>(weight, out, stream) : QK_UNSUPPORTED;
}

template <class T>
int by_format(const QkWeight& weight, void* out, cudaStream_t stream) {
  switch (weight.format) {
    case QK_INT4: return by_scale<QK_INT4, T>(weight, out, stream);
    case QK_INT4Z: return by_scale<QK_INT4Z, T>(weight, out, stream);
    case QK_NF4: return by_group<QK_NF4, __half, T>(weight, out, stream);
    case QK_NF4N: return run<QK_NF4N, 64, __half, T>(weight, out, stream);
    case QK_Q4_K: return run<QK_Q4_K, 32, __half, T>(weight, out, stream);
    case QK_Q5_K: return run<QK_Q5_K, 32, __half, T>(weight, out, stream);
    case QK_Q6_K: return run<QK_Q6_K, 16, __half, T>(weight, out, stream);
    case QK_Q8_0: return run<QK_Q8_0, 32, __half, T>(weight, out, stream);
    default: return QK_UNSUPPORTED;
  }
}

}  // namespace
}  // namespace qk

extern "C" int quantkit_dequantize(const QkWeight* weight, void* out, int out_type, cudaStream_t stream) {
  if (out_type == QK_FP16) return qk::by_format<__half>(*weight, out, stream);
  return out_type == QK_BF16 ? qk::by_format<__nv_bfloat16>(*weight, out, stream) : QK_UNSUPPORTED;
}
