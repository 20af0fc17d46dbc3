#include "bench/bench.h"

namespace {

constexpr int THREADS = 256;

__device__ inline uint4 load(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// A block reads THREADS * EACH neighbouring vectors, every one asked for before the first is looked at.
template <int EACH>
__global__ void __launch_bounds__(THREADS) read(const uint4* data, int64_t count, uint32_t* sink) {
  const int64_t first = int64_t(blockIdx.x) * THREADS * EACH + threadIdx.x;
  uint4 v[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) v[i] = first + i * THREADS < count ? load(data + first + i * THREADS) : uint4{};
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  if (sum == 0x5bd1e995 && count < 0) *sink = sum;  // never: but the compiler cannot know, so it keeps the loads
}

__global__ void nothing() {}

template <int EACH>
void start(const void* data, int64_t count, void* sink, cudaStream_t stream) {
  const int64_t blocks = (count + THREADS * EACH - 1) / (THREADS * EACH);
  read<EACH><<<unsigned(blocks), THREADS, 0, stream>>>(static_cast<const uint4*>(data), count, static_cast<uint32_t*>(sink));
}

}  // namespace

extern "C" int quantkit_bench_read(const void* data, int64_t bytes, void* sink, cudaStream_t stream) {
#ifndef QK_READ_EACH
#define QK_READ_EACH 2
#endif
  start<QK_READ_EACH>(data, bytes / 16, sink, stream);
  return cudaGetLastError();
}

extern "C" int quantkit_bench_empty(cudaStream_t stream) {
  nothing<<<1, 32, 0, stream>>>();
  return cudaGetLastError();
}
