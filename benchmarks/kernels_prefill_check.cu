// Each ingredient of the prefill kernels by itself, and a read pass: for benchmarks/kernels_prefill.py. No part of the library.
#include <cudaTypedefs.h>

#include "../kernels/prefill/hopper.cuh"

namespace {

// d [64][N] = a [64][64] b [N][64]^T: B by a tensor copy with the swizzle, A from registers.
template <int N>
__global__ void __launch_bounds__(128) multiply(const __grid_constant__ CUtensorMap map, const __half* a, float* d) {
  using namespace qk;
  __shared__ alignas(1024) uint8_t b[N * 128];
  __shared__ uint64_t bar;
  const uint32_t address = shared_address(&bar);
  if (threadIdx.x == 0) {
    barrier_init(address, 1);
    barrier_init_fence();
    barrier_expect(address, N * 128);
    tensor_copy(shared_address(b), &map, 0, 0, address);
  }
  __syncthreads();
  barrier_wait(address, 0);
  const int w = threadIdx.x / 32, lane = threadIdx.x % 32, r = 16 * w + lane / 4;
  float acc[N / 2];
  uint32_t fragment[16];
  for (int s = 0; s < 4; ++s) {
    for (int p = 0; p < 4; ++p) {
      fragment[4 * s + p] = *reinterpret_cast<const uint32_t*>(a + (r + 8 * (p & 1)) * 64 + 16 * s + 2 * (lane % 4) + 8 * (p >> 1));
    }
  }
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < 4; ++s) Wgmma<__half, N>::run(acc, fragment + 4 * s, b_descriptor(shared_address(b)) + 2 * s, s > 0);
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    for (int i = 0; i < 4; ++i) d[(r + 8 * (i >> 1)) * N + 8 * j + 2 * (lane % 4) + (i & 1)] = acc[4 * j + i];
  }
}

// to [4][1024] = from, by four bulk copies over two stages of an mbarrier.
__global__ void copy(const uint32_t* from, uint32_t* to) {
  using namespace qk;
  __shared__ alignas(128) uint32_t stage[2][1024];
  __shared__ uint64_t bars[2];
  if (threadIdx.x == 0) {
    barrier_init(shared_address(bars), 1);
    barrier_init(shared_address(bars + 1), 1);
    barrier_init_fence();
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const uint32_t bar = shared_address(bars + i % 2);
    if (threadIdx.x == 0) {
      barrier_expect(bar, 4096);
      bulk_copy(shared_address(stage[i % 2]), from + i * 1024, 4096, bar);
    }
    barrier_wait(bar, i / 2);
    for (int j = threadIdx.x; j < 1024; j += blockDim.x) to[i * 1024 + j] = stage[i % 2][j];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(512) read(const uint4* from, int64_t count, uint32_t* to) {
  uint32_t sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(from + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += stride) sum += from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
  if (sum == 0x12345678) *to = sum;
}

}  // namespace

extern "C" int check_multiply(int n, const void* a, const void* b, float* d) {
  void* f = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (const int e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found)) return e;
  CUtensorMap map;
  const cuuint64_t dims[2] = {64, static_cast<cuuint64_t>(n)}, strides[1] = {128};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(n)}, steps[2] = {1, 1};
  const int e = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(b), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (e) return 10000 + e;
#define CHECK(N) \
  if (n == N) multiply<N><<<1, 128>>>(map, static_cast<const __half*>(a), d);
  CHECK(16) CHECK(32) CHECK(64) CHECK(96) CHECK(128) CHECK(192) CHECK(256)
  return cudaDeviceSynchronize();
}

extern "C" int check_copy(const void* from, void* to) {
  copy<<<1, 128>>>(static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to));
  return cudaDeviceSynchronize();
}

extern "C" int read_pass(const void* from, int64_t bytes, void* to, cudaStream_t stream) {
  read<<<264, 512, 0, stream>>>(static_cast<const uint4*>(from), bytes / 16, static_cast<uint32_t*>(to));
  return cudaGetLastError();
}
