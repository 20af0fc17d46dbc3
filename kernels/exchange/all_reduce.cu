// All-reduce by reading the other ranks' memory over NVLink or PCIe: bound by the way there and back, and from some 100 KB on by the link.
//
// A block is a channel: it has its part of x, memory in every rank's buffer, counters and flags, and meets only the same block of the
// other ranks. Blocks need no order among themselves, and a launch of any size may follow any other.
//
//   flagged   each rank writes its part to every other, 4 bytes of data beside 4 of flag, and a thread that sees the flag has the data
//   one-shot  each rank copies its part into its own buffer, all meet, and each reads and adds all parts
//   two-shot  as one-shot, but a rank adds only its share; they meet again, and each reads the sums of the others
//
// Why nothing is overwritten that is still to be read: of call c a channel uses the half c % 2 of its memory. A rank that is in call c + 2
// has met all others in call c + 1 or heard from them there, so these have ended call c, which came before on their stream. The sums of a
// two-shot are written between its two meetings; a rank that is past the first one has ended all calls before.
//
// Flags are the number of the meeting, 2 c + 1 and 2 c + 2, and wrap; meetings compare differences. "Flagged" looks for equality: to be
// fooled a word would have to lie unused for exactly 2^31 calls of its channel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "exchange/exchange.h"

namespace {

constexpr int THREADS = 512;
constexpr int CHANNELS = QK_EXCHANGE_CHANNELS, RANKS = QK_MAX_RANKS;
constexpr int64_t SLOT = QK_EXCHANGE_CHANNEL_BYTES, FLAGGED = QK_EXCHANGE_FLAGGED_BYTES;
constexpr int64_t LEAST = THREADS * 16;  // bytes of a channel before there is a second one
static_assert(FLAGGED == THREADS * 8, "a thread has one flagged word");

// What a buffer holds, in this order.
constexpr int64_t CALLS = 0;                               // uint32 [CHANNELS]: this rank's own
constexpr int64_t FLAGS = 1024;                            // uint32 [CHANNELS, 32]: what rank r has reached; a line to a channel
constexpr int64_t DATA = FLAGS + CHANNELS * 128;           // [2, CHANNELS, SLOT]
constexpr int64_t SUMS = DATA + 2 * CHANNELS * SLOT;       // [CHANNELS, SLOT]
constexpr int64_t WORDS = SUMS + CHANNELS * SLOT;          // [2, ranks, CHANNELS, 2 FLAGGED]

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <typename T, int BYTES>
union Pack {
  uint32_t words[BYTES / 4];
  T at[BYTES / sizeof(T)];
};

// The sum in rank order, rounded once.
template <typename T, int BYTES>
__device__ inline Pack<T, BYTES> summed(const Pack<T, BYTES> (&parts)[RANKS], int ranks) {
  float total[BYTES / sizeof(T)];
#pragma unroll
  for (int r = 0; r < RANKS; ++r) {
#pragma unroll
    for (int i = 0; i < int(BYTES / sizeof(T)); ++i) {
      if (r == 0) total[i] = wide(parts[0].at[i]);
      else if (r < ranks) total[i] += wide(parts[r].at[i]);
    }
  }
  Pack<T, BYTES> out;
#pragma unroll
  for (int i = 0; i < int(BYTES / sizeof(T)); ++i) out.at[i] = narrow<T>(total[i]);
  return out;
}

// Volatile, so past the L1 cache, which knows nothing of what other GPUs write.
template <typename T>
__device__ inline Pack<T, 16> load(const void* p) {
  Pack<T, 16> x;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.words[0]), "=r"(x.words[1]), "=r"(x.words[2]), "=r"(x.words[3])
               : "l"(p)
               : "memory");
  return x;
}

template <typename T>
__device__ inline void store(void* p, const Pack<T, 16>& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.words[0]), "r"(x.words[1]), "r"(x.words[2]), "r"(x.words[3])
               : "memory");
}

// BYTES at `at` of x, and zeros past its end.
template <typename T, int BYTES>
__device__ inline Pack<T, BYTES> given(const void* x, int64_t at, int64_t bytes) {
  Pack<T, BYTES> v;
  if (at + BYTES <= bytes) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(x) + at);
    if (BYTES == 16) {
      const uint4 four = *reinterpret_cast<const uint4*>(words);
      v.words[0] = four.x, v.words[1] = four.y, v.words[BYTES / 4 - 2] = four.z, v.words[BYTES / 4 - 1] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < BYTES / 4; ++i) v.words[i] = words[i];
    }
    return v;
  }
#pragma unroll
  for (int i = 0; i < int(BYTES / sizeof(T)); ++i) {
    const int64_t element = at / int64_t(sizeof(T)) + i;
    v.at[i] = element * int64_t(sizeof(T)) < bytes ? static_cast<const T*>(x)[element] : narrow<T>(0.0f);
  }
  return v;
}

template <typename T, int BYTES>
__device__ inline void give(void* out, int64_t at, int64_t bytes, const Pack<T, BYTES>& v) {
  if (at + BYTES <= bytes) {
    uint32_t* words = reinterpret_cast<uint32_t*>(static_cast<char*>(out) + at);
    if (BYTES == 16) {
      *reinterpret_cast<uint4*>(words) = make_uint4(v.words[0], v.words[1], v.words[BYTES / 4 - 2], v.words[BYTES / 4 - 1]);
    } else {
#pragma unroll
      for (int i = 0; i < BYTES / 4; ++i) words[i] = v.words[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < int(BYTES / sizeof(T)); ++i) {
    const int64_t element = at / int64_t(sizeof(T)) + i;
    if (element * int64_t(sizeof(T)) < bytes) static_cast<T*>(out)[element] = v.at[i];
  }
}

__device__ inline char* part_of(const QkPeers& peers, int rank, int64_t at) { return static_cast<char*>(peers.buffers[rank]) + at; }

__device__ inline uint64_t now() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// How long a loop has waited: a rank that never comes must end this one too, and the clock is slow to read.
struct Patience {
  uint64_t limit, since = 0;
  uint32_t rounds = 0;
  __device__ inline explicit Patience(uint64_t ns) : limit(ns) {}
  __device__ inline void wait() {
    if (++rounds & 0xfff) return;
    if (since == 0) since = now();
    else if (now() - since > limit) __trap();
  }
};

// This channel of every rank comes here with `number`; what the block wrote before is then there for all.
__device__ inline void meet(const QkPeers& peers, uint32_t number) {
  __syncthreads();
  if (int(threadIdx.x) < peers.ranks) {
    const int64_t line = FLAGS + int64_t(blockIdx.x) * 128;
    char* there = part_of(peers, threadIdx.x, line + 4 * peers.rank);
    const char* here = part_of(peers, peers.rank, line + 4 * threadIdx.x);
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(there), "r"(number) : "memory");
    Patience patience(peers.patience);
    uint32_t seen;
    while (true) {
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(here) : "memory");
      if (int32_t(seen - number) >= 0) break;
      patience.wait();
    }
  }
  __syncthreads();
}

__device__ inline uint32_t* calls_of(const QkPeers& peers) {
  return reinterpret_cast<uint32_t*>(part_of(peers, peers.rank, CALLS)) + blockIdx.x;
}

// The channel's number of this call. All threads must have it before one of them counts on.
__device__ inline uint32_t call_of(const QkPeers& peers) { return *static_cast<volatile uint32_t*>(calls_of(peers)); }
__device__ inline void count_on(const QkPeers& peers, uint32_t call) {
  __syncthreads();
  if (threadIdx.x == 0) *calls_of(peers) = call + 1;
}

// Block b: bytes b * FLAGGED on, 8 to a thread.
template <typename T>
__global__ void __launch_bounds__(THREADS) flagged(const __grid_constant__ QkPeers peers, const void* x, void* out, int64_t bytes) {
  const int64_t at = int64_t(blockIdx.x) * FLAGGED + threadIdx.x * 8;
  const uint32_t call = call_of(peers), flag = 2 * call + 1;
  if (at < bytes) {
    const int64_t half = WORDS + (call & 1) * peers.ranks * CHANNELS * 2 * FLAGGED;
    const auto place = [&](int rank) { return half + (int64_t(rank) * CHANNELS + blockIdx.x) * 2 * FLAGGED + threadIdx.x * 16; };
    Pack<T, 8> parts[RANKS];
    const Pack<T, 8> mine = given<T, 8>(x, at, bytes);
#pragma unroll
    for (int i = 1; i < RANKS; ++i) {
      if (i >= peers.ranks) continue;
      const int to = peers.rank + i < peers.ranks ? peers.rank + i : peers.rank + i - peers.ranks;  // not all to one at once
      asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(part_of(peers, to, place(peers.rank))), "r"(mine.words[0]),
                   "r"(flag), "r"(mine.words[1])
                   : "memory");
    }
    Patience patience(peers.patience);
#pragma unroll
    for (int r = 0; r < RANKS; ++r) {
      parts[r] = mine;
      if (r >= peers.ranks || r == peers.rank) continue;
      const char* here = part_of(peers, peers.rank, place(r));
      uint32_t first, second;
      while (true) {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(parts[r].words[0]), "=r"(first), "=r"(parts[r].words[1]), "=r"(second)
                     : "l"(here)
                     : "memory");
        if (first == flag && second == flag) break;
        patience.wait();
      }
    }
    give<T, 8>(out, at, bytes, summed<T, 8>(parts, peers.ranks));
  }
  count_on(peers, call);
}

template <typename T>
__device__ inline Pack<T, 16> summed_at(const QkPeers& peers, int64_t at) {
  Pack<T, 16> parts[RANKS];
#pragma unroll
  for (int r = 0; r < RANKS; ++r) {
    if (r < peers.ranks) parts[r] = load<T>(part_of(peers, r, at));
  }
  return summed<T, 16>(parts, peers.ranks);
}

// Block b: `each` bytes from b * each on, a multiple of 16 and at most SLOT.
template <typename T, bool TWO>
__global__ void __launch_bounds__(THREADS) by_reading(const __grid_constant__ QkPeers peers, const void* x, void* out, int64_t bytes, int64_t each) {
  const int64_t from = int64_t(blockIdx.x) * each, rest = bytes - from;
  const int count = int((rest < each ? rest + 15 : each) / 16);  // of 16 bytes
  const uint32_t call = call_of(peers);
  const int64_t data = DATA + ((call & 1) * CHANNELS + blockIdx.x) * SLOT, sums = SUMS + blockIdx.x * SLOT;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    store<T>(part_of(peers, peers.rank, data + i * 16), given<T, 16>(x, from + i * 16, bytes));
  }
  meet(peers, 2 * call + 1);
  if (!TWO) {
#pragma unroll 2
    for (int i = threadIdx.x; i < count; i += THREADS) {
      give<T, 16>(out, from + i * 16, bytes, summed_at<T>(peers, data + i * 16));
    }
  } else {
    const int share = (count + peers.ranks - 1) / peers.ranks, first = peers.rank * share;
    const int stop = first + share < count ? first + share : count;
    for (int i = first + threadIdx.x; i < stop; i += THREADS) {
      const Pack<T, 16> sum = summed_at<T>(peers, data + i * 16);
      store<T>(part_of(peers, peers.rank, sums + i * 16), sum);
      give<T, 16>(out, from + i * 16, bytes, sum);
    }
    meet(peers, 2 * call + 2);
    for (int i = threadIdx.x; i < count; i += THREADS) {
      if (i < first || i >= stop) give<T, 16>(out, from + i * 16, bytes, load<T>(part_of(peers, i / share, sums + i * 16)));
    }
  }
  count_on(peers, call);
}

__global__ void begin(const __grid_constant__ QkPeers peers, uint32_t call) {
  reinterpret_cast<uint32_t*>(part_of(peers, peers.rank, CALLS))[threadIdx.x] = call;
  for (int r = 0; r < peers.ranks; ++r) *reinterpret_cast<uint32_t*>(part_of(peers, peers.rank, FLAGS + threadIdx.x * 128 + 4 * r)) = 2 * call;
}

template <typename T>
void start(const QkPeers& peers, const void* x, void* out, int64_t bytes, int mode, cudaStream_t stream) {
  if (mode == QK_FLAGGED) {
    flagged<T><<<unsigned((bytes + FLAGGED - 1) / FLAGGED), THREADS, 0, stream>>>(peers, x, out, bytes);
    return;
  }
  int64_t blocks = (bytes + LEAST - 1) / LEAST;
  if (blocks > CHANNELS) blocks = CHANNELS;
  const int64_t each = ((bytes + blocks - 1) / blocks + 15) / 16 * 16;
  const unsigned grid = unsigned((bytes + each - 1) / each);
  if (mode == QK_ONE_SHOT) by_reading<T, false><<<grid, THREADS, 0, stream>>>(peers, x, out, bytes, each);
  else by_reading<T, true><<<grid, THREADS, 0, stream>>>(peers, x, out, bytes, each);
}

}  // namespace

extern "C" int64_t quantkit_exchange_bytes(int ranks) { return WORDS + int64_t(2) * ranks * CHANNELS * 2 * FLAGGED; }

extern "C" int64_t quantkit_exchange_limit(int mode) { return CHANNELS * (mode == QK_FLAGGED ? FLAGGED : SLOT); }

extern "C" int quantkit_exchange_begin(const QkPeers* peers, uint32_t call, cudaStream_t stream) {
  begin<<<1, CHANNELS, 0, stream>>>(*peers, call);
  return cudaGetLastError();
}

extern "C" int quantkit_all_reduce(const QkPeers* peers, const void* x, void* out, int64_t bytes, int type, int mode, cudaStream_t stream) {
  if (bytes == 0) return 0;
  if (bytes < 0 || bytes > quantkit_exchange_limit(mode) || peers->ranks < 1 || peers->ranks > RANKS) return QK_UNSUPPORTED;
  const auto run = type == QK_FP32 ? start<float> : type == QK_BF16 ? start<__nv_bfloat16> : start<__half>;
  run(*peers, x, out, bytes, mode, stream);
  return cudaGetLastError();
}
