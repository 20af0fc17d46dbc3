// Tiles: the one layout of packed weights that quantkit's kernels read. Reference: quantkit/ops/tiles.py.
//
// W [N, K] is padded to N % 64 == 0 and K % KC == 0 by weights that are exactly 0 (KC: 128; 256 for Q4_K, Q5_K, Q6_K). A tile is 64 rows
// by KC columns in one chunk of bytes, [codes][plane][scales][zeros]; tiles are stored [N / 64][K / KC]. The chunk is a multiple of 16 bytes.
//
// Codes, 4-bit formats: words [warp w 4][half h KC/64][lane 32][step s 4], 16 bytes a lane. Word (w, h, lane, s) holds the fragment of
// mma.m16n8k16's A (rows of W) for rows 16w to 16w + 15, columns 64h + 16s to 64h + 16s + 15:
//   r0 = 16w + lane / 4, r1 = r0 + 8, k0 = 64h + 16s + 2 (lane % 4)
//   pair p: 0 (r0; k0, k0 + 1)  1 (r1; k0, k0 + 1)  2 (r0; k0 + 8, k0 + 9)  3 (r1; k0 + 8, k0 + 9)
//   its first element at bits 4p to 4p + 3, its second at bits 16 + 4p to 16 + 4p + 3; NF4, NF4N: at bits 8p to 8p + 3 and 8p + 4 to 8p + 7,
//   as both are looked up at once.
// Plane, Q5_K (bit 4 of a code): words [w][h][lane]; step s, pair p: first element at bit 4p + s, second at bit 16 + 4p + s.
// Plane, Q6_K (bits 4 and 5):    words [w][h][lane][u 2], u = s / 2; first at bits 4p + 2 (s % 2) and the next, second 16 above.
// Codes, Q8_0: [w][h][u 2][lane][e 2] x 8 bytes of int8, s = 2u + e: pair 0, pair 1, pair 2, pair 3. (A warp's 16-byte loads are contiguous.)
//
// Row order, of everything that a row has one of: index 16w + 2 (lane / 4) + r for row r0 (r = 0) or r1 (r = 1): a lane's two rows are
// adjacent. Sections, by format (J = 128 / group):
//   INT4   scales [J][64] fp16 or bf16                       w = s (q - 8)
//   INT4Z  scales [J][64], then zeros [J][64] uint8          w = s (q - z), z 0 to 16
//   NF4    absmax [J][64] float                              w = table[q] absmax
//   NF4N   absmax codes [2][64] uint8                        w = table[q] (code[c] absmax2[b >> 8] + offsets[row >> 6])
//   Q4_K   [64][8] (uint8 sc, uint8 m), then [64] (fp16 d, fp16 dmin)   w = d sc q - dmin m, per 32 columns; Q5_K the same
//   Q6_K   [64][16] int8 sc, then [64] fp16 d                w = d sc (q - 32), per 16 columns
//   Q8_0   [4][64] fp16 d                                    w = d q, per 32 columns
// Padding: code 8 (INT4), 0 (INT4Z, Q4_K, Q5_K, Q8_0), 32 (Q6_K), the code of 0.0 (NF4); every scale 0.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "quantkit.h"

namespace qk {

constexpr int ROWS = 64;

// G: columns to a scale within the tile (32, 64, 128), of INT4, INT4Z and NF4; the others have their own.
template <int F, int G>
struct Tile {
  static constexpr bool SUPER = F == QK_Q4_K || F == QK_Q5_K || F == QK_Q6_K;
  static constexpr int KC = SUPER ? 256 : 128;
  static constexpr int HALVES = KC / 64;
  static constexpr int GROUP = F == QK_Q6_K ? 16 : F == QK_NF4N ? 64 : (SUPER || F == QK_Q8_0) ? 32 : G;
  static constexpr int GROUPS = KC / GROUP;
  static constexpr int CODES = F == QK_Q8_0 ? ROWS * KC : ROWS * KC / 2;
  static constexpr int PLANE = F == QK_Q5_K ? ROWS * KC / 8 : F == QK_Q6_K ? ROWS * KC / 4 : 0;
  // Bytes of the first section of scales and of the second (zeros; d and dmin; d).
  static constexpr int SCALES = F == QK_NF4    ? GROUPS * ROWS * 4
                                : F == QK_NF4N ? GROUPS * ROWS
                                : SUPER        ? ROWS * 16
                                               : GROUPS * ROWS * 2;
  static constexpr int SECOND = F == QK_INT4Z                     ? GROUPS * ROWS
                                : F == QK_Q4_K || F == QK_Q5_K ? ROWS * 4
                                : F == QK_Q6_K                    ? ROWS * 2
                                                                  : 0;
  static constexpr int PLANE_AT = CODES;
  static constexpr int SCALES_AT = CODES + PLANE;
  static constexpr int SECOND_AT = SCALES_AT + SCALES;
  static constexpr int BYTES = SECOND_AT + SECOND;
  static_assert(BYTES % 16 == 0, "tiles are copied 16 bytes at a time");
};

__host__ __device__ inline int tile_columns(int format) { return format >= QK_Q4_K && format <= QK_Q6_K ? 256 : 128; }

__host__ __device__ inline int64_t tile_bytes(int format, int group) {
  const int j = group >= 128 ? 1 : 128 / group;
  switch (format) {
    case QK_INT4: return 4096 + j * 128;
    case QK_INT4Z: return 4096 + j * 192;
    case QK_NF4: return 4096 + j * 256;
    case QK_NF4N: return 4096 + 128;
    case QK_Q4_K: return Tile<QK_Q4_K, 32>::BYTES;
    case QK_Q5_K: return Tile<QK_Q5_K, 32>::BYTES;
    case QK_Q6_K: return Tile<QK_Q6_K, 16>::BYTES;
    default: return Tile<QK_Q8_0, 32>::BYTES;
  }
}

// Byte of a lane's 16 bytes of 4-bit codes (4 words, steps 0 to 3), and its words of the planes.
template <int KC>
__host__ __device__ constexpr int codes_at(int w, int h, int lane) {
  return ((w * (KC / 64) + h) * 32 + lane) * 16;
}
template <int KC>
__host__ __device__ constexpr int plane1_at(int w, int h, int lane) {  // 4 bytes: steps 0 to 3
  return ((w * (KC / 64) + h) * 32 + lane) * 4;
}
template <int KC>
__host__ __device__ constexpr int plane2_at(int w, int h, int lane) {  // 8 bytes: word u for steps 2u and 2u + 1
  return ((w * (KC / 64) + h) * 32 + lane) * 8;
}
// Byte of a lane's 16 bytes of Q8_0: steps 2u and 2u + 1.
__host__ __device__ constexpr int bytes_at(int w, int h, int u, int lane) { return (((w * 2 + h) * 2 + u) * 32 + lane) * 16; }

// Place in row order of a lane's first row; its second is the next.
__host__ __device__ constexpr int rows_at(int w, int lane) { return 16 * w + 2 * (lane >> 2); }
// Place in row order of any row of a tile.
__host__ __device__ constexpr int row_order(int row) { return (row & 48) + 2 * (row & 7) + ((row >> 3) & 1); }

template <class T>
struct Two;
template <>
struct Two<__half> {
  using type = __half2;
};
template <>
struct Two<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <class T>
using two_t = typename Two<T>::type;

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// (a & mask) | c in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
  return d;
}

// What turns the magic numbers of unpack*() into q - zero: row r0's pairs (0 and 2) lie at bit 0, row r1's (1 and 3) of fp16 at bit 4.
// fp16: 0x6400 | q is 1024 + q, 0x6400 | 16 q is 1024 + 16 q; bf16: 0x4300 | q is 128 + q. All exact, for q < 64 and 0 <= zero <= 64.
template <class T>
struct Zeros;
template <>
struct Zeros<__half> {
  __half2 r0, r1;  // -(1024 + zero of r0), -(64 + zero of r1), twice each
  __device__ __forceinline__ Zeros(uint32_t z0, uint32_t z1)
      : r0(bits_as<__half2>(0xe400e400u + z0 * 0x00010001u)), r1(bits_as<__half2>(0xd400d400u + z1 * 0x00100010u)) {}
};
template <>
struct Zeros<__nv_bfloat16> {
  __nv_bfloat162 r0, r1;  // -(128 + zero)
  __device__ __forceinline__ Zeros(uint32_t z0, uint32_t z1)
      : r0(bits_as<__nv_bfloat162>(0xc300c300u + z0 * 0x00010001u)), r1(bits_as<__nv_bfloat162>(0xc300c300u + z1 * 0x00010001u)) {}
};

// The two magic numbers' way back: v (or v / 16) + zero.
__device__ __forceinline__ __half2 minus(uint32_t v, __half2 zero) { return __hadd2(bits_as<__half2>(v), zero); }
__device__ __forceinline__ __half2 sixteenth_minus(uint32_t v, __half2 zero) {
  return __hfma2(bits_as<__half2>(v), bits_as<__half2>(0x2c002c00u), zero);
}
__device__ __forceinline__ __nv_bfloat162 minus(uint32_t v, __nv_bfloat162 zero) {
  return __hfma2(bits_as<__nv_bfloat162>(v), bits_as<__nv_bfloat162>(0x3f803f80u), zero);
}

// One word of 4-bit codes -> q - zero of its four pairs, in the order of the fragment's registers.
__device__ __forceinline__ void unpack4(uint32_t word, const Zeros<__half>& zeros, __half2 out[4]) {
  const uint32_t high = word >> 8;
  out[0] = minus(and_or(word, 0x000f000fu, 0x64006400u), zeros.r0);
  out[1] = sixteenth_minus(and_or(word, 0x00f000f0u, 0x64006400u), zeros.r1);
  out[2] = minus(and_or(high, 0x000f000fu, 0x64006400u), zeros.r0);
  out[3] = sixteenth_minus(and_or(high, 0x00f000f0u, 0x64006400u), zeros.r1);
}
__device__ __forceinline__ void unpack4(uint32_t word, const Zeros<__nv_bfloat16>& zeros, __nv_bfloat162 out[4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) out[p] = minus(and_or(word >> 4 * p, 0x000f000fu, 0x43004300u), p & 1 ? zeros.r1 : zeros.r0);
}

// The same of 5-bit codes: plane, the lane's word of Q5_K's plane; step, known when compiling.
__device__ __forceinline__ void unpack5(uint32_t word, uint32_t plane, int step, const Zeros<__half>& zeros, __half2 out[4]) {
  const uint32_t high = word >> 8, p0 = plane << (4 - step), p1 = plane >> (4 + step);
  out[0] = minus(and_or(p0, 0x00100010u, and_or(word, 0x000f000fu, 0x64006400u)), zeros.r0);
  out[1] = sixteenth_minus(and_or(p0, 0x01000100u, and_or(word, 0x00f000f0u, 0x64006400u)), zeros.r1);
  out[2] = minus(and_or(p1, 0x00100010u, and_or(high, 0x000f000fu, 0x64006400u)), zeros.r0);
  out[3] = sixteenth_minus(and_or(p1, 0x01000100u, and_or(high, 0x00f000f0u, 0x64006400u)), zeros.r1);
}
__device__ __forceinline__ void unpack5(uint32_t word, uint32_t plane, int step, const Zeros<__nv_bfloat16>& zeros,
                                        __nv_bfloat162 out[4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int at = 4 * p + step;
    const uint32_t bit = at < 4 ? plane << (4 - at) : plane >> (at - 4);
    out[p] = minus(and_or(bit, 0x00100010u, and_or(word >> 4 * p, 0x000f000fu, 0x43004300u)), p & 1 ? zeros.r1 : zeros.r0);
  }
}

// The same of 6-bit codes: plane, word step / 2 of the lane's two of Q6_K's plane.
__device__ __forceinline__ void unpack6(uint32_t word, uint32_t plane, int step, const Zeros<__half>& zeros, __half2 out[4]) {
  const int e = 2 * (step & 1);
  const uint32_t high = word >> 8, p0 = plane << (4 - e), p1 = plane >> (4 + e);
  out[0] = minus(and_or(p0, 0x00300030u, and_or(word, 0x000f000fu, 0x64006400u)), zeros.r0);
  out[1] = sixteenth_minus(and_or(p0, 0x03000300u, and_or(word, 0x00f000f0u, 0x64006400u)), zeros.r1);
  out[2] = minus(and_or(p1, 0x00300030u, and_or(high, 0x000f000fu, 0x64006400u)), zeros.r0);
  out[3] = sixteenth_minus(and_or(p1, 0x03000300u, and_or(high, 0x00f000f0u, 0x64006400u)), zeros.r1);
}
__device__ __forceinline__ void unpack6(uint32_t word, uint32_t plane, int step, const Zeros<__nv_bfloat16>& zeros,
                                        __nv_bfloat162 out[4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int at = 4 * p + 2 * (step & 1);
    const uint32_t bits = at < 4 ? plane << (4 - at) : plane >> (at - 4);
    out[p] = minus(and_or(bits, 0x00300030u, and_or(word >> 4 * p, 0x000f000fu, 0x43004300u)), p & 1 ? zeros.r1 : zeros.r0);
  }
}

// 8 bytes of Q8_0 (one step) -> q of its four pairs.
__device__ __forceinline__ void unpack8(uint2 bytes, __half2 out[4]) {
  const uint32_t words[2] = {bytes.x ^ 0x80808080u, bytes.y ^ 0x80808080u};  // q + 128; 0x6400 | it is 1152 + q
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    out[p] = minus(__byte_perm(words[p >> 1], 0x64646464u, p & 1 ? 0x4342 : 0x4140), bits_as<__half2>(0xe480e480u));
  }
}
__device__ __forceinline__ void unpack8(uint2 bytes, __nv_bfloat162 out[4]) {
  const uint32_t words[2] = {bytes.x, bytes.y};
#pragma unroll
  for (int p = 0; p < 4; ++p) {  // (128 + low seven bits) - (128, or 256 where the sign bit is set)
    const uint32_t pair = __byte_perm(words[p >> 1], 0, p & 1 ? 0x4342 : 0x4140);
    const uint32_t low = and_or(pair, 0x007f007fu, 0x43004300u), sign = and_or(pair, 0x00800080u, 0x43004300u);
    out[p] = __hfma2(bits_as<__nv_bfloat162>(sign), bits_as<__nv_bfloat162>(0xbf80bf80u), bits_as<__nv_bfloat162>(low));
  }
}

// A lane's per-group values, of its two rows; `tile` may be shared or global memory, `at` is rows_at(w, lane).
// INT4, INT4Z, Q8_0: the two scales as they are stored (r0 low, r1 high).
template <class L>
__device__ __forceinline__ uint32_t scale_pair(const uint8_t* tile, int j, int at) {
  return *reinterpret_cast<const uint32_t*>(tile + L::SCALES_AT + (j * ROWS + at) * 2);
}
// INT4Z: the two zeros (r0 low byte, r1 high byte).
template <class L>
__device__ __forceinline__ uint32_t zero_pair(const uint8_t* tile, int j, int at) {
  return *reinterpret_cast<const uint16_t*>(tile + L::SECOND_AT + j * ROWS + at);
}
// NF4: the two absmax.
template <class L>
__device__ __forceinline__ float2 absmax_pair(const uint8_t* tile, int j, int at) {
  return *reinterpret_cast<const float2*>(tile + L::SCALES_AT + (j * ROWS + at) * 4);
}
// NF4N: the two absmax codes (r0 low byte, r1 high byte), and what one of them stands for; row and block are of the whole matrix.
template <class L>
__device__ __forceinline__ uint32_t absmax_codes(const uint8_t* tile, int j, int at) {
  return *reinterpret_cast<const uint16_t*>(tile + L::SCALES_AT + j * ROWS + at);
}
__device__ __forceinline__ float nested_absmax(const QkWeight& weight, const float* code, uint32_t c, int64_t row, int64_t block) {
  const int64_t b = weight.block0 + row * weight.block_row_stride + block;
  return __fadd_rn(__fmul_rn(code[c], static_cast<const float*>(weight.absmax2)[b >> 8]),
                   static_cast<const float*>(weight.offsets)[row / ROWS]);
}
// Q4_K, Q5_K: (sc, m) of group j (low byte, high byte) for one row, and (d, dmin).
template <class L>
__device__ __forceinline__ uint32_t super_scale(const uint8_t* tile, int j, int at) {
  return *reinterpret_cast<const uint16_t*>(tile + L::SCALES_AT + at * 16 + j * 2);
}
template <class L>
__device__ __forceinline__ __half2 super_d(const uint8_t* tile, int at) {
  return *reinterpret_cast<const __half2*>(tile + L::SECOND_AT + at * 4);
}
// Q6_K: the scale of group j (16 columns) for one row; d of both rows (r0 low, r1 high).
template <class L>
__device__ __forceinline__ int six_scale(const uint8_t* tile, int j, int at) {
  return reinterpret_cast<const int8_t*>(tile)[L::SCALES_AT + at * 16 + j];
}
template <class L>
__device__ __forceinline__ __half2 six_d(const uint8_t* tile, int at) {
  return *reinterpret_cast<const __half2*>(tile + L::SECOND_AT + at * 2);
}

}  // namespace qk
