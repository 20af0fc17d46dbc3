// y = x W^T for few rows of x: tiles of W (tiles.cuh) go from memory to registers as codes, and mma.m16n8k16 multiplies the codes themselves.
//
// A code q becomes a number without arithmetic: as the bits of an fp16 subnormal it is q 2^-24 (row r0's) or 16 q 2^-24 (row r1's, whose
// nibbles lie 4 bits higher), as 0x4300 | q in bf16 it is 128 + q. Products of these with x are exact, their sums are float32, and a group's
// zero point leaves once per group: sum (q - z) x = sum q x - z sum x. The second term is one more product, of a constant fragment with x,
// and where the sums of the first start from. A group's scale multiplies its sums, in float32.
//
// A block is teams of WK warps. A team owns 16 RB rows (an item: a strip of 64 rows or a part of it) at a time; its warps share the item's
// tiles along K, each warp with its own ring of tiles in shared memory, filled by bulk copies (cp.async before sm_90) and emptied by the
// warp itself: no barrier in the main loop. At an item's end the team's sums meet in shared memory. K may also be split over blocks, which
// meet in the shared memory of one another (a cluster) or in the workspace. x's columns of the block's part of K stay in shared memory, as
// rows, of which ldmatrix makes fragments.
#pragma once
#include <type_traits>

#include "tiles.cuh"

namespace qk {
namespace decode {

struct Args {
  QkWeight weight;
  const uint8_t* tiles;
  const uint8_t* x;
  const void* bias;
  void* y;
  float* partial;      // workspace behind the counters
  uint32_t* counters;  // workspace
  int64_t ldx, m, n, k;
  int items;       // of the matrix: strips times parts of a strip
  int k_tiles;
  int splits;      // blocks along K: a cluster (1 << log_splits), or the sharers of the workspace
  int log_splits;
  int teams;       // of a block
  int stages;      // tiles of a warp in flight
  int x_rows;      // rows of x in shared memory: at most 8 NT
  int slice;       // tiles along K of the longest split
  int buffers;     // of the exchange in a cluster: 2, or 1 where a team has one item
  bool cluster;    // splits meet in shared memory, else in the workspace
  bool dependent;  // launched while the kernel before it may still run
  bool vectors;    // x may be read 16 bytes at a time
  bool bf16;       // the type of x, bias and y
};

// Bytes of shared memory, in this order. All multiples of 16.
struct Shared {
  int table, ring, x, sums, exchange, scales, barriers;
  __host__ __device__ int total() const { return table + ring + x + sums + exchange + scales + barriers; }
};

template <class T_, int F_, int G_, int NT_, int RB_, int WK_>
struct Traits {
  using T = T_;
  using L = Tile<F_, G_>;
  static constexpr int F = F_;
  static constexpr int NT = NT_;  // 8-row tiles of x
  static constexpr int RB = RB_;  // 16-row blocks of a warp
  static constexpr int WK = WK_;  // warps of a team
  static constexpr int PARTS = 4 / RB;
  static constexpr bool HALF = std::is_same<T, __half>::value;
  static constexpr bool LOOKUP = F == QK_NF4 || F == QK_NF4N;
  static constexpr bool ZERO = F == QK_INT4 || F == QK_Q6_K || F == QK_Q8_0;        // one zero point for all
  static constexpr bool SUMS = F == QK_INT4Z || F == QK_Q4_K || F == QK_Q5_K;       // one for each group
  static constexpr bool KEEP = (ZERO || SUMS) && NT > 1;  // the sums of x, after a team's first item
  // What only fp16 can hold is multiplied in fp16; then bf16 x is converted, times a power of two for each row.
  static constexpr bool CONVERT = LOOKUP || F == QK_Q8_0;
  // Columns between two scalings: few enough that x's fragments of them fit in registers.
  static constexpr int FLUSH = L::GROUP < 64 ? L::GROUP : L::GROUP == 128 && NT <= 2 ? 128 : 64;
  static constexpr int SPAN = FLUSH == 128 ? 2 : 1;  // halves of codes loaded together
  // A slot of the ring: the item's rows of codes and planes, and all that follows them in the tile.
  static constexpr int CODES = L::CODES / PARTS, PLANE = L::PLANE / PARTS, REST = L::BYTES - L::SCALES_AT, SLOT = CODES + PLANE + REST;
  // An item's sums meet GT 8-row tiles of x at a time, so that a warp's fit its last slot: the floats of them that a thread finishes at a
  // time, how often it does in one of these groups, and in all.
  static constexpr int THREADS = 32 * WK, GT = NT < 2 ? NT : 2, GROUP_TOTAL = 128 * RB * GT, TOTAL = 128 * RB * NT;
  static constexpr int EACH = GROUP_TOTAL / THREADS >= 4 ? 4 : GROUP_TOTAL / THREADS >= 2 ? 2 : 1;
  static constexpr int ROUNDS = (GROUP_TOTAL + THREADS * EACH - 1) / (THREADS * EACH), ALL_ROUNDS = ROUNDS * (NT / GT);
  static_assert(GROUP_TOTAL * 4 <= SLOT, "");
  // What the codes' products must be multiplied by: row r0, row r1; and a zero point z as one of the codes, row r1's over row r0's.
  static constexpr float UNIT0 = HALF && !LOOKUP ? 16777216.f : 1.f;
  static constexpr float UNIT1 = !HALF || LOOKUP ? 1.f : F == QK_Q8_0 ? 16777216.f : 1048576.f;
  static constexpr float RATIO = UNIT0 / UNIT1;
  static constexpr int ZERO_POINT = F == QK_INT4 ? 8 : F == QK_Q6_K ? 32 : 128;
  static constexpr int TABLE = LOOKUP ? 32768 : 0, CODE = F == QK_NF4N ? 1024 : 0;

  __host__ __device__ static int x_chunks(int slice) { return (slice + WK - 1) / WK; }  // x comes in parts of WK tiles
  __host__ __device__ static int x_stride(int slice) { return slice * L::KC * 2 + 16; }  // 16: against bank conflicts

  __host__ __device__ static Shared shared(int teams, int stages, int x_rows, int slice, int splits, int buffers, bool cluster) {
    const int warps = teams * WK;
    Shared s;
    s.ring = warps * stages * SLOT;
    s.x = x_stride(slice) * x_rows;
    s.sums = KEEP ? slice * (L::KC / FLUSH) * NT * 32 : 0;
    s.exchange = cluster ? teams * buffers * (splits - 1) * ALL_ROUNDS * (THREADS / splits) * EACH * 4 : 0;
    s.table = TABLE + CODE;
    s.scales = CONVERT ? NT * 32 : 0;
    // The rings', x's, for each team two of the exchange, and words: one for each team, one for each warp.
    s.barriers = (warps * stages + x_chunks(slice) + teams * 2) * 8 + (teams + warps) * 4;
    s.barriers = (s.barriers + 15) / 16 * 16;
    return s;
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void team_barrier(int team, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(threads) : "memory");
}

// d = a b + c
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  if constexpr (std::is_same<T, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

__device__ __forceinline__ uint4 load_matrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

template <class T>
__device__ __forceinline__ float2 pair_to_float(uint32_t pair) {
  if constexpr (std::is_same<T, __half>::value) {
    return __half22float2(bits_as<__half2>(pair));
  } else {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

// float of an integer below 2^23, less `base`: exact.
__device__ __forceinline__ float small_float(uint32_t v, float base) { return __uint_as_float(0x4b000000u | v) - (8388608.f + base); }

// v d for a small integer v and an fp16 d: every step is exact, so that one multiply-add does it.
__device__ __forceinline__ float times_small(uint32_t v, float d) { return fmaf(__uint_as_float(0x4b000000u | v), d, -8388608.f * d); }
__device__ __forceinline__ float times_signed(int v, float d) { return fmaf(__int_as_float(0x4b400000 + v), d, -12582912.f * d); }

// Four A registers of one word of 4-bit codes.
template <class T>
__device__ __forceinline__ void codes_to_fragment(uint32_t word, uint32_t (&a)[4]) {
  if constexpr (std::is_same<T, __half>::value) {
    const uint32_t high = word >> 8;
    a[0] = word & 0x000f000fu;
    a[1] = word & 0x00f000f0u;
    a[2] = high & 0x000f000fu;
    a[3] = high & 0x00f000f0u;
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p) a[p] = and_or(word >> 4 * p, 0x000f000fu, 0x43004300u);
  }
}

// The high bits of 5- and 6-bit codes; `at`, their place in each nibble of the plane's word.
template <class T, int BITS>
__device__ __forceinline__ void add_plane(uint32_t plane, int at, uint32_t (&a)[4]) {
  constexpr uint32_t MASK = (BITS == 1 ? 0x00100010u : 0x00300030u);
  if constexpr (std::is_same<T, __half>::value) {
    const uint32_t p0 = plane << (4 - at), p1 = plane >> (4 + at);
    a[0] = and_or(p0, MASK, a[0]);
    a[1] = and_or(p0, MASK << 4, a[1]);
    a[2] = and_or(p1, MASK, a[2]);
    a[3] = and_or(p1, MASK << 4, a[3]);
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int from = 4 * p + at;
      a[p] = and_or(from < 4 ? plane << (4 - from) : plane >> (from - 4), MASK, a[p]);
    }
  }
}

// Q8_0: q + 128 as fp16 subnormals, of one unit in both rows.
__device__ __forceinline__ void bytes_to_fragment(uint2 bytes, uint32_t (&a)[4]) {
  const uint32_t words[2] = {bytes.x ^ 0x80808080u, bytes.y ^ 0x80808080u};
#pragma unroll
  for (int p = 0; p < 4; ++p) a[p] = __byte_perm(words[p >> 1], 0, p & 1 ? 0x4342 : 0x4140);
}

// NF4: both values of a pair in one look-up. The table has a column for each lane, so that no two lanes ask one bank: [256][32] half2.
__device__ __forceinline__ void look_up(uint32_t word, const uint8_t* table, uint32_t column, uint32_t (&a)[4]) {
  const auto entry = [&](uint32_t at) { return *reinterpret_cast<const uint32_t*>(table + and_or(at, 0x7f80u, column)); };
  a[0] = entry(word << 7);
  a[1] = entry(word >> 1);
  a[2] = entry(word >> 9);
  a[3] = entry(word >> 17);
}

template <class C>
__device__ void fill_table(const Args& args, uint8_t* table, int lane) {
  const float low = static_cast<const float*>(args.weight.table)[lane & 15];
  for (int i = threadIdx.x; i < 8192; i += blockDim.x) {  // a warp writes one entry for every lane
    const int entry = i >> 5;
    reinterpret_cast<__half2*>(table)[i] =
        __floats2half2_rn(__shfl_sync(0xffffffffu, low, entry & 15), __shfl_sync(0xffffffffu, low, entry >> 4));
  }
  if constexpr (C::CODE) {
    float* code = reinterpret_cast<float*>(table + C::TABLE);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) code[i] = static_cast<const float*>(args.weight.code)[i];
  }
}

// `rows` of x and the block's columns into shared memory. By one warp, which sets the barriers of x's parts: each is there when its barrier
// says so. What is left to fill_x are what 16 bytes at a time do not reach, and zeros beyond K.
template <class C>
__device__ void fetch_x(const Args& args, uint8_t* xs, uint32_t barrier, int64_t row0, int rows, int64_t column0, int columns, int lane) {
#if __CUDA_ARCH__ >= 900
  constexpr int CHUNK = C::WK * C::L::KC;
  const int stride = C::x_stride(args.slice), whole = static_cast<int>(args.k - column0 < columns ? args.k - column0 : columns) / 8 * 8;
  const uint8_t* from = args.x + (row0 * args.ldx + column0) * 2;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
#pragma unroll 1
  for (int c = 0; c < C::x_chunks(args.slice); ++c, barrier += 8) {
    const int bytes = max(min(whole - c * CHUNK, CHUNK), 0) * 2;
    if (lane == 0) barrier_expect(barrier, bytes * rows);
    if (bytes == 0) continue;
#pragma unroll 1
    for (int r = lane; r < rows; r += 32) {
      bulk_copy(shared_address(xs + r * stride + c * CHUNK * 2), from + (r * args.ldx + c * CHUNK) * 2, bytes, barrier, policy);
    }
  }
#endif
}

template <class C>
__device__ void fill_x(const Args& args, uint8_t* xs, int64_t row0, int rows, int64_t column0, int columns) {
  const int stride = C::x_stride(args.slice), real = static_cast<int>(args.k - column0 < columns ? args.k - column0 : columns);
  const uint8_t* from = args.x + (row0 * args.ldx + column0) * 2;
  int start = args.vectors && real > 0 ? real / 8 * 8 : 0;
#if __CUDA_ARCH__ < 900
  for (int r = 0; r < rows; ++r) {
    for (int i = threadIdx.x * 8; i < start; i += blockDim.x * 8) {
      *reinterpret_cast<uint4*>(xs + r * stride + i * 2) = *reinterpret_cast<const uint4*>(from + (r * args.ldx + i) * 2);
    }
  }
#endif
  if (start == columns) return;
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
#pragma unroll 1
    for (int i = start + threadIdx.x; i < columns; i += blockDim.x) {
      *reinterpret_cast<uint16_t*>(xs + r * stride + i * 2) = i < real ? *reinterpret_cast<const uint16_t*>(from + (r * args.ldx + i) * 2) : 0;
    }
  }
}

// bf16 rows in shared memory -> fp16, times 2^14 over the largest power of two in the row: all bits stay down to 2^-29 of it.
// scales[row]: the way back.
template <class C>
__device__ void convert_x(const Args& args, uint8_t* xs, float* scales, int columns, int lane) {
  const int stride = C::x_stride(args.slice), warps = blockDim.x >> 5;
  for (int r = threadIdx.x >> 5; r < args.x_rows; r += warps) {
    uint4* row = reinterpret_cast<uint4*>(xs + r * stride);
    uint32_t most = 0;
    for (int i = lane; i < columns / 8; i += 32) {
      const uint4 u = row[i];
      most = __vmaxu2(most, __vmaxu2(__vmaxu2(u.x & 0x7fff7fffu, u.y & 0x7fff7fffu), __vmaxu2(u.z & 0x7fff7fffu, u.w & 0x7fff7fffu)));
    }
    most = max(most & 0xffff, most >> 16);
    for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(0xffffffffu, most, o));
    const int exponent = max(static_cast<int>(most >> 7), 15);
    const float scale = __int_as_float((268 - exponent) << 23);
    if (lane == 0) scales[r] = __int_as_float((exponent - 14) << 23);
    const auto convert = [&](uint32_t pair) {
      const float2 f = pair_to_float<__nv_bfloat16>(pair);
      return bits_as<uint32_t>(__floats2half2_rn(f.x * scale, f.y * scale));
    };
    for (int i = lane; i < columns / 8; i += 32) {
      const uint4 u = row[i];
      row[i] = make_uint4(convert(u.x), convert(u.y), convert(u.z), convert(u.w));
    }
  }
}

template <class C>
__device__ __forceinline__ int nested_block(int lane) {
  return C::RB == 4 ? lane & 3 : C::RB == 2 ? lane >> 1 & 1 : 0;
}

// NF4N: the second-level scales lie outside the tiles; asked for before the tile has come. Lane c of a quad has row block c (of four), or
// c / 2 (of two): [block of 64 columns][row r0, row r1].
template <class C>
__device__ __forceinline__ void load_absmax2(const Args& args, int64_t row0, int tile, int lane, float (&absmax2)[2][2]) {
  const float* all = static_cast<const float*>(args.weight.absmax2);
  const int64_t row = row0 + nested_block<C>(lane) * 16 + (lane >> 2);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t block = args.weight.block0 + (row + 8 * i) * args.weight.block_row_stride + tile * 2;
    absmax2[0][i] = __ldg(all + (block >> 8));
    absmax2[1][i] = __ldg(all + ((block + 1) >> 8));
  }
}

// And the absmax that they and the tile's codes stand for.
template <class C>
__device__ __forceinline__ void load_nested(const uint8_t* rest, int row_at, const float* code, const float (&absmax2)[2][2], float offset,
                                            int lane, float (&nested)[2][2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t codes = absmax_codes<typename C::L>(rest, j, row_at + rows_at(nested_block<C>(lane), lane));
    nested[j][0] = code[codes & 0xff] * absmax2[j][0] + offset;
    nested[j][1] = code[codes >> 8] * absmax2[j][1] + offset;
  }
}

// A slot of the ring times x, added to acc. `rest`: where the tile would start for its scales to lie where they are; x: the lane's ldmatrix
// addresses, to which x_at, the tile's columns, is added.
template <class C>
__device__ __forceinline__ void multiply_tile(const Args& args, const uint8_t* slot, const uint8_t* rest, int row_at, const uint32_t (&x)[C::NT], int x_at,
                                              float* sums, bool first, const uint8_t* table, const float (&nested)[2][2], int lane, float (&acc)[C::RB][C::NT][4]) {
  using T = typename C::T;
  using L = typename C::L;
  constexpr int PIECE = C::FLUSH < 32 ? 32 : C::FLUSH;  // columns of x in registers
  constexpr int STEPS = C::FLUSH / 16;
  // The constant fragment: minus the zero point in the codes' units, or minus one.
  constexpr uint32_t Z = C::ZERO ? C::ZERO_POINT : 1;
  constexpr uint32_t Z0 = C::HALF ? 0x80008000u | Z * 0x00010001u : 0u, Z1 = C::HALF ? 0x80008000u | Z * 0x00010001u * static_cast<uint32_t>(C::RATIO) : 0u;
  uint32_t zero[4] = {Z0, C::ZERO ? Z1 : Z0, Z0, C::ZERO ? Z1 : Z0};
  if constexpr (!C::HALF) {
    const uint32_t z = C::ZERO ? (C::ZERO_POINT == 8 ? 0xc308c308u : 0xc320c320u) : 0xbf80bf80u;  // -136, -160, -1
    zero[0] = zero[1] = zero[2] = zero[3] = z;
  }
  const float none[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int span = 0; span < L::HALVES; span += C::SPAN) {
    uint4 words[C::RB][C::SPAN];
    if constexpr (C::F != QK_Q8_0) {
#pragma unroll
      for (int w = 0; w < C::RB; ++w)
#pragma unroll
        for (int h = 0; h < C::SPAN; ++h) words[w][h] = *reinterpret_cast<const uint4*>(slot + codes_at<L::KC>(w, span + h, lane));
    }
#pragma unroll
    for (int piece = 0; piece < 64 * C::SPAN / PIECE; ++piece) {
      uint4 b[PIECE / 32][C::NT];
#pragma unroll
      for (int q = 0; q < PIECE / 32; ++q)
#pragma unroll
        for (int t = 0; t < C::NT; ++t) b[q][t] = load_matrices(x[t] + x_at + (span * 64 + piece * PIECE + q * 32) * 2);
      const auto fragment = [&](int step_of_piece, int t, uint32_t& b0, uint32_t& b1) {
        const uint4 v = b[step_of_piece >> 1][t];
        b0 = step_of_piece & 1 ? v.z : v.x;
        b1 = step_of_piece & 1 ? v.w : v.y;
      };
#pragma unroll
      for (int part = 0; part < PIECE / C::FLUSH; ++part) {
        const int group = (span * 64 + piece * PIECE + part * C::FLUSH) / L::GROUP;
        float sum[C::NT][4];
        if constexpr (C::ZERO || C::SUMS) {
          // The same warp has the same tiles in every item: it makes their sums once.
          float* const kept = sums + ((span * 64 + piece * PIECE) / C::FLUSH + part) * (8 * C::NT) + 2 * (lane & 3);
          if (!C::KEEP || first) {
#pragma unroll
            for (int t = 0; t < C::NT; ++t) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
              uint32_t b0, b1;
              fragment(part * STEPS + s, t, b0, b1);
              if (s == 0) {
                mma<T>(sum[t], zero, b0, b1, none);
              } else {
                mma<T>(sum[t], zero, b0, b1, sum[t]);
              }
            }
              if (C::KEEP && lane < 4) *reinterpret_cast<float2*>(kept + t * 8) = make_float2(sum[t][0], sum[t][1]);
            }
          } else {
#pragma unroll
            for (int t = 0; t < C::NT; ++t) {
              const float2 both = *reinterpret_cast<const float2*>(kept + t * 8);
              sum[t][0] = both.x, sum[t][1] = both.y;
              if constexpr (C::ZERO) sum[t][2] = both.x * C::RATIO, sum[t][3] = both.y * C::RATIO;
            }
          }
        }
#pragma unroll
        for (int w = 0; w < C::RB; ++w) {
          const int at = row_at + rows_at(w, lane);
          float d[C::NT][4];
          if constexpr (C::F == QK_INT4Z) {
            const uint32_t zeros = zero_pair<L>(rest, group, at);
            const float z0 = small_float(zeros & 0xff, C::HALF ? 0.f : -128.f), z1 = small_float(zeros >> 8, C::HALF ? 0.f : -128.f) * C::RATIO;
#pragma unroll
            for (int t = 0; t < C::NT; ++t) {
              d[t][0] = sum[t][0] * z0, d[t][1] = sum[t][1] * z0, d[t][2] = sum[t][0] * z1, d[t][3] = sum[t][1] * z1;
            }
          }
#pragma unroll
          for (int s = 0; s < STEPS; ++s) {
            const int in_span = (piece * PIECE + part * C::FLUSH) / 16 + s, step = in_span & 3, h = span + (in_span >> 2);
            uint32_t a[4];
            if constexpr (C::F == QK_Q8_0) {
              bytes_to_fragment(*reinterpret_cast<const uint2*>(slot + bytes_at(w, h, step >> 1, lane) + (step & 1) * 8), a);
            } else {
              const uint4& four = words[w][in_span >> 2];
              const uint32_t word = step == 0 ? four.x : step == 1 ? four.y : step == 2 ? four.z : four.w;
              if constexpr (C::LOOKUP) {
                look_up(word, table, lane * 4, a);
              } else {
                codes_to_fragment<T>(word, a);
              }
              if constexpr (C::F == QK_Q5_K) {
                add_plane<T, 1>(*reinterpret_cast<const uint32_t*>(slot + C::CODES + plane1_at<L::KC>(w, h, lane)), step, a);
              } else if constexpr (C::F == QK_Q6_K) {
                const uint2 plane = *reinterpret_cast<const uint2*>(slot + C::CODES + plane2_at<L::KC>(w, h, lane));
                add_plane<T, 2>(step < 2 ? plane.x : plane.y, 2 * (step & 1), a);
              }
            }
#pragma unroll
            for (int t = 0; t < C::NT; ++t) {
              uint32_t b0, b1;
              fragment(part * STEPS + s, t, b0, b1);
              if (s > 0 || C::F == QK_INT4Z) {
                mma<T>(d[t], a, b0, b1, d[t]);
              } else if constexpr (C::ZERO) {
                mma<T>(d[t], a, b0, b1, sum[t]);
              } else {
                mma<T>(d[t], a, b0, b1, none);
              }
            }
          }
          float2 scale, minimum;
          if constexpr (C::F == QK_INT4 || C::F == QK_INT4Z) {
            const uint32_t pair = scale_pair<L>(rest, group, at);
            scale = args.weight.scale_type == QK_FP16 ? pair_to_float<__half>(pair) : pair_to_float<__nv_bfloat16>(pair);
          } else if constexpr (C::F == QK_Q8_0) {
            scale = pair_to_float<__half>(scale_pair<L>(rest, group, at));
          } else if constexpr (C::F == QK_NF4) {
            scale = absmax_pair<L>(rest, group, at);
          } else if constexpr (C::F == QK_NF4N) {
            const int from = (lane & ~3) | (C::RB == 4 ? w : C::RB == 2 ? 2 * w : 0);
            scale.x = __shfl_sync(0xffffffffu, nested[group][0], from);
            scale.y = __shfl_sync(0xffffffffu, nested[group][1], from);
          } else if constexpr (C::F == QK_Q6_K) {
            const float2 both = pair_to_float<__half>(bits_as<uint32_t>(six_d<L>(rest, at)));
            scale.x = times_signed(six_scale<L>(rest, group, at), both.x);
            scale.y = times_signed(six_scale<L>(rest, group, at + 1), both.y);
          } else {
            const uint32_t m0 = super_scale<L>(rest, group, at), m1 = super_scale<L>(rest, group, at + 1);
            const float2 d0 = __half22float2(super_d<L>(rest, at)), d1 = __half22float2(super_d<L>(rest, at + 1));
            scale.x = times_small(m0 & 0xff, d0.x), scale.y = times_small(m1 & 0xff, d1.x);
            minimum.x = times_small(m0 >> 8, d0.y), minimum.y = times_small(m1 >> 8, d1.y * C::RATIO);
            if constexpr (!C::HALF) minimum.x += 128.f * scale.x, minimum.y += 128.f * scale.y;
          }
#pragma unroll
          for (int t = 0; t < C::NT; ++t) {
            acc[w][t][0] += scale.x * d[t][0], acc[w][t][1] += scale.x * d[t][1];
            acc[w][t][2] += scale.y * d[t][2], acc[w][t][3] += scale.y * d[t][3];
            if constexpr (C::F == QK_Q4_K || C::F == QK_Q5_K) {
              acc[w][t][0] += minimum.x * sum[t][0], acc[w][t][1] += minimum.x * sum[t][1];
              acc[w][t][2] += minimum.y * sum[t][0], acc[w][t][3] += minimum.y * sum[t][1];
            }
          }
        }
      }
    }
  }
}

// An item's rows of a tile into a slot of the ring: by one thread, or before sm_90 by the warp.
template <class C>
__device__ __forceinline__ void fill(const Args& args, int item, int tile, uint8_t* slot, uint32_t barrier, int lane, uint64_t policy) {
  using L = typename C::L;
  const uint8_t* from = args.tiles + (static_cast<int64_t>(item / C::PARTS) * args.k_tiles + tile) * L::BYTES;
  const int part = item % C::PARTS;
#if __CUDA_ARCH__ >= 900
  const uint32_t to = shared_address(slot);
  barrier_expect(barrier, C::SLOT);
  if (C::PARTS == 1) {
    bulk_copy(to, from, C::SLOT, barrier, policy);
  } else {
    bulk_copy(to, from + part * C::CODES, C::CODES, barrier, policy);
    if (C::PLANE) bulk_copy(to + C::CODES, from + L::PLANE_AT + part * C::PLANE, C::PLANE, barrier, policy);
    bulk_copy(to + C::CODES + C::PLANE, from + L::SCALES_AT, C::REST, barrier, policy);
  }
#else
  const auto copy = [&](int to, int at, int bytes) {
    for (int i = lane * 16; i < bytes; i += 512) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot + to + i)), "l"(from + at + i) : "memory");
    }
  };
  copy(0, part * C::CODES, C::CODES);
  if (C::PLANE) copy(C::CODES, L::PLANE_AT + part * C::PLANE, C::PLANE);
  copy(C::CODES + C::PLANE, L::SCALES_AT, C::REST);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Sums [p, p + EACH) of a group of an item, in the order (row block, 8-row tile of x, lane, register of the fragment), to y.
template <class C, class T>
__device__ __forceinline__ void store_as(const Args& args, int64_t item_row, int64_t row0, int p, const float (&v)[C::EACH]) {
  const int i = p & 3, lane = p >> 2 & 31, t = (p >> 7) % C::GT, w = (p >> 7) / C::GT;
#pragma unroll
  for (int e = 0; e < C::EACH; ++e) {
    const int r = (i + e) >> 1;
    const int64_t row = item_row + w * 16 + r * 8 + (lane >> 2), m = row0 + t * 8 + 2 * (lane & 3) + ((i + e) & 1);
    if (row >= args.n || m >= args.m) continue;
    const float bias = args.bias ? static_cast<float>(static_cast<const T*>(args.bias)[row]) : 0.f;
    static_cast<T*>(args.y)[m * args.n + row] = static_cast<T>(v[e] * (r ? C::UNIT1 : C::UNIT0) + bias);
  }
}

template <class C>
__device__ __forceinline__ void store(const Args& args, int64_t item_row, int64_t row0, int group_row, int p, const float (&v)[C::EACH]) {
  row0 += group_row;
  if constexpr (!C::CONVERT) {
    store_as<C, typename C::T>(args, item_row, row0, p, v);
  } else if (args.bf16) {
    store_as<C, __nv_bfloat16>(args, item_row, row0, p, v);
  } else {
    store_as<C, __half>(args, item_row, row0, p, v);
  }
}

template <int EACH>
__device__ __forceinline__ void add_shared(const uint8_t* from, float (&v)[EACH]) {
  if constexpr (EACH == 4) {
    const float4 u = *reinterpret_cast<const float4*>(from);
    v[0] += u.x, v[1] += u.y, v[2] += u.z, v[3] += u.w;
  } else if constexpr (EACH == 2) {
    const float2 u = *reinterpret_cast<const float2*>(from);
    v[0] += u.x, v[1] += u.y;
  } else {
    v[0] += *reinterpret_cast<const float*>(from);
  }
}

template <class C, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 1) multiply(const __grid_constant__ Args args) {
  using L = typename C::L;
  extern __shared__ __align__(128) uint8_t memory[];
  const Shared sizes = C::shared(args.teams, args.stages, args.x_rows, args.slice, args.splits, args.buffers, args.cluster);
  uint8_t* const table = memory;  // first, so that its address is known when compiling
  uint8_t* const xs = memory + C::TABLE + C::CODE + sizes.ring;
  float* const sums = reinterpret_cast<float*>(xs + sizes.x);
  uint8_t* const after = xs + sizes.x + sizes.sums;
  float* const scales = reinterpret_cast<float*>(after + sizes.exchange);
  uint8_t* const control = after + sizes.exchange + sizes.scales;
  const uint32_t barriers = shared_address(control);

  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int wk = warp % C::WK, team = warp / C::WK;
  const int split = blockIdx.x;
  const int item_step = gridDim.y * args.teams, item0 = team * gridDim.y + blockIdx.y;  // so that all blocks have as many, give or take one
  const int tile0 = split * args.k_tiles / args.splits, tile1 = (split + 1) * args.k_tiles / args.splits;
  const uint32_t full = barriers + warp * args.stages * 8;
  const uint32_t x_full = barriers + args.teams * C::WK * args.stages * 8;
  const uint32_t met = x_full + (C::x_chunks(args.slice) + team * 2) * 8;  // the exchange's
  // Words: for each team one of the workspace's, and where its warps leave their sums, from the start of shared memory.
  int* const word = reinterpret_cast<int*>(control + (met - barriers) + (args.teams - team) * 16) + team;
  int* const places = word + (args.teams - team) + team * C::WK;

  const int64_t row0 = static_cast<int64_t>(blockIdx.z) * (8 * C::NT);
  const int x_rows = args.m - row0 < args.x_rows ? static_cast<int>(args.m - row0) : args.x_rows, columns = (tile1 - tile0) * L::KC;
  const bool fetcher = args.vectors && threadIdx.x >= blockDim.x - 32;  // the last warp brings x

  // The rings first: memory is busy while the rest is set up.
  uint8_t* const ring = memory + C::TABLE + C::CODE + warp * args.stages * C::SLOT;
  const int per_item = (tile1 - tile0 - wk + C::WK - 1) / C::WK;  // tiles of this warp
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  if (lane < args.stages) barrier_init(full + lane * 8, 1);
  if (lane == 0 && wk == 0) barrier_init(met, 1), barrier_init(met + 8, 1);
  if (fetcher) {
#pragma unroll 1
    for (int i = lane; i < C::x_chunks(args.slice); i += 32) barrier_init(x_full + i * 8, 1);
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
  if (fetcher && !args.dependent) fetch_x<C>(args, xs, x_full, row0, x_rows, static_cast<int64_t>(tile0) * L::KC, columns, lane);
  if (lane < args.stages && per_item > 0) {  // each lane fills a slot
    const int before = lane / per_item, item = item0 + before * item_step;
    if (item < args.items) {
      fill<C>(args, item, tile0 + wk + (lane - before * per_item) * C::WK, ring + lane * C::SLOT, full + lane * 8, lane, policy);
    }
  }
#else
  if (lane < args.stages) barrier_init(full + lane * 8, 32);
#endif
  __syncwarp();
  int next_item = args.items, next_tile = 0;
  if (per_item > 0) {
    next_item = item0 + args.stages / per_item * item_step;
    next_tile = tile0 + wk + args.stages % per_item * C::WK;
  }
  const auto refill = [&](int slot) {
    if (next_item >= args.items) return;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) fill<C>(args, next_item, next_tile, ring + slot * C::SLOT, full + slot * 8, lane, policy);
#else
    fill<C>(args, next_item, next_tile, ring + slot * C::SLOT, full + slot * 8, lane, policy);
#endif
    next_tile += C::WK;
    if (next_tile >= tile1) next_tile = tile0 + wk, next_item += item_step;
  };
#if __CUDA_ARCH__ < 900
  if (per_item > 0) next_item = item0, next_tile = tile0 + wk;
  for (int i = 0; i < args.stages; ++i) refill(i);
#endif

  if constexpr (C::LOOKUP) fill_table<C>(args, table, lane);
#if __CUDA_ARCH__ >= 900
  if (args.cluster) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  if (args.dependent) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  if (fetcher && args.dependent) fetch_x<C>(args, xs, x_full, row0, x_rows, static_cast<int64_t>(tile0) * L::KC, columns, lane);
  fill_x<C>(args, xs, row0, x_rows, static_cast<int64_t>(tile0) * L::KC, columns);
  __syncthreads();
  if constexpr (C::CONVERT) {
    if (args.bf16) {
#if __CUDA_ARCH__ >= 900
      for (int i = 0; i < C::x_chunks(args.slice); ++i) {
        if (args.vectors) barrier_wait(x_full + i * 8, 0);
      }
#endif
      convert_x<C>(args, xs, scales, columns, lane);
      __syncthreads();
    }
  }
#if __CUDA_ARCH__ >= 900
  if (args.cluster) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif

  // The lane's row for ldmatrix; rows that x does not have repeat one that it has: they only reach sums that nobody stores.
  uint32_t x[C::NT];
#pragma unroll
  for (int t = 0; t < C::NT; ++t) {
    const int r = min(t * 8 + (lane & 7), args.x_rows - 1);
    x[t] = shared_address(xs) + r * C::x_stride(args.slice) + (lane >> 3) * 16;
  }

  int slot = 0, turn = 0;  // turn: items done
  uint32_t parity = 0;
  for (int item = item0; item < args.items; item += item_step, ++turn) {
    const int row_at = item % C::PARTS * (16 * C::RB);  // the item's rows in the sections that have something for every row
    const int64_t item_row = static_cast<int64_t>(item) * (16 * C::RB);
    float offset = 0.f;
    if constexpr (C::F == QK_NF4N) offset = __ldg(static_cast<const float*>(args.weight.offsets) + item / C::PARTS);
    float acc[C::RB][C::NT][4];
#pragma unroll
    for (int w = 0; w < C::RB; ++w)
#pragma unroll
      for (int t = 0; t < C::NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[w][t][i] = 0.f;

    uint8_t* last = ring;  // a slot that is free
    for (int tile = tile0 + wk, i = 0; tile < tile1; tile += C::WK, ++i) {
      uint8_t* const here = ring + slot * C::SLOT;
      float nested[2][2], absmax2[2][2];
      if constexpr (C::F == QK_NF4N) load_absmax2<C>(args, item_row, tile, lane, absmax2);
      const uint8_t* const rest = here + C::CODES + C::PLANE - L::SCALES_AT;
#if __CUDA_ARCH__ >= 900
      if (turn == 0 && args.vectors) barrier_wait(x_full + i * 8, 0);
#endif
      barrier_wait(full + slot * 8, parity);
      if constexpr (C::F == QK_NF4N) load_nested<C>(rest, row_at, reinterpret_cast<const float*>(table + C::TABLE), absmax2, offset, lane, nested);
      multiply_tile<C>(args, here, rest, row_at, x, (tile - tile0) * (L::KC * 2),
                       sums + (tile - tile0) * (L::KC / C::FLUSH) * (8 * C::NT), turn == 0, table, nested, lane, acc);
      __syncwarp();
      if (C::WK == 1 || tile + C::WK < tile1) {
        refill(slot);
      } else {
        last = here;
      }
      if (++slot == args.stages) slot = 0, parity ^= 1;
    }

    // The team's sums meet, each warp's in the slot that it emptied last and has not filled again.
    const int id = wk * 32 + lane;
    float v[C::ALL_ROUNDS][C::EACH];
    if constexpr (C::WK == 1) {
#pragma unroll
      for (int round = 0; round < C::ALL_ROUNDS; ++round)
#pragma unroll
        for (int e = 0; e < C::EACH; ++e) {
          const int group = round / C::ROUNDS, q = round % C::ROUNDS;
          v[round][e] = acc[q / C::GT][group * C::GT + q % C::GT][e];
        }
    } else {
      const bool more = item + item_step < args.items;
      if (lane == 0) places[wk] = static_cast<int>(last - memory);
#pragma unroll
      for (int group = 0; group < C::NT / C::GT; ++group) {
        if (group) team_barrier(team, C::THREADS);
#pragma unroll
        for (int w = 0; w < C::RB; ++w)
#pragma unroll
          for (int t = 0; t < C::GT; ++t) {
            const float(&a)[4] = acc[w][group * C::GT + t];
            *reinterpret_cast<float4*>(last + ((w * C::GT + t) * 32 + lane) * 16) = make_float4(a[0], a[1], a[2], a[3]);
          }
        team_barrier(team, C::THREADS);
        const uint8_t* from[C::WK];
#pragma unroll
        for (int source = 0; source < C::WK; ++source) from[source] = memory + places[source];
#pragma unroll
        for (int round = 0; round < C::ROUNDS; ++round) {
          const int p = (round * C::THREADS + id) * C::EACH;
          float(&sum)[C::EACH] = v[group * C::ROUNDS + round];
#pragma unroll
          for (int e = 0; e < C::EACH; ++e) sum[e] = 0.f;
          if (C::GROUP_TOTAL >= C::THREADS * C::EACH || p < C::GROUP_TOTAL) {
#pragma unroll
            for (int source = 0; source < C::WK; ++source) add_shared<C::EACH>(from[source] + p * 4, sum);
          }
        }
      }
      if (more) {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
        team_barrier(team, C::THREADS);
        if (per_item > 0) refill(slot == 0 ? args.stages - 1 : slot - 1);
      }
    }
    if constexpr (C::CONVERT) {
      if (args.bf16) {
#pragma unroll
        for (int round = 0; round < C::ALL_ROUNDS; ++round) {
          const int p = (round % C::ROUNDS * C::THREADS + id) * C::EACH;
          const int m = (round / C::ROUNDS * C::GT + (p >> 7) % C::GT) * 8 + 2 * (p >> 2 & 3);
#pragma unroll
          for (int e = 0; e < C::EACH; ++e) v[round][e] *= scales[m + ((p + e) & 1)];
        }
      }
    }

    const auto finish = [&](int round, const float(&total)[C::EACH]) {
      const int p = (round % C::ROUNDS * C::THREADS + id) * C::EACH;
      if (C::GROUP_TOTAL >= C::THREADS * C::EACH || p < C::GROUP_TOTAL) store<C>(args, item_row, row0, round / C::ROUNDS * (C::GT * 8), p, total);
    };
    if (args.splits == 1) {
#pragma unroll
      for (int round = 0; round < C::ALL_ROUNDS; ++round) finish(round, v[round]);
    } else if (args.cluster) {
#if __CUDA_ARCH__ >= 900
      const int buffer = args.buffers == 2 ? turn & 1 : 0;
      const int share = C::THREADS >> args.log_splits, owner = id / share;  // threads that finish for one block
      const uint32_t barrier = met + buffer * 8;
      // [team][buffer][source][round][thread of the share][EACH]
      const auto place = [&](int source, int round) {
        return after + ((((team * args.buffers + buffer) * (args.splits - 1) + source) * C::ALL_ROUNDS + round) * share + id % share) * (C::EACH * 4);
      };
      if (owner != split) {
        uint32_t there;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(barrier), "r"(owner));
#pragma unroll
        for (int round = 0; round < C::ALL_ROUNDS; ++round) {
          uint32_t to;
          asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(place(split - (split > owner), round))), "r"(owner));
          if constexpr (C::EACH == 4) {
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                         "f"(v[round][0]), "f"(v[round][1]), "f"(v[round][2]), "f"(v[round][3]), "r"(there)
                         : "memory");
          } else if constexpr (C::EACH == 2) {
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(v[round][0]),
                         "f"(v[round][1]), "r"(there)
                         : "memory");
          } else {
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v[round][0]), "r"(there)
                         : "memory");
          }
        }
      } else {
        if (id % share == 0) barrier_expect(barrier, (args.splits - 1) * C::ALL_ROUNDS * share * C::EACH * 4);
        const uint32_t phase = args.buffers == 2 ? turn >> 1 & 1 : turn & 1;
        asm volatile(
            "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra "
            "again;\ndone:\n}" ::"r"(barrier),
            "r"(phase)
            : "memory");
#pragma unroll
        for (int round = 0; round < C::ALL_ROUNDS; ++round) {
#pragma unroll 1
          for (int source = 0; source < args.splits - 1; ++source) add_shared<C::EACH>(place(source, round), v[round]);
          finish(round, v[round]);
        }
      }
#endif
    } else {
      const int64_t index = static_cast<int64_t>(blockIdx.z) * args.items + item;
      constexpr int PART = C::ALL_ROUNDS * C::THREADS * C::EACH;  // [round][thread][EACH]
      float* const parts = args.partial + index * args.splits * PART;
#pragma unroll
      for (int round = 0; round < C::ALL_ROUNDS; ++round)
#pragma unroll
        for (int e = 0; e < C::EACH; ++e) __stcg(parts + split * PART + (round * C::THREADS + id) * C::EACH + e, v[round][e]);
      __threadfence();
      team_barrier(team, C::THREADS);
      uint32_t before = 0;
      if (id == 0) {
        before = atomicAdd(args.counters + index, 1);
        if (before == static_cast<uint32_t>(args.splits - 1)) args.counters[index] = 0;
        *word = static_cast<int>(before);
      }
      team_barrier(team, C::THREADS);
      before = static_cast<uint32_t>(*word);
      if (before == static_cast<uint32_t>(args.splits - 1)) {
        __threadfence();
#pragma unroll
        for (int round = 0; round < C::ALL_ROUNDS; ++round) {
          float total[C::EACH];
#pragma unroll
          for (int e = 0; e < C::EACH; ++e) total[e] = 0.f;
#pragma unroll 4
          for (int s = 0; s < args.splits; ++s)
#pragma unroll
            for (int e = 0; e < C::EACH; ++e) total[e] += __ldcg(parts + s * PART + (round * C::THREADS + id) * C::EACH + e);
          finish(round, total);
        }
      }
    }
  }
}

}  // namespace decode
}  // namespace qk
