// What a lane holds of a slab (64 rows x 64 columns of a tile): the bytes as loaded, and the fragments that they become.
//
// load() reads shared memory and makes the scales; values() makes the fragment of 16 columns (step s), and must not branch (prefill.cuh).
#pragma once
#include <type_traits>

#include "../tiles.cuh"

namespace qk {

__device__ __forceinline__ __half2 twice(__half a) { return __half2half2(a); }
__device__ __forceinline__ __nv_bfloat162 twice(__nv_bfloat16 a) { return __bfloat162bfloat162(a); }

// A float32 factor in T. bfloat16 takes it in two parts, so that a weight is rounded once, not twice.
template <class T>
struct Scale;
template <>
struct Scale<__half> {
  __half2 high;
  __device__ __forceinline__ void set(float s) { high = __float2half2_rn(s); }
  __device__ __forceinline__ __half2 times(__half2 q) const { return __hmul2(q, high); }
  __device__ __forceinline__ __half2 times_plus(__half2 q, const Scale& c) const { return __hfma2(q, high, c.high); }
};
template <>
struct Scale<__nv_bfloat16> {
  __nv_bfloat162 high, low;
  __device__ __forceinline__ void set(float s) {
    high = __float2bfloat162_rn(s);
    low = __float2bfloat162_rn(s - __low2float(high));
  }
  __device__ __forceinline__ __nv_bfloat162 times(__nv_bfloat162 q) const { return __hfma2(q, high, __hmul2(q, low)); }
  __device__ __forceinline__ __nv_bfloat162 times_plus(__nv_bfloat162 q, const Scale& c) const {
    return __hadd2(__hfma2(q, high, c.high), __hfma2(q, low, c.low));
  }
};

// What a lane keeps for a launch, for its rows of a tile of y (rows), and for 128 columns (columns).
template <class T, int F>
struct Context {
  bool mixed;  // the scales are stored as the other 16-bit type
  __device__ __forceinline__ Context(const QkWeight&, bool mixed, const uint8_t*) : mixed(mixed) {}
  __device__ __forceinline__ void rows(const QkWeight&, int64_t) {}
  __device__ __forceinline__ void columns(const QkWeight&, int) {}
};

// A table of pairs: half2 or bfloat162 of entries (i & 15, i >> 4), a copy for each lane, so that no two lanes ask one bank: [256][32].
// Behind it NF4N's 256 floats. The consumers fill it, when the first tiles are on their way.
constexpr int PAIR_TABLE = 256 * 32 * 4, CODE_TABLE = 256 * 4;
template <int F>
constexpr int TABLE_BYTES = F == QK_NF4N ? PAIR_TABLE + CODE_TABLE : F == QK_NF4 ? PAIR_TABLE : 0;

template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same<T, __half>::value) {
    return bits_as<uint32_t>(__floats2half2_rn(a, b));
  } else {
    return bits_as<uint32_t>(__floats2bfloat162_rn(a, b));
  }
}

template <class T>
struct TableContext {
  const uint8_t* table;
  uint32_t column;  // the lane's
  __device__ __forceinline__ TableContext(const QkWeight&, bool, const uint8_t* table) : table(table), column(threadIdx.x % 32 * 4) {}
  __device__ __forceinline__ void rows(const QkWeight&, int64_t) {}
  __device__ __forceinline__ void columns(const QkWeight&, int) {}

  // By all of `threads`, whole warps: a warp writes an entry for every lane.
  static __device__ __forceinline__ void fill(const QkWeight& weight, uint8_t* table, int thread, int threads) {
    const float entry = __ldg(static_cast<const float*>(weight.table) + (thread & 15));
#pragma unroll 4
    for (int i = thread; i < 8192; i += threads) {
      const int both = i >> 5;
      reinterpret_cast<uint32_t*>(table)[i] =
          pack<T>(__shfl_sync(0xffffffffu, entry, both & 15), __shfl_sync(0xffffffffu, entry, both >> 4));
    }
    if (weight.format == QK_NF4N) {
      float* code = reinterpret_cast<float*>(table + PAIR_TABLE);
      for (int i = thread; i < 256; i += threads) code[i] = __ldg(static_cast<const float*>(weight.code) + i);
    }
  }

  __device__ __forceinline__ two_t<T> entry(uint32_t at) const {
    return *reinterpret_cast<const two_t<T>*>(table + and_or(at, 0x7f80u, column));
  }
  // The four pairs of a word of codes.
  __device__ __forceinline__ void look_up(uint32_t word, two_t<T> (&out)[4]) const {
    out[0] = entry(word << 7);
    out[1] = entry(word >> 1);
    out[2] = entry(word >> 9);
    out[3] = entry(word >> 17);
  }
};
template <class T>
struct Context<T, QK_NF4> : TableContext<T> {
  using TableContext<T>::TableContext;
};
template <class T>
struct Context<T, QK_NF4N> : TableContext<T> {
  int first[2];       // block of column 0 of the lane's two rows
  float outer[2][2];  // second-level scale, of each slab's each row
  float offset;
  __device__ __forceinline__ Context(const QkWeight& weight, bool mixed, const uint8_t* table)
      : TableContext<T>(weight, mixed, table) {}
  __device__ __forceinline__ float absmax(uint32_t c, int slab, int row) const {
    const float of_code = reinterpret_cast<const float*>(this->table + PAIR_TABLE)[c];
    return __fadd_rn(__fmul_rn(of_code, outer[slab][row]), offset);
  }
  __device__ __forceinline__ void rows(const QkWeight& weight, int64_t row) {
    const int64_t last = (weight.n + ROWS - 1) / ROWS - 1;  // as the tiles of what lies beyond are those of the last strip
    if (row / ROWS > last) row = last * ROWS + row % ROWS;
    offset = __ldg(static_cast<const float*>(weight.offsets) + row / ROWS);
    first[0] = static_cast<int>(weight.block0 + row * weight.block_row_stride);
    first[1] = first[0] + 8 * static_cast<int>(weight.block_row_stride);
  }
  __device__ __forceinline__ void columns(const QkWeight& weight, int block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      outer[i >> 1][i & 1] = __ldg(static_cast<const float*>(weight.absmax2) + ((first[i & 1] + block + (i >> 1)) >> 8));
    }
  }
};

// Two 16-bit scales as stored -> T, each twice. mixed: they are stored as the other type.
template <class T>
__device__ __forceinline__ void spread(uint32_t pair, bool mixed, two_t<T>& r0, two_t<T>& r1) {
  if (mixed) {
    if constexpr (std::is_same<T, __half>::value) {
      pair = bits_as<uint32_t>(__float22half2_rn(__bfloat1622float2(bits_as<__nv_bfloat162>(pair))));
    } else {
      pair = bits_as<uint32_t>(__float22bfloat162_rn(__half22float2(bits_as<__half2>(pair))));
    }
  }
  r0 = bits_as<two_t<T>>(__byte_perm(pair, 0, 0x1010));
  r1 = bits_as<two_t<T>>(__byte_perm(pair, 0, 0x3232));
}

__device__ __forceinline__ uint32_t word(const uint4& codes, int s) { return s == 0 ? codes.x : s == 1 ? codes.y : s == 2 ? codes.z : codes.w; }

// Where a lane finds its codes of half 0 in a tile, and its two rows in row order. Kept: the compiler would make them anew in each step.
template <int F, int G>
struct Place {
  int codes, rows;
  __device__ __forceinline__ Place(int w, int lane)
      : codes(F == QK_Q8_0 ? bytes_at(w, 0, 0, lane) : codes_at<Tile<F, G>::KC>(w, 0, lane)), rows(rows_at(w, lane)) {
    asm volatile("" : "+r"(codes), "+r"(rows));
  }
};
template <int F, int G>
__device__ __forceinline__ uint4 load_codes(const uint8_t* tile, const Place<F, G>& at, int h) {
  return *reinterpret_cast<const uint4*>(tile + at.codes + codes_at<Tile<F, G>::KC>(0, h, 0));
}

// INT4, INT4Z; the integer is exact, the product rounded once.
template <class T, int F, int G>
struct Slab {
  static_assert(F == QK_INT4 || F == QK_INT4Z, "the other formats have their own");
  using L = Tile<F, G>;
  static constexpr int PER = G < 64 ? 2 : 1;  // groups in a slab
  uint4 codes;
  two_t<T> r0[PER], r1[PER];  // scales
  uint32_t zeros[PER];

  __device__ __forceinline__ void load(const Context<T, F>& context, const uint8_t* tile, const Place<F, G>& place, int h, int) {
    codes = load_codes<F, G>(tile, place, h);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int j = (64 * h + 32 * i) / G;
      spread<T>(scale_pair<L>(tile, j, place.rows), context.mixed, r0[i], r1[i]);
      if constexpr (F == QK_INT4Z) zeros[i] = zero_pair<L>(tile, j, place.rows);
    }
  }

  __device__ __forceinline__ void values(const Context<T, F>&, int s, uint32_t (&fragment)[4]) const {
    const int i = s * PER / 4;
    two_t<T> q[4];
    unpack4(word(codes, s), F == QK_INT4Z ? Zeros<T>(zeros[i] & 0xff, zeros[i] >> 8) : Zeros<T>(8, 8), q);
#pragma unroll
    for (int p = 0; p < 4; ++p) fragment[p] = bits_as<uint32_t>(__hmul2(q[p], p & 1 ? r1[i] : r0[i]));
  }
};

// NF4, NF4N: table entry and product are each rounded once.
template <class T, int F, int G>
struct TableSlab {
  using L = Tile<F, G>;
  static constexpr int PER = L::GROUP < 64 ? 2 : 1;
  uint4 codes;
  Scale<T> scales[PER][2];

  __device__ __forceinline__ void load(const Context<T, F>& context, const uint8_t* tile, const Place<F, G>& place, int h, int slab) {
    codes = load_codes<F, G>(tile, place, h);
    if constexpr (F == QK_NF4) {
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const float2 absmax = absmax_pair<L>(tile, (64 * h + 32 * i) / L::GROUP, place.rows);
        scales[i][0].set(absmax.x);
        scales[i][1].set(absmax.y);
      }
    } else {
      const uint32_t c = absmax_codes<L>(tile, h, place.rows);
      scales[0][0].set(context.absmax(c & 0xff, slab, 0));
      scales[0][1].set(context.absmax(c >> 8, slab, 1));
    }
  }

  __device__ __forceinline__ void values(const Context<T, F>& context, int s, uint32_t (&fragment)[4]) const {
    two_t<T> t[4];
    context.look_up(word(codes, s), t);
#pragma unroll
    for (int p = 0; p < 4; ++p) fragment[p] = bits_as<uint32_t>(scales[s * PER / 4][p & 1].times(t[p]));
  }
};
template <class T, int G>
struct Slab<T, QK_NF4, G> : TableSlab<T, QK_NF4, G> {};
template <class T, int G>
struct Slab<T, QK_NF4N, G> : TableSlab<T, QK_NF4N, G> {};

// Q4_K, Q5_K: d sc q - dmin m = s (q - middle) + (middle s - dmin m), the latter small.
template <class T, int F, int G>
struct MinSlab {
  using L = Tile<F, G>;
  uint4 codes;
  uint32_t plane;
  Scale<T> scales[2][2], shifts[2][2];

  __device__ __forceinline__ void load(const Context<T, F>&, const uint8_t* tile, const Place<F, G>& place, int h, int) {
    codes = load_codes<F, G>(tile, place, h);
    if constexpr (F == QK_Q5_K) plane = *reinterpret_cast<const uint32_t*>(tile + L::PLANE_AT + place.codes / 4 + plane1_at<L::KC>(0, h, 0));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = place.rows + r;
      const uint32_t two = *reinterpret_cast<const uint32_t*>(tile + L::SCALES_AT + at * 16 + h * 4);  // sc, m, sc, m
      const float2 d = __half22float2(super_d<L>(tile, at));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float s = d.x * static_cast<float>((two >> 16 * i) & 0xff);
        scales[i][r].set(s);
        shifts[i][r].set((F == QK_Q5_K ? 16.0f : 8.0f) * s - d.y * static_cast<float>((two >> (16 * i + 8)) & 0xff));
      }
    }
  }

  __device__ __forceinline__ void values(const Context<T, F>&, int s, uint32_t (&fragment)[4]) const {
    two_t<T> q[4];
    if constexpr (F == QK_Q5_K) {
      unpack5(word(codes, s), plane, s, Zeros<T>(16, 16), q);
    } else {
      unpack4(word(codes, s), Zeros<T>(8, 8), q);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) fragment[p] = bits_as<uint32_t>(scales[s / 2][p & 1].times_plus(q[p], shifts[s / 2][p & 1]));
  }
};
template <class T, int G>
struct Slab<T, QK_Q4_K, G> : MinSlab<T, QK_Q4_K, G> {};
template <class T, int G>
struct Slab<T, QK_Q5_K, G> : MinSlab<T, QK_Q5_K, G> {};

template <class T, int G>
struct Slab<T, QK_Q6_K, G> {
  using L = Tile<QK_Q6_K, G>;
  uint4 codes;
  uint2 plane;
  uint32_t scales[2];  // four int8 + 128, one a step
  float d[2];

  __device__ __forceinline__ void load(const Context<T, QK_Q6_K>&, const uint8_t* tile, const Place<QK_Q6_K, G>& place, int h, int) {
    codes = load_codes<QK_Q6_K, G>(tile, place, h);
    plane = *reinterpret_cast<const uint2*>(tile + L::PLANE_AT + place.codes / 2 + plane2_at<L::KC>(0, h, 0));
    const int at = place.rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scales[r] = *reinterpret_cast<const uint32_t*>(tile + L::SCALES_AT + (at + r) * 16 + h * 4) ^ 0x80808080u;
    }
    const float2 two = __half22float2(six_d<L>(tile, at));
    d[0] = two.x;
    d[1] = two.y;
  }

  __device__ __forceinline__ void values(const Context<T, QK_Q6_K>&, int s, uint32_t (&fragment)[4]) const {
    Scale<T> scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // 2^23 + 128 + sc, less 2^23 + 128
      const float sc = __uint_as_float(__byte_perm(scales[r], 0x4b000000u, 0x7540 + s)) - 8388736.0f;
      scale[r].set(d[r] * sc);
    }
    two_t<T> q[4];
    unpack6(word(codes, s), s < 2 ? plane.x : plane.y, s, Zeros<T>(32, 32), q);
#pragma unroll
    for (int p = 0; p < 4; ++p) fragment[p] = bits_as<uint32_t>(scale[p & 1].times(q[p]));
  }
};

template <class T, int G>
struct Slab<T, QK_Q8_0, G> {
  using L = Tile<QK_Q8_0, G>;
  uint4 bytes[2];
  Scale<T> scales[2][2];

  __device__ __forceinline__ void load(const Context<T, QK_Q8_0>&, const uint8_t* tile, const Place<QK_Q8_0, G>& place, int h, int) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      bytes[u] = *reinterpret_cast<const uint4*>(tile + place.codes + bytes_at(0, h, u, 0));
      const float2 d = __half22float2(bits_as<__half2>(scale_pair<L>(tile, 2 * h + u, place.rows)));
      scales[u][0].set(d.x);
      scales[u][1].set(d.y);
    }
  }

  __device__ __forceinline__ void values(const Context<T, QK_Q8_0>&, int s, uint32_t (&fragment)[4]) const {
    const uint4 b = bytes[s / 2];
    two_t<T> q[4];
    unpack8(s & 1 ? make_uint2(b.z, b.w) : make_uint2(b.x, b.y), q);
#pragma unroll
    for (int p = 0; p < 4; ++p) fragment[p] = bits_as<uint32_t>(scales[s / 2][p & 1].times(q[p]));
  }
};

}  // namespace qk
