// y = x W^T by wgmma, for tens to thousands of rows of x. A block holds WGS consumer warpgroups, each with 64 rows of W, and a producer
// warpgroup. Two of its warps keep two rings in shared memory full: tiles of W (one bulk copy a strip) and slabs of x (tensor copies, swizzled).
// A consumer turns 64 columns of its tile into fragments while the tensor cores work on the 64 before: weights are A, from registers.
//
// The work of a block: in split mode one tile of y over 1 / splits of K, summed within a cluster through distributed shared memory; else
// several (persistent), the first of which may start and end inside a tile (stream-K): those meet in the workspace, and whoever comes last
// adds them up, in the order of K. A cluster of two can share the slabs of x by multicast (pair).
#pragma once
#include <type_traits>

#include "hopper.cuh"
#include "slab.cuh"

namespace qk {

constexpr int MAX_SHARED = 232448;

template <int MT_, int WGS_, int OCC_>
struct Shape {
  static constexpr int MT = MT_, WGS = WGS_, OCC = OCC_;
  static constexpr int THREADS = WGS * 128 + 128;
  // Registers at launch, as many as fit (16384 to each quarter of a multiprocessor), then moved from the producers to the consumers.
  static constexpr int ENTRY = 512 / OCC / (WGS + 1) / 8 * 8, PRODUCER = WGS * OCC == 2 ? 40 : 32;
  static constexpr int CONSUMER = (ENTRY * (WGS + 1) - PRODUCER) / WGS / 8 * 8;
  static constexpr int ROWS_BLOCK = WGS * 64;
  static constexpr int BK = MT >= 256 ? 64 : 128;  // columns in a stage of x
  static constexpr int BUFFERS = WGS * OCC <= 3 || MT <= 32 ? 4 : 2;  // fragments, all but one of which are being multiplied
  static constexpr int LOADS = WGS * OCC == 2 ? 16 : 8;  // 16-byte loads in flight of a thread that adds up partial sums
  static constexpr int STEP = MT < 32 ? MT : 32;   // rows of y staged at a time
};

template <class S, class L, int TABLE>
struct Rings {
  static constexpr int BUDGET = (S::OCC == 1 ? MAX_SHARED : (233472 / S::OCC - 1024) / 128 * 128) - 512 - TABLE;
  static constexpr int TILE = (L::BYTES + 127) / 128 * 128;
  static constexpr int A = S::WGS * TILE;
  static constexpr int B = S::MT * S::BK * 2;
  static constexpr int STAGING = S::WGS * S::STEP * 128;
  static constexpr int LEFT = BUDGET - STAGING;
  // W and x of the same columns share a stage, and its barriers: fewer instructions of the consumers, but W is held as long as x.
  static constexpr bool ONE = S::BK == 128 && L::KC == 128;
  // As many columns of W as of x, and of W at least two tiles.
  static constexpr int EVEN = LEFT / (A + B * (L::KC / S::BK));
  static constexpr int SA = EVEN < 2 ? 2 : EVEN > (ONE ? 12 : 8) ? (ONE ? 12 : 8) : EVEN;
  static constexpr int MOST = (LEFT - SA * A) / B;
  static constexpr int SB = ONE ? SA : MOST > 16 ? 16 : MOST;
  static constexpr int B_AT = 0, A_AT = SB * B, STAGING_AT = A_AT + SA * A, TABLE_AT = STAGING_AT + STAGING,
                       BARS_AT = TABLE_AT + TABLE;
  static constexpr int BYTES = BARS_AT + 512;
  static_assert(SB >= (S::BK == 64 ? 4 : 2) && 2 * (SA + SB) * 8 + 64 <= 512, "rings");
  static_assert(BYTES <= MAX_SHARED, "shared memory");
  static_assert(S::WGS * 64 * S::MT * 4 <= STAGING_AT, "the sums of a split fit over the rings");
};

struct Work {
  CUtensorMap x;
  const uint8_t* tiles;
  const void* bias;
  void* y;
  float* slots;        // [workers * pair][2][WGS][64 * MT]
  uint32_t* counters;  // [tile of y cut by stream-K][pair][WGS]
  int64_t n, m;
  int strips, k_tiles, tiles_m, tiles_n, group_m;
  int workers;  // blocks, or pairs of blocks
  int cut;      // the first tiles of y, shared out evenly by stream-K
  int sharers;  // workers that have a part of these
  int pair;     // 1, or 2: the cluster shares x
  int even;     // who shares a tile adds up a part of it each, when all have done theirs; else whoever comes last adds up all
  int splits;   // 0: persistent; else the cluster shares K
  int mixed;    // scales are of the other 16-bit type
  QkWeight weight;
};

struct Segment {
  int tile, k0, k1;
};

struct Schedule {
  int at, end, tile, step, tiles, k_tiles;

  static __device__ __forceinline__ int start(const Work& work, int worker) {
    return static_cast<int>(static_cast<int64_t>(work.cut) * work.k_tiles * min(worker, work.sharers) / work.sharers);
  }
  // Whose part iteration i lies in.
  static __device__ __forceinline__ int owner(const Work& work, int i) {
    return static_cast<int>((static_cast<int64_t>(i + 1) * work.sharers - 1) / (static_cast<int64_t>(work.cut) * work.k_tiles));
  }
  __device__ __forceinline__ explicit Schedule(const Work& work, int rank) : k_tiles(work.k_tiles) {
    tiles = work.tiles_m * work.tiles_n;
    if (work.splits) {
      const int t = blockIdx.x / work.splits;
      at = t * k_tiles + k_tiles * rank / work.splits;
      end = t * k_tiles + k_tiles * (rank + 1) / work.splits;
      tile = tiles;
      step = 0;
    } else {
      const int worker = blockIdx.x / work.pair;
      at = start(work, worker);
      end = start(work, worker + 1);
      tile = work.cut + worker;
      step = work.workers;
    }
  }
  __device__ __forceinline__ bool next(Segment& s) {
    if (at < end) {
      s.tile = at / k_tiles;
      s.k0 = at - s.tile * k_tiles;
      s.k1 = min(k_tiles, s.k0 + end - at);
      at += s.k1 - s.k0;
      return true;
    }
    if (tile >= tiles) return false;
    s.tile = tile;
    s.k0 = 0;
    s.k1 = k_tiles;
    tile += step;
    return true;
  }
};

// Tiles of y go down M first, group_m at a time, so that blocks that run together share both x and W.
__device__ __forceinline__ void place(const Work& work, int tile, int& tile_m, int& tile_n) {
  const int g = tile / (work.group_m * work.tiles_n);
  const int r = tile - g * work.group_m * work.tiles_n;
  const int height = min(work.group_m, work.tiles_m - g * work.group_m);
  tile_n = r / height;
  tile_m = g * work.group_m + r - tile_n * height;
}

// The same for all lanes: so says redux, whose result is in a uniform register, as wgmma wants a descriptor.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

struct Ring {
  uint32_t full, empty;  // addresses of the barriers of stage 0
  int stage;
  uint32_t phase;
  __device__ __forceinline__ uint32_t full_bar() const { return full + 8 * stage; }
  __device__ __forceinline__ uint32_t empty_bar() const { return empty + 8 * stage; }
  __device__ __forceinline__ void advance(int stages, bool any = true) {
    const bool wraps = any & (stage + 1 == stages);
    phase ^= wraps;
    stage = wraps ? 0 : stage + any;
  }
};

template <class T, int F, int G, class S>
__global__ void __launch_bounds__(S::THREADS, S::OCC) prefill_kernel(const __grid_constant__ Work work) {
  using L = Tile<F, G>;
  using R = Rings<S, L, TABLE_BYTES<F>>;
  constexpr bool ONE = R::ONE;
  constexpr bool LIGHT = F == QK_INT4 || F == QK_INT4Z, BOOK = F == QK_NF4 || F == QK_NF4N;
  // Who holds more registers has fewer fragments in flight, and loads later.
  constexpr int BUFFERS = BOOK && S::OCC == 2 ? 2 : S::BUFFERS, AHEAD = !LIGHT && !BOOK ? 4 : BUFFERS == 4 ? 2 : 4;
  constexpr int MT = S::MT, WGS = S::WGS, BK = S::BK, BOXES = BK / 64, STEP = S::STEP;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared), bars = base + R::BARS_AT;
  uint32_t* told = reinterpret_cast<uint32_t*>(shared + R::BARS_AT + 2 * (R::SA + R::SB) * 8);  // [WGS]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = cluster_rank();
  const bool cluster = work.pair > 1 || work.splits > 1;

  if (threadIdx.x == 0) {
    if (base & 1023) __trap();  // the swizzle counts from multiples of 1024
    for (int i = 0; i < R::SA; ++i) {
      barrier_init(bars + 8 * i, ONE ? 2 : 1);
      barrier_init(bars + 8 * (R::SA + i), 4 * WGS * (ONE ? work.pair : 1));
    }
    for (int i = 0; !ONE && i < R::SB; ++i) {
      barrier_init(bars + 8 * (2 * R::SA + i), 1);
      barrier_init(bars + 8 * (2 * R::SA + R::SB + i), 4 * WGS * work.pair);
    }
    barrier_init_fence();
  }
  if (threadIdx.x == WGS * 128 + 32) tensor_prefetch(&work.x);
  __syncthreads();
  if (cluster) cluster_meet();
  launch_dependents();

  Ring ring_a{bars, bars + 8 * R::SA, 0, 0};
  Ring ring_b = ONE ? ring_a : Ring{bars + 16 * R::SA, bars + 8 * (2 * R::SA + R::SB), 0, 0};
  Schedule schedule(work, rank);
  Segment s;

  const int group = warp / 4, w = warp % 4;
  if (group == WGS) {  // the producer
    registers_down<S::PRODUCER>();
    if (w == 0) {  // tiles of W, a lane for each strip
      while (schedule.next(s)) {
        int tile_m, tile_n;
        place(work, s.tile, tile_m, tile_n);
        const int strip = min((tile_n * work.pair + (work.pair > 1 ? rank : 0)) * WGS + lane, work.strips - 1);
        const uint8_t* from = work.tiles + (static_cast<int64_t>(strip) * work.k_tiles + s.k0) * L::BYTES;
        for (int left = s.k1 - s.k0; left > 0; --left, from += L::BYTES) {
          barrier_wait(ring_a.empty_bar(), ring_a.phase ^ 1);
          if (lane == 0) barrier_expect(ring_a.full_bar(), WGS * L::BYTES);
          __syncwarp();
          if (lane < WGS) bulk_copy(base + R::A_AT + ring_a.stage * R::A + lane * R::TILE, from, L::BYTES, ring_a.full_bar());
          ring_a.advance(R::SA);
        }
      }
    } else if (w == 1 && lane == 0) {  // slabs of x
      wait_for_grid();
      const int rows = work.pair > 1 ? rank * (MT / 2) : 0;
      while (schedule.next(s)) {
        int tile_m, tile_n;
        place(work, s.tile, tile_m, tile_n);
        const int row = tile_m * MT + rows, end = s.k1 * L::KC;
        for (int column = s.k0 * L::KC; column < end; column += BK) {
          barrier_wait(ring_b.empty_bar(), ring_b.phase ^ 1);
          barrier_expect(ring_b.full_bar(), R::B);
          const uint32_t to = base + R::B_AT + ring_b.stage * R::B + rows * 128;
#pragma unroll
          for (int box = 0; box < BOXES; ++box) {
            if (work.pair > 1) {
              tensor_copy_multicast(to + box * MT * 128, &work.x, column + box * 64, row, ring_b.full_bar(), 3);
            } else {
              tensor_copy(to + box * MT * 128, &work.x, column + box * 64, row, ring_b.full_bar());
            }
          }
          ring_b.advance(R::SB);
        }
      }
    }
    __syncwarp();
    if (work.splits > 1) cluster_sync();
    if (cluster) cluster_meet();
  } else {
  registers_up<S::CONSUMER>();
  const int thread = threadIdx.x % 128;
  uint8_t* staging = shared + R::STAGING_AT + group * STEP * 128;
  const T* bias = static_cast<const T*>(work.bias);
  T* y = static_cast<T*>(work.y);
  const bool wide = work.n % 8 == 0 && (reinterpret_cast<uintptr_t>(y) & 15) == 0;
  float acc[MT / 2];
  uint32_t fragments[BUFFERS][4];
  Ring freed = ring_b;  // ONE: of its fields the stage alone, that of the step before
  uint32_t peer_empty = peer_address(ring_b.empty, rank ^ 1);
  const Place<F, G> lanes(w, lane);
  Context<T, F> context(work.weight, work.mixed, shared + R::TABLE_AT);
  if constexpr (TABLE_BYTES<F> > 0) {
    TableContext<T>::fill(work.weight, shared + R::TABLE_AT, group * 128 + thread, WGS * 128);
    named_sync(8, WGS * 128);
  }
  wait_for_grid();

  // Give back the oldest stage of x, to both blocks of a pair.
  auto free_x = [&](bool any) {
    barrier_arrive_if(any & (lane == 0), freed.empty_bar());
    barrier_arrive_peer_if(any & (lane == 0) & (work.pair > 1), peer_empty + 8 * freed.stage);
    if (!ONE) freed.advance(R::SB, any);
  };
  // Rows of y from the staging buffer: count of them, the first is row m0.
  auto copy_out = [&](int64_t m0, int count, int64_t n0) {
#pragma unroll 4
    for (int i = thread; i < count * 8; i += 128) {
      const int token = i >> 3, chunk = i & 7;
      const int64_t row = m0 + token, column = n0 + 8 * chunk;
      if (row >= work.m || column >= work.n) continue;
      const uint8_t* from = staging + token * 128 + ((chunk ^ (token & 7)) << 4);
      T* to = y + row * work.n + column;
      if (wide) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int e = 0; e < 8 && column + e < work.n; ++e) to[e] = reinterpret_cast<const T*>(from)[e];
      }
    }
  };
  // Where a lane points stmatrix for 8-row blocks j (low lanes) and j + 1 of the staging buffer.
  const int stage_row = (lane & 7) + ((lane >> 4) << 3);
  const uint32_t stage_to = shared_address(staging) + stage_row * 128 + (((2 * w + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
  auto stage = [&](const float* a, int t, float bias0, float bias1) {  // 16 rows of y, from row t of the staging buffer
    store_transposed(stage_to + t * 128, pack<T>(a[0] + bias0, a[1] + bias0), pack<T>(a[2] + bias1, a[3] + bias1),
                     pack<T>(a[4] + bias0, a[5] + bias0), pack<T>(a[6] + bias1, a[7] + bias1));
  };

  while (schedule.next(s)) {
    int tile_m, tile_n;
    place(work, s.tile, tile_m, tile_n);
    const int64_t m0 = static_cast<int64_t>(tile_m) * MT;
    const int64_t n0 = (static_cast<int64_t>(tile_n * work.pair + (work.pair > 1 ? rank : 0)) * WGS + group) * 64;

    context.rows(work.weight, n0 + 16 * w + lane / 4);
    // 128 columns at a time. Nothing else in this loop may branch: ptxas would serialize the wgmmas (C7513).
    const int steps = (s.k1 - s.k0) * (L::KC / 128);
    for (int step = 0; step < steps; ++step) {
      const bool begins = L::KC == 128 || step % (L::KC / 128) == 0, ends = L::KC == 128 || step % (L::KC / 128) == L::KC / 128 - 1;
      context.columns(work.weight, (s.k0 * (L::KC / 128) + step) * 2);
      if (!ONE && begins) barrier_wait(ring_a.full_bar(), ring_a.phase);
      Ring second = ring_b;
      barrier_wait(ring_b.full_bar(), ring_b.phase);
      if (BOXES == 1) {
        second.advance(R::SB);
        barrier_wait(second.full_bar(), second.phase);
      }
      const uint8_t* tile = shared + R::A_AT + (ONE ? ring_b : ring_a).stage * R::A + group * R::TILE;
      const uint32_t x_at[2] = {uniform(base + R::B_AT + ring_b.stage * R::B),
                                BOXES == 1 ? uniform(base + R::B_AT + second.stage * R::B) : 0};
      const int half = L::KC == 128 ? 0 : 2 * (step % (L::KC / 128));
      Slab<T, F, G> slabs[2];
      slabs[0].load(context, tile, lanes, half, 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // 16 columns at a time: a wgmma holds up its own warps' next, so what makes the fragments goes between
        if (i == AHEAD) slabs[1].load(context, tile, lanes, half + 1, 1);
        wgmma_wait<BUFFERS - 1>();  // the wgmma BUFFERS ago is done: its fragment is free, and so is x when it was a stage's last
        if (i == BUFFERS - 1) free_x(step > 0);
        if (BOXES == 1 && i == BUFFERS + 3) free_x(true);
        if (!ONE && i == 4) {
          __syncwarp();
          barrier_arrive_if(ends & (lane == 0), ring_a.empty_bar());
          ring_a.advance(R::SA, ends);
        }
        uint32_t(&fragment)[4] = fragments[i % BUFFERS];
        slabs[i / 4].values(context, i % 4, fragment);
        const uint64_t b = b_descriptor(BOXES == 1 ? x_at[i / 4] : x_at[0] + i / 4 * MT * 128) + 2 * (i % 4);
#pragma unroll
        for (int p = 0; p < 4; ++p) asm volatile("" : "+r"(fragment[p])::"memory");  // made before the fence, not after it
        wgmma_fence();
        Wgmma<T, MT>::run(acc, fragment, b, i > 0 || step > 0);
        wgmma_commit();
      }
      ring_b = second;
      if (ONE) freed.stage = ring_b.stage;
      ring_b.advance(R::SB);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < MT / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // read after the wait, not before it
    free_x(true);

    const int64_t row = n0 + 16 * w + lane / 4;
    const float bias0 = bias && row < work.n ? static_cast<float>(bias[row]) : 0.0f;
    const float bias1 = bias && row + 8 < work.n ? static_cast<float>(bias[row + 8]) : 0.0f;

    if (work.splits > 1) {
      named_sync(8, WGS * 128);  // everyone has read the rings
      float4* sums = reinterpret_cast<float4*>(shared) + group * (MT / 8) * 128 + thread;
#pragma unroll
      for (int j = 0; j < MT / 8; ++j) sums[j * 128] = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
      cluster_sync();
      break;
    }

    if (s.k1 - s.k0 < work.k_tiles) {
      const int first = Schedule::owner(work, s.tile * work.k_tiles), last = Schedule::owner(work, (s.tile + 1) * work.k_tiles - 1);
      const int me = blockIdx.x / work.pair;
      uint32_t* counter = work.counters + (s.tile * work.pair + rank) * WGS + group;
      auto slot = [&](int worker) {
        const int second = worker == first && Schedule::start(work, first) < s.tile * work.k_tiles;
        return reinterpret_cast<float4*>(work.slots) +
               ((static_cast<int64_t>(worker * work.pair + rank) * 2 + second) * WGS + group) * (16 * MT) + thread;
      };
      if (work.even) {
        float4* mine = slot(me);
#pragma unroll
        for (int j = 0; j < MT / 8; ++j) __stcg(mine + j * 128, make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));
        __threadfence();
        named_sync(1 + group, 128);
        if (thread == 0) atomicAdd(counter, 1);
        continue;
      }
      const uint32_t others = last - first;
      constexpr int CHUNK = MT / 8 < S::LOADS ? MT / 8 : S::LOADS;
      auto write = [&] {
        float4* mine = slot(me);
#pragma unroll
        for (int j = 0; j < MT / 8; ++j) __stcg(mine + j * 128, make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));
      };
      auto add = [&](const float4* from, bool fresh) {
#pragma unroll
        for (int j0 = 0; j0 < MT / 8; j0 += CHUNK) {
          float4 v[CHUNK];
#pragma unroll
          for (int i = 0; i < CHUNK; ++i) v[i] = __ldcg(from + (j0 + i) * 128);
#pragma unroll
          for (int i = 0; i < CHUNK; ++i) {
            float* a = acc + 4 * (j0 + i);
            a[0] = (fresh ? 0.0f : a[0]) + v[i].x;
            a[1] = (fresh ? 0.0f : a[1]) + v[i].y;
            a[2] = (fresh ? 0.0f : a[2]) + v[i].z;
            a[3] = (fresh ? 0.0f : a[3]) + v[i].w;
          }
        }
      };
      if (thread == 0) told[group] = *reinterpret_cast<volatile uint32_t*>(counter);
      named_sync(1 + group, 128);
      bool finish = told[group] == others;
      if (!finish || others > 1) write();
      if (!finish) {
        __threadfence();
        named_sync(1 + group, 128);
        if (thread == 0) told[group] = atomicAdd(counter, 1);
        named_sync(1 + group, 128);
        finish = told[group] == others;
      }
      named_sync(1 + group, 128);  // before told is written again
      if (!finish) continue;
      __threadfence();
      if (thread == 0) *counter = 0;
      if (others == 1) {
        add(slot(me == first ? last : first), false);
      } else {  // in the order of K, whoever finishes: its own part too comes back from the workspace
        for (int c = first; c <= last; ++c) add(slot(c), c == first);
      }
    }

#pragma unroll
    for (int t0 = 0; t0 < MT; t0 += STEP) {
      if (m0 + t0 < work.m) {
        named_sync(1 + group, 128);
#pragma unroll
        for (int t = 0; t < STEP; t += 16) stage(acc + (t0 + t) / 2, t, bias0, bias1);
        named_sync(1 + group, 128);
        copy_out(m0 + t0, STEP, n0);
      }
    }
  }

  if (work.even && work.cut) {
    const int me = blockIdx.x / work.pair, begin = Schedule::start(work, me), end = Schedule::start(work, me + 1);
    for (int tile = begin / work.k_tiles; tile * work.k_tiles < end; ++tile) {
      const int first = Schedule::owner(work, tile * work.k_tiles), last = Schedule::owner(work, (tile + 1) * work.k_tiles - 1);
      const int parts = last - first + 1;
      if (parts == 1) continue;
      uint32_t* counter = work.counters + (tile * work.pair + rank) * WGS + group;
      if (thread == 0) {  // all blocks run at once, and each has left its parts before it waits for others
        QK_SPIN(load_acquire(counter) >= static_cast<uint32_t>(parts));
        if (atomicAdd(counter, 1) == static_cast<uint32_t>(2 * parts - 1)) *counter = 0;  // all have seen it
      }
      named_sync(1 + group, 128);
      int tile_m, tile_n;
      place(work, tile, tile_m, tile_n);
      const int64_t m0 = static_cast<int64_t>(tile_m) * MT;
      const int64_t n0 = (static_cast<int64_t>(tile_n * work.pair + (work.pair > 1 ? rank : 0)) * WGS + group) * 64;
      const int64_t row = n0 + 16 * w + lane / 4;
      const float bias0 = bias && row < work.n ? static_cast<float>(bias[row]) : 0.0f;
      const float bias1 = bias && row + 8 < work.n ? static_cast<float>(bias[row + 8]) : 0.0f;
      const int j0 = MT / 8 * (me - first) / parts, j1 = MT / 8 * (me - first + 1) / parts;
      const float4* slots = reinterpret_cast<const float4*>(work.slots) + thread;
      const bool second = Schedule::start(work, first) < tile * work.k_tiles;
      for (int j = j0; j < j1; j += STEP / 8) {
        if (m0 + 8 * j >= work.m) break;
        float a[STEP / 2] = {};
#pragma unroll 2
        for (int c = first; c <= last; ++c) {  // in the order of K
          const float4* from = slots + ((static_cast<int64_t>(c * work.pair + rank) * 2 + (c == first && second)) * WGS + group) * (16 * MT) + j * 128;
#pragma unroll
          for (int i = 0; i < STEP / 8; ++i) {
            const float4 v = j + i < j1 ? __ldcg(from + i * 128) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            a[4 * i] += v.x;
            a[4 * i + 1] += v.y;
            a[4 * i + 2] += v.z;
            a[4 * i + 3] += v.w;
          }
        }
        named_sync(1 + group, 128);
#pragma unroll
        for (int t = 0; t < STEP; t += 16) stage(a + t / 2, t, bias0, bias1);
        named_sync(1 + group, 128);
        copy_out(m0 + 8 * j, min(STEP, 8 * (j1 - j)), n0);
      }
    }
  }

  if (work.splits > 1) {
    int tile_m, tile_n;
    place(work, blockIdx.x / work.splits, tile_m, tile_n);
    const int64_t m0 = static_cast<int64_t>(tile_m) * MT, n0 = (static_cast<int64_t>(tile_n) * WGS + group) * 64;
    const int64_t row = n0 + 16 * w + lane / 4;
    const float bias0 = bias && row < work.n ? static_cast<float>(bias[row]) : 0.0f;
    const float bias1 = bias && row + 8 < work.n ? static_cast<float>(bias[row + 8]) : 0.0f;
    const int j0 = MT / 8 * rank / work.splits, j1 = MT / 8 * (rank + 1) / work.splits;
    const uint32_t sums = base + (group * (MT / 8) * 128 + thread) * 16;
    for (int j = j0; j < j1; j += STEP / 8) {
      if (m0 + 8 * j >= work.m) break;
      float a[STEP / 2] = {};
#pragma unroll 2
      for (int r = 0; r < work.splits; ++r) {
        const uint32_t from = peer_address(sums + j * 2048, r);
#pragma unroll
        for (int i = 0; i < STEP / 8; ++i) {
          if (j + i >= j1) continue;
          const float4 v = peer_load(from + i * 2048);
          a[4 * i] += v.x;
          a[4 * i + 1] += v.y;
          a[4 * i + 2] += v.z;
          a[4 * i + 3] += v.w;
        }
      }
      named_sync(1 + group, 128);
#pragma unroll
      for (int t = 0; t < STEP; t += 16) stage(a + t / 2, t, bias0, bias1);
      named_sync(1 + group, 128);
      copy_out(m0 + 8 * j, min(STEP, 8 * (j1 - j)), n0);
    }
    cluster_meet();  // no peer reads this block's sums any more
  } else if (cluster) {
    cluster_meet();
  }
  }
}

}  // namespace qk
