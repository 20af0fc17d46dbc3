// Values of half and bfloat16 as float and back, V at a time; and how the kernels of this folder start. No kernel is named here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace fusions {

constexpr int WIDE = 8;  // elements of 16 bytes

__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// x as T holds it: where torch would have written it to memory.
template <typename T>
__device__ inline float rounded(float x) { return wide(narrow<T>(x)); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <int V, typename T>
__device__ inline Vector<T, V> load(const T* p) { return *reinterpret_cast<const Vector<T, V>*>(p); }
template <int V, typename T>
__device__ inline void store(T* p, const Vector<T, V>& v) { *reinterpret_cast<Vector<T, V>*>(p) = v; }

// The kernel after this one may start, and what the one ahead wrote may be read: each kernel's first line, since `launch` starts it early.
__device__ inline void begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Start `kernel` while the one ahead may still run, where the GPU can: a linear after it then reads its weights under both.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream, Arguments... arguments) {
  int device = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = major >= 9;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace fusions
