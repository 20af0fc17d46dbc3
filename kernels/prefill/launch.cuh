// Host side of the prefill kernels: from a config to a launch.
#pragma once
#include <cudaTypedefs.h>

#include "prefill.cuh"

namespace qk {

// What the caller has checked and computed; see QkConfig below.
struct Call {
  Work work;
  int x_type, m_tile, groups, splits;
  int workers;  // at most so many; 0: as many as run at once
  bool pair, dependent, whole, late, even;
  int64_t ldx, k, workspace_bytes;
  const void* x;
  cudaStream_t stream;
};

// The formats, one source each. QK_UNSUPPORTED if there is no kernel of that shape.
int prefill_int4(const Call& call);
int prefill_int4z(const Call& call);
int prefill_nf4(const Call& call);
int prefill_nf4n(const Call& call);
int prefill_q4_k(const Call& call);
int prefill_q5_k(const Call& call);
int prefill_q6_k(const Call& call);
int prefill_q8_0(const Call& call);

inline int tensor_map(CUtensorMap* map, const void* x, int64_t m, int64_t k, int64_t ldx, int x_type, int rows) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(m)}, strides[1] = {static_cast<cuuint64_t>(ldx) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(rows)}, steps[2] = {1, 1};
  const CUresult r = encode(map, x_type == QK_FP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                            const_cast<void*>(x), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return r == CUDA_SUCCESS ? 0 : cudaErrorInvalidValue;
}

inline int processors() {
  static const int count = [] {
    int device = 0, n = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
    return n;
  }();
  return count;
}

template <class T, int F, int G, class S>
int prefill_launch(const Call& call) {
  using R = Rings<S, Tile<F, G>, TABLE_BYTES<F>>;
  Work work = call.work;
  work.pair = call.pair ? 2 : 1;
  work.splits = call.splits;
  work.tiles_m = static_cast<int>((work.m + S::MT - 1) / S::MT);
  work.tiles_n = (work.strips + S::WGS * work.pair - 1) / (S::WGS * work.pair);
  const int64_t tiles = static_cast<int64_t>(work.tiles_m) * work.tiles_n;
  if (tiles * work.k_tiles > INT32_MAX) return QK_UNSUPPORTED;
  work.group_m = work.tiles_m < 8 ? work.tiles_m : 8;
  int64_t blocks;
  if (work.splits) {
    if (work.pair > 1 || work.splits > 8 || work.splits > work.k_tiles) return QK_UNSUPPORTED;
    blocks = tiles * work.splits;
    work.workers = work.cut = 0;
    work.sharers = 1;
  } else {
    int most = processors() * S::OCC / work.pair;
    if (call.workers && call.workers < most) most = call.workers;
    work.even = call.even;
    work.workers = static_cast<int>(tiles * work.k_tiles < most ? tiles * work.k_tiles : most);
    const int64_t rest = tiles % work.workers;
    work.cut = static_cast<int>(call.whole || rest == 0 ? 0 : tiles < work.workers || call.late || call.even ? rest : rest + work.workers);
    if (work.cut == 0 && tiles < work.workers) work.workers = static_cast<int>(tiles);
    const int64_t shared = static_cast<int64_t>(work.cut) * work.k_tiles;
    work.sharers = shared > 0 && shared < work.workers ? static_cast<int>(shared) : work.workers;
    blocks = static_cast<int64_t>(work.workers) * work.pair;
    if (work.cut && (call.workspace_bytes < QK_COUNTER_BYTES + blocks * 2 * S::WGS * 64 * S::MT * 4 ||
                     work.cut * work.pair * S::WGS * 4 > QK_COUNTER_BYTES)) {
      return QK_UNSUPPORTED;
    }
  }
  if (const int e = tensor_map(&work.x, call.x, work.m, call.k, call.ldx, call.x_type, S::MT / work.pair)) return e;

  const auto kernel = prefill_kernel<T, F, G, S>;
  if (const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, R::BYTES)) return e;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(S::THREADS);
  config.dynamicSmemBytes = R::BYTES;
  config.stream = call.stream;
  cudaLaunchAttribute attributes[2];
  int count = 0;
  const int cluster = work.pair > 1 ? 2 : work.splits;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (call.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, work);
}

template <class T, int F, int G>
int prefill_shape(const Call& call) {
#define QK_SHAPE(MT, WGS, OCC) \
  if (call.m_tile == MT && call.groups == WGS) return prefill_launch<T, F, G, Shape<MT, WGS, OCC>>(call);
#define QK_WIDE(MT, WGS, OCC)                                     \
  if constexpr ((F == QK_INT4 || F == QK_INT4Z) && G == 128) { \
    QK_SHAPE(MT, WGS, OCC)                                        \
  }
#include "shapes.inc"
#undef QK_SHAPE
#undef QK_WIDE
  return QK_UNSUPPORTED;
}

template <int F, int G>
int prefill_type(const Call& call) {
  return call.x_type == QK_FP16 ? prefill_shape<__half, F, G>(call) : prefill_shape<__nv_bfloat16, F, G>(call);
}

template <int F>
int prefill_group(const Call& call) {
  switch (call.work.weight.group) {
#ifndef QK_QUICK
    case 32: return prefill_type<F, 32>(call);
#endif
    case 64: return prefill_type<F, 64>(call);
    default: return prefill_type<F, 128>(call);
  }
}

}  // namespace qk
