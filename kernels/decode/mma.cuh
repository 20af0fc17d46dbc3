// y = x W^T for few rows of x: tiles of W (tiles.cuh) go from memory to registers as codes, and mma.m16n8k16 multiplies the codes themselves.
//
// A code q becomes a number without arithmetic: as the bits of an fp16 subnormal it is q 2^-24 (row r0's) or 16 q 2^-24 (row r1's, whose
// nibbles lie 4 bits higher), as 0x4300 | q in bf16 it is 128 + q. Products of these with x are exact, their sums are float32, and a group's
// zero point leaves once per group: sum (q - z) x = sum q x - z sum x, where the accumulator starts from the second term. Sums of x per
// group are made when x enters shared memory. A group's scale multiplies its accumulators, in float32.
//
// A block is teams of WK warps; a team owns 16 RB rows of one strip of 64 at a time and its warps share the strip's tiles along K, each warp
// with its own ring of tiles in shared memory, filled by bulk copies (cp.async before sm_90) and emptied by the warp itself: no barrier in
// the main loop. At a strip's end the team's sums meet in shared memory. K may also be split over `splits` blocks, which meet in the
// shared memory of one another (a cluster) or in the workspace. x's columns of the block's part of K stay in shared memory.
#pragma once
#include <type_traits>

#include "tiles.cuh"

namespace qk {
namespace decode {

struct Args {
  QkWeight weight;
  const uint8_t* tiles;
  const void* x;
  const void* bias;
  void* y;
  float2* partial;     // workspace behind the counters
  uint32_t* counters;  // workspace
  int64_t ldx, m, n, k;
  int strips, k_tiles;
  int splits;     // blocks along K: the cluster, or the sharers of the workspace
  int teams;      // of a block, over strips
  int stages;     // tiles of a warp in flight
  int x_rows;     // rows of x in shared memory: a power of two below 8, or 8 NT
  int slice;      // tiles along K of the longest split
  int buffers;    // of the exchange in a cluster: 2, or 1 where a team has one strip
  bool cluster;   // splits meet in shared memory, else in the workspace
  bool dependent; // launched while the kernel before it may still run
  bool vectors;   // x may be read 16 bytes at a time
};

// Bytes of shared memory, in this order. All multiples of 16.
struct Shared {
  int ring, x, sums, reduce, exchange, barriers;
  __host__ __device__ int total() const { return ring + x + sums + reduce + exchange + barriers; }
};

template <class T_, int F_, int G_, int NT_, int RB_, int WK_>
struct Traits {
  using T = T_;
  using L = Tile<F_, G_>;
  static constexpr int F = F_;
  static constexpr int NT = NT_;  // 8-column tiles of x
  static constexpr int RB = RB_;  // 16-row blocks of a warp
  static constexpr int WK = WK_;  // warps of a team
  static constexpr int SETS = 4 / RB;
  static constexpr int UNITS = 2 * RB;      // of a team: 8 rows each
  static constexpr int OWN = UNITS / WK;    // units that a warp finishes
  static constexpr bool HALF = std::is_same<T, __half>::value;
  // Columns between two scalings: few enough that x's fragments of them fit in registers.
  static constexpr int FLUSH = L::GROUP < (NT == 8 ? 32 : 64) ? L::GROUP : (NT == 8 ? 32 : 64);
  static constexpr bool SUMS = F == QK_INT4 || F == QK_INT4Z;
  static_assert(OWN >= 1, "more warps in a team than units");
  // What the codes' products must be multiplied by: row r0, row r1.
  static constexpr float UNIT0 = HALF ? 16777216.f : 1.f, UNIT1 = HALF ? 1048576.f : 1.f;

  __host__ __device__ static Shared shared(int teams, int stages, int x_rows, int slice, int splits, int buffers, bool cluster) {
    const int warps = teams * SETS * WK;
    Shared s;
    s.ring = warps * stages * L::BYTES;
    s.x = slice * L::KC * x_rows * 2;
    s.sums = SUMS ? slice * (L::KC / FLUSH) * NT * 32 : 0;
    s.reduce = teams * SETS * UNITS * (WK - 1) * NT * 256;
    s.exchange = cluster ? teams * SETS * buffers * ((UNITS + splits - 1) / splits) * (splits - 1) * NT * 256 : 0;
    s.barriers = (warps * stages + (cluster ? teams * SETS * UNITS * 2 : 0)) * 8 + 8;
    s.barriers = (s.barriers + 15) / 16 * 16;
    return s;
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

__device__ __forceinline__ void team_barrier(int team, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(threads) : "memory");
}

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <class T>
__device__ __forceinline__ float2 pair_to_float(uint32_t pair) {
  if constexpr (std::is_same<T, __half>::value) {
    return __half22float2(bits_as<__half2>(pair));
  } else {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

template <class T>
__device__ __forceinline__ float to_float(T v) {
  return static_cast<float>(v);
}

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

// x's rows [row0, row0 + x_rows) and the block's columns into shared memory, as B fragments: for each 32 columns and row 64 bytes, of which
// lane % 4 = c takes 16: columns 2c, 2c + 8, 2c + 16, 2c + 24 and the next of each. The four lie at c ^ (row / 2 % 4), against bank conflicts.
template <class C>
__device__ void load_x(const Args& args, uint8_t* xs, float* sums, int64_t row0, int64_t column0, int columns) {
  using T = typename C::T;
  const T* x = static_cast<const T*>(args.x);
  const int tasks = (columns >> 6) * args.x_rows;
  const int log_rows = 31 - __clz(args.x_rows);
  for (int task = threadIdx.x; task < tasks; task += blockDim.x) {
    const int r = task & (args.x_rows - 1), chunk = task >> log_rows;
    if (row0 + r >= args.m) continue;
    const int64_t column = column0 + chunk * 64;
    const T* from = x + (row0 + r) * args.ldx + column;
    float total = 0.f;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint32_t v[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 32 * q + 8 * j;
        if (args.vectors && column + at + 8 <= args.k) {
          const uint4 u = *reinterpret_cast<const uint4*>(from + at);
          v[j][0] = u.x, v[j][1] = u.y, v[j][2] = u.z, v[j][3] = u.w;
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            uint32_t low = 0, high = 0;
            if (column + at + 2 * c < args.k) low = *reinterpret_cast<const uint16_t*>(from + at + 2 * c);
            if (column + at + 2 * c + 1 < args.k) high = *reinterpret_cast<const uint16_t*>(from + at + 2 * c + 1);
            v[j][c] = low | high << 16;
          }
        }
      }
      uint8_t* to = xs + ((chunk * 2 + q) * args.x_rows + r) * 64;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        *reinterpret_cast<uint4*>(to + ((c ^ (r >> 1 & 3)) << 4)) = make_uint4(v[0][c], v[1][c], v[2][c], v[3][c]);
      }
      if constexpr (C::SUMS) {
        float part[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float2 s = pair_to_float<T>(v[j][0]);
#pragma unroll
          for (int c = 1; c < 4; ++c) {
            const float2 f = pair_to_float<T>(v[j][c]);
            s.x += f.x, s.y += f.y;
          }
          part[j] = s.x + s.y;
        }
        total += (part[0] + part[1]) + (part[2] + part[3]);
        if (C::FLUSH == 32 || q == 1) {
          // Times what the zero point's unit is worth among the codes' products.
          const float unit = C::F == QK_INT4 ? (C::HALF ? -8.f / 16777216.f : -136.f) : (C::HALF ? -1.f / 16777216.f : -1.f);
          const int at = C::FLUSH == 32 ? chunk * 2 + q : chunk;
          sums[at * (8 * C::NT) + r] = total * unit;
          total = 0.f;
        }
      }
    }
  }
}

// One tile of the warp's ring times x, added to acc.
template <class C>
__device__ __forceinline__ void multiply_tile(const Args& args, const uint8_t* tile, const uint8_t* xs, const float* sums, int set, int lane,
                                              float (&acc)[C::RB][C::NT][4]) {
  using T = typename C::T;
  using L = typename C::L;
  constexpr int PARTS = 64 / C::FLUSH, STEPS = 4 / PARTS;
  const int q_stride = args.x_rows * 64;
#pragma unroll
  for (int h = 0; h < L::HALVES; ++h) {
    uint4 words[C::RB];
#pragma unroll
    for (int w = 0; w < C::RB; ++w) {
      words[w] = *reinterpret_cast<const uint4*>(tile + codes_at<L::KC>(set * C::RB + w, h, lane));
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int chunk = h * PARTS + part;
      const int group = chunk * C::FLUSH / L::GROUP;
      uint4 b[STEPS / 2][C::NT];
#pragma unroll
      for (int q = 0; q < STEPS / 2; ++q)
#pragma unroll
        for (int t = 0; t < C::NT; ++t) b[q][t] = *reinterpret_cast<const uint4*>(xs + (chunk * STEPS / 2 + q) * q_stride + t * 512);
      float2 sum[C::NT];
#pragma unroll
      for (int t = 0; t < C::NT; ++t) sum[t] = *reinterpret_cast<const float2*>(sums + (chunk * C::NT + t) * 8);
#pragma unroll
      for (int w = 0; w < C::RB; ++w) {
        const int at = rows_at(set * C::RB + w, lane);
        float d[C::NT][4];
        float z0 = 1.f, z1 = C::HALF ? 16.f : 1.f;
        if constexpr (C::F == QK_INT4Z) {
          const uint32_t zeros = zero_pair<L>(tile, group, at);
          // 0x4b000000 | z is 2^23 + z.
          const float base = C::HALF ? 8388608.f : 8388480.f;
          z0 = __uint_as_float(0x4b000000u | (zeros & 0xff)) - base;
          z1 = __uint_as_float(0x4b000000u | zeros >> 8) - base;
          if (C::HALF) z1 *= 16.f;
        }
#pragma unroll
        for (int t = 0; t < C::NT; ++t) {
          d[t][0] = sum[t].x * z0, d[t][1] = sum[t].y * z0, d[t][2] = sum[t].x * z1, d[t][3] = sum[t].y * z1;
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
          const int step = part * STEPS + s;
          const uint32_t word = step == 0 ? words[w].x : step == 1 ? words[w].y : step == 2 ? words[w].z : words[w].w;
          uint32_t a[4];
          codes_to_fragment<T>(word, a);
#pragma unroll
          for (int t = 0; t < C::NT; ++t) {
            const uint4 v = b[s >> 1][t];
            if (step & 1) {
              mma<T>(d[t], a, v.z, v.w);
            } else {
              mma<T>(d[t], a, v.x, v.y);
            }
          }
        }
        const uint32_t pair = scale_pair<L>(tile, group, at);
        const float2 scale = args.weight.scale_type == QK_FP16 ? pair_to_float<__half>(pair) : pair_to_float<__nv_bfloat16>(pair);
#pragma unroll
        for (int t = 0; t < C::NT; ++t) {
          acc[w][t][0] += scale.x * d[t][0], acc[w][t][1] += scale.x * d[t][1];
          acc[w][t][2] += scale.y * d[t][2], acc[w][t][3] += scale.y * d[t][3];
        }
      }
    }
  }
}

// The warp's ring: lane 0 (or, before sm_90, every lane) copies a tile into a slot.
template <class C>
__device__ __forceinline__ void fill(const uint8_t* from, uint8_t* slot, uint32_t barrier, int set, int lane, uint64_t policy) {
  using L = typename C::L;
  // A warp of RB < 4 needs its own rows' codes and planes, and all that follows them.
  constexpr int CODES = L::CODES / C::SETS, PLANE = L::PLANE / C::SETS, REST = L::BYTES - L::SCALES_AT;
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    const auto copy = [&](int at, int bytes) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                       shared_address(slot + at)),
                   "l"(from + at), "r"(bytes), "r"(barrier), "l"(policy)
                   : "memory");
    };
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(CODES + PLANE + REST) : "memory");
    if (C::SETS == 1) {
      copy(0, L::BYTES);
    } else {
      copy(set * CODES, CODES);
      if (PLANE) copy(L::PLANE_AT + set * PLANE, PLANE);
      copy(L::SCALES_AT, REST);
    }
  }
#else
  const auto copy = [&](int at, int bytes) {
    for (int i = lane * 16; i < bytes; i += 512) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot + at + i)), "l"(from + at + i) : "memory");
    }
  };
  if (C::SETS == 1) {
    copy(0, L::BYTES);
  } else {
    copy(set * CODES, CODES);
    if (PLANE) copy(L::PLANE_AT + set * PLANE, PLANE);
    copy(L::SCALES_AT, REST);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

template <class C>
__device__ __forceinline__ void store_unit(const Args& args, int64_t row, int64_t row0, int lane, float unit, const float2 (&v)[C::NT]) {
  using T = typename C::T;
  if (row >= args.n) return;
  const float bias = args.bias ? to_float(static_cast<const T*>(args.bias)[row]) : 0.f;
  T* y = static_cast<T*>(args.y);
#pragma unroll
  for (int t = 0; t < C::NT; ++t) {
    const int64_t m = row0 + t * 8 + 2 * (lane & 3);
    if (m < args.m) y[m * args.n + row] = static_cast<T>(v[t].x * unit + bias);
    if (m + 1 < args.m) y[(m + 1) * args.n + row] = static_cast<T>(v[t].y * unit + bias);
  }
}

template <class C, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) multiply(const __grid_constant__ Args args) {
  using L = typename C::L;
  extern __shared__ __align__(128) uint8_t memory[];
  const Shared sizes = C::shared(args.teams, args.stages, args.x_rows, args.slice, args.splits, args.buffers, args.cluster);
  uint8_t* const xs = memory + sizes.ring;
  float* const sums = reinterpret_cast<float*>(xs + sizes.x);
  uint8_t* const reduce = reinterpret_cast<uint8_t*>(sums) + sizes.sums;
  uint8_t* const exchange = reduce + sizes.reduce;
  const uint32_t barriers = shared_address(exchange + sizes.exchange);

  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int wk = warp % C::WK, team = warp / C::WK, set = team % C::SETS;
  const int split = blockIdx.x;
  const int strip_step = gridDim.y * args.teams;
  const int strip0 = blockIdx.y * args.teams + team / C::SETS;
  const int tile0 = split * args.k_tiles / args.splits, tile1 = (split + 1) * args.k_tiles / args.splits;
  const uint32_t full = barriers + warp * args.stages * 8;
  const int team_barriers = (C::SETS * args.teams) * C::WK * args.stages;  // the exchange's follow all rings'

  // The ring first: memory is busy while the rest is set up.
  uint8_t* const ring = memory + warp * args.stages * L::BYTES;
  if (lane == 0) {
#if __CUDA_ARCH__ >= 900
    for (int i = 0; i < args.stages; ++i) barrier_init(full + i * 8, 1);
#else
    for (int i = 0; i < args.stages; ++i) barrier_init(full + i * 8, 32);
#endif
    if (args.cluster && wk == 0) {
      for (int i = 0; i < C::UNITS * 2; ++i) barrier_init(barriers + (team_barriers + team * C::UNITS * 2 + i) * 8, 1);
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }
  __syncwarp();
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  int next_strip = strip0, next_tile = tile0 + wk;
  if (next_tile >= tile1) next_strip = args.strips;  // nothing along K for this warp
  const auto refill = [&](int slot) {
    if (next_strip >= args.strips) return;
    fill<C>(args.tiles + (static_cast<int64_t>(next_strip) * args.k_tiles + next_tile) * L::BYTES, ring + slot * L::BYTES, full + slot * 8, set,
            lane, policy);
    next_tile += C::WK;
    if (next_tile >= tile1) next_tile = tile0 + wk, next_strip += strip_step;
  };
  for (int i = 0; i < args.stages; ++i) refill(i);

#if __CUDA_ARCH__ >= 900
  if (args.cluster) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  if (args.dependent) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  const int64_t row0 = static_cast<int64_t>(blockIdx.z) * (8 * C::NT);
  load_x<C>(args, xs, sums, row0, static_cast<int64_t>(tile0) * L::KC, (tile1 - tile0) * L::KC);
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  if (args.cluster) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif

  const int x_row = (lane >> 2) & (args.x_rows - 1);
  const uint8_t* const my_x = xs + x_row * 64 + (((lane & 3) ^ (x_row >> 1 & 3)) << 4);
  const float* const my_sums = sums + 2 * (lane & 3);

  int slot = 0;
  uint32_t parity = 0;
  int turn = 0;  // strips done
  for (int strip = strip0; strip < args.strips; strip += strip_step, ++turn) {
    float acc[C::RB][C::NT][4];
#pragma unroll
    for (int w = 0; w < C::RB; ++w)
#pragma unroll
      for (int t = 0; t < C::NT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[w][t][i] = 0.f;

    for (int tile = tile0 + wk; tile < tile1; tile += C::WK) {
      barrier_wait(full + slot * 8, parity);
      const int at = tile - tile0;
      multiply_tile<C>(args, ring + slot * L::BYTES, my_x + at * (L::KC / 32) * args.x_rows * 64,
                       my_sums + at * (L::KC / C::FLUSH) * (8 * C::NT), set, lane, acc);
      __syncwarp();
      refill(slot);
      if (++slot == args.stages) slot = 0, parity ^= 1;
    }

    // The team's sums meet: a unit is 8 rows, and warp u / OWN finishes unit u.
    float2 own[C::OWN][C::NT];
#pragma unroll
    for (int u = 0; u < C::UNITS; ++u) {
      const bool mine = u / C::OWN == wk;
#pragma unroll
      for (int t = 0; t < C::NT; ++t) {
        const float2 v = make_float2(acc[u / 2][t][u % 2 * 2], acc[u / 2][t][u % 2 * 2 + 1]);
        if (mine) {
          own[u % C::OWN][t] = v;
        } else {
          const int source = wk - (wk > u / C::OWN);
          *reinterpret_cast<float2*>(reduce + ((((team * C::UNITS + u) * (C::WK - 1) + source) * C::NT + t) * 32 + lane) * 8) = v;
        }
      }
    }
    if (C::WK > 1) {
      team_barrier(team, C::WK * 32);
#pragma unroll
      for (int i = 0; i < C::OWN; ++i) {
        const int u = wk * C::OWN + i;
#pragma unroll
        for (int source = 0; source < C::WK - 1; ++source)
#pragma unroll
          for (int t = 0; t < C::NT; ++t) {
            const float2 v = *reinterpret_cast<const float2*>(
                reduce + ((((team * C::UNITS + u) * (C::WK - 1) + source) * C::NT + t) * 32 + lane) * 8);
            own[i][t].x += v.x, own[i][t].y += v.y;
          }
      }
      team_barrier(team, C::WK * 32);
    }

    const auto finish = [&](int u, const float2(&v)[C::NT]) {
      const int64_t row = static_cast<int64_t>(strip) * 64 + (set * C::UNITS + u) * 8 + (lane >> 2);
      store_unit<C>(args, row, row0, lane, u & 1 ? C::UNIT1 : C::UNIT0, v);
    };
    if (args.splits == 1) {
#pragma unroll
      for (int i = 0; i < C::OWN; ++i) finish(wk * C::OWN + i, own[i]);
    } else if (args.cluster) {
#if __CUDA_ARCH__ >= 900
      const int buffer = args.buffers == 2 ? turn & 1 : 0;
      const int owned = (C::UNITS + args.splits - 1) / args.splits;
      const auto place = [&](int u, int source) {
        return shared_address(exchange) + ((((team * args.buffers + buffer) * owned + u / args.splits) * (args.splits - 1) + source) * C::NT * 32 + lane) * 8;
      };
#pragma unroll
      for (int i = 0; i < C::OWN; ++i) {
        const int u = wk * C::OWN + i, owner = u % args.splits;
        if (owner == split) continue;
        uint32_t to, bar;
        const uint32_t local = place(u, split - (split > owner)), local_bar = barriers + (team_barriers + (team * C::UNITS + u) * 2 + buffer) * 8;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(local), "r"(owner));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar) : "r"(local_bar), "r"(owner));
#pragma unroll
        for (int t = 0; t < C::NT; ++t) {
          asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to + t * 256), "f"(own[i][t].x),
                       "f"(own[i][t].y), "r"(bar)
                       : "memory");
        }
      }
#pragma unroll
      for (int i = 0; i < C::OWN; ++i) {
        const int u = wk * C::OWN + i;
        if (u % args.splits != split) continue;
        const uint32_t bar = barriers + (team_barriers + (team * C::UNITS + u) * 2 + buffer) * 8;
        if (lane == 0) {
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"((args.splits - 1) * C::NT * 256) : "memory");
        }
        const uint32_t phase = args.buffers == 2 ? turn >> 1 & 1 : turn & 1;
        asm volatile(
            "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra "
            "again;\ndone:\n}" ::"r"(bar),
            "r"(phase)
            : "memory");
        float2 total[C::NT];
#pragma unroll
        for (int t = 0; t < C::NT; ++t) total[t] = make_float2(0.f, 0.f);
        for (int s = 0; s < args.splits; ++s) {  // in the order of K, so that every rank's sum is the same
#pragma unroll
          for (int t = 0; t < C::NT; ++t) {
            float2 v = own[i][t];
            if (s != split) {
              asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(place(u, s - (s > split)) + t * 256));
            }
            total[t].x += v.x, total[t].y += v.y;
          }
        }
        finish(u, total);
      }
#endif
    } else {
#pragma unroll
      for (int i = 0; i < C::OWN; ++i) {
        const int u = wk * C::OWN + i;
        const int64_t unit = (static_cast<int64_t>(blockIdx.z) * args.strips + strip) * 8 + set * C::UNITS + u;
        float2* const parts = args.partial + unit * args.splits * C::NT * 32 + lane;
#pragma unroll
        for (int t = 0; t < C::NT; ++t) __stcg(parts + (split * C::NT + t) * 32, own[i][t]);
        __threadfence();
        __syncwarp();
        uint32_t before = 0;
        if (lane == 0) before = atomicAdd(args.counters + unit, 1);
        before = __shfl_sync(0xffffffffu, before, 0);
        if (before != static_cast<uint32_t>(args.splits - 1)) continue;
        __threadfence();
        float2 total[C::NT];
#pragma unroll
        for (int t = 0; t < C::NT; ++t) total[t] = make_float2(0.f, 0.f);
        for (int s = 0; s < args.splits; ++s) {
#pragma unroll
          for (int t = 0; t < C::NT; ++t) {
            const float2 v = __ldcg(parts + (s * C::NT + t) * 32);
            total[t].x += v.x, total[t].y += v.y;
          }
        }
        finish(u, total);
        if (lane == 0) args.counters[unit] = 0;
      }
    }
  }
}

}  // namespace decode
}  // namespace qk
