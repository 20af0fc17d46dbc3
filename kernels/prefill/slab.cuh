// What a lane holds of a slab (64 rows x 64 columns of a tile): the bytes as loaded, and the 16 fragment registers that they become.
#pragma once
#include "../tiles.cuh"

namespace qk {

__device__ __forceinline__ __half2 twice(__half a) { return __half2half2(a); }
__device__ __forceinline__ __nv_bfloat162 twice(__nv_bfloat16 a) { return __bfloat162bfloat162(a); }

// Two 16-bit scales as stored -> T, each twice. mixed: they are stored as the other type.
template <class T>
__device__ __forceinline__ void spread(uint32_t pair, bool mixed, two_t<T>& r0, two_t<T>& r1) {
  if (mixed) {
    if constexpr (sizeof(T) && std::is_same<T, __half>::value) {
      pair = bits_as<uint32_t>(__float22half2_rn(__bfloat1622float2(bits_as<__nv_bfloat162>(pair))));
    } else {
      pair = bits_as<uint32_t>(__float22bfloat162_rn(__half22float2(bits_as<__half2>(pair))));
    }
  }
  r0 = bits_as<two_t<T>>(__byte_perm(pair, 0, 0x1010));
  r1 = bits_as<two_t<T>>(__byte_perm(pair, 0, 0x3232));
}

template <class T, int F, int G>
struct Slab;

// INT4, INT4Z; the integer is exact, the product rounded once.
template <class T, int F, int G>
struct GroupedSlab {
  using L = Tile<F, G>;
  static constexpr int PER = G < 64 ? 2 : 1;  // groups in a slab
  uint4 codes;
  two_t<T> r0[PER], r1[PER];  // scales
  uint32_t zeros[PER];

  __device__ __forceinline__ void load(const uint8_t* tile, int w, int lane, int h, bool mixed) {
    codes = *reinterpret_cast<const uint4*>(tile + codes_at<L::KC>(w, h, lane));
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int j = (64 * h + 32 * i) / G;
      spread<T>(scale_pair<L>(tile, j, rows_at(w, lane)), mixed, r0[i], r1[i]);
      zeros[i] = F == QK_INT4Z ? zero_pair<L>(tile, j, rows_at(w, lane)) : 0x0808;
    }
  }

  __device__ __forceinline__ void values(uint32_t (&fragment)[16]) const {
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const Zeros<T> zero(zeros[i] & 0xff, zeros[i] >> 8);
#pragma unroll
      for (int s = 4 * i / PER; s < 4 * (i + 1) / PER; ++s) {
        two_t<T> q[4];
        unpack4(words[s], zero, q);
#pragma unroll
        for (int p = 0; p < 4; ++p) fragment[4 * s + p] = bits_as<uint32_t>(__hmul2(q[p], p & 1 ? r1[i] : r0[i]));
      }
    }
  }
};
template <class T, int G>
struct Slab<T, QK_INT4, G> : GroupedSlab<T, QK_INT4, G> {};
template <class T, int G>
struct Slab<T, QK_INT4Z, G> : GroupedSlab<T, QK_INT4Z, G> {};

}  // namespace qk
