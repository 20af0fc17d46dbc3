// From a QkConfig to a launch of multiply<>.
//
// QkConfig of kernel QK_MMA; any field 0 is chosen here:
//   a  rows of x in a block: 8, 16, 32 (more take more blocks)
//   b  blocks along K | blocks along N << 8
//   c  16-row blocks of a warp | warps of a team << 4 | teams of a block << 12 | blocks meant for one multiprocessor << 20
//   d  stages | 1 << 8: splits meet in the workspace, not in a cluster | 1 << 9: dependent launch
#pragma once
#include "mma.cuh"

namespace qk {
namespace decode {

constexpr int DEPENDENT = 1 << 9, WORKSPACE = 1 << 8;
constexpr int BLOCK_MEMORY = 227 * 1024, SM_MEMORY = 228 * 1024;

struct Device {
  int sms = 0, major = 0, block_memory = 0, sm_memory = 0;
};

inline int device_facts(Device& device) {
  static Device known[64];
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id)) return error;
  if (id >= 64 || known[id].sms == 0) {
    Device d;
    if (const cudaError_t error = cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, id)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, id)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&d.block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, id)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&d.sm_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id)) return error;
    if (id >= 64) {
      device = d;
      return 0;
    }
    known[id] = d;
  }
  device = known[id];
  return 0;
}

struct Plan {
  int columns, splits, blocks, rb, wk, teams, per_sm, stages;
  bool cluster, dependent;
};

template <class C>
int launch(Args args, Plan plan, const Device& device, int64_t workspace_bytes, cudaStream_t stream) {
  // 16 warps have 128 registers a thread, 8 have 255, which the formats of super-blocks need sooner.
  constexpr int WARPS = C::NT <= 2 || (C::RB <= 2 && !C::L::SUPER && C::F != QK_Q8_0) ? 16 : 8;
  const int warps = plan.teams * C::WK;
  if (warps > WARPS || plan.teams > 15) return QK_UNSUPPORTED;
  args.splits = plan.splits;
  args.teams = plan.teams;
  args.cluster = plan.cluster && plan.splits > 1;
  while (1 << args.log_splits < plan.splits) ++args.log_splits;
  if (args.cluster && (plan.splits > 8 || 1 << args.log_splits != plan.splits)) return QK_UNSUPPORTED;
  args.dependent = plan.dependent;
  args.slice = (args.k_tiles + plan.splits - 1) / plan.splits;
  args.x_rows = args.m < 8 * C::NT ? static_cast<int>(args.m) : 8 * C::NT;
  args.items *= C::PARTS;
  const int most = (args.items + plan.teams - 1) / plan.teams;
  const int64_t chunks = (args.m + 8 * C::NT - 1) / (8 * C::NT);
  const auto kernel = multiply<C, WARPS>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.block_memory)) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(warps * 32);
  config.stream = stream;
  config.attrs = attributes;
  if (args.cluster) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = plan.splits;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  int blocks = plan.blocks;
  if (!blocks) {
    // As many as run at once: of clusters fewer than the multiprocessors would make, since none spans two groups of these.
    int at_once = device.sms * plan.per_sm / plan.splits;
    if (args.cluster) {
      static thread_local int known[9][5];  // by splits and per_sm
      int& clusters = known[plan.splits][plan.per_sm < 4 ? plan.per_sm : 4];
      if (!clusters) {
        config.gridDim = dim3(plan.splits, at_once);
        config.dynamicSmemBytes = plan.per_sm <= 1 ? device.block_memory : device.sm_memory / plan.per_sm - 1024;
        if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return error;
      }
      if (clusters > 0 && clusters < at_once) at_once = clusters;
    }
    blocks = at_once / static_cast<int>(chunks < at_once ? chunks : at_once);
  }
  if (blocks < 1) blocks = 1;
  if (blocks > most) blocks = most;
  const int turns = (args.items + blocks * plan.teams - 1) / (blocks * plan.teams);  // items of a team, at most
  args.buffers = turns > 1 ? 2 : 1;
  const int work = turns * ((args.slice + C::WK - 1) / C::WK);  // tiles of a warp, at most
  const auto bytes = [&](int stages) {
    return C::shared(plan.teams, stages, args.x_rows, args.slice, plan.splits, args.buffers, args.cluster).total();
  };
  const int room = plan.per_sm <= 1 ? device.block_memory : device.sm_memory / plan.per_sm - 1024;
  int stages = plan.stages ? plan.stages : 32;
  if (stages > 32) stages = 32;  // a warp fills them at once
  if (stages > work) stages = work;
  while (stages > 1 && bytes(stages) > (plan.stages ? device.block_memory : room)) --stages;
  if (bytes(stages) > device.block_memory) return QK_UNSUPPORTED;
  args.stages = stages;
  if (chunks > 65535 || blocks > 65535) return QK_UNSUPPORTED;
  if (plan.splits > 1 && !args.cluster) {
    const int64_t counters = chunks * args.items;
    if (counters * 4 > QK_COUNTER_BYTES || QK_COUNTER_BYTES + counters * plan.splits * C::ALL_ROUNDS * C::THREADS * C::EACH * 4 > workspace_bytes) return QK_UNSUPPORTED;
  }
  config.gridDim = dim3(plan.splits, blocks, static_cast<unsigned>(chunks));
  config.dynamicSmemBytes = bytes(stages);
  if (args.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

// The shapes that are compiled: (rows of x / 8, 16-row blocks of a warp, warps of a team). Formats that take more instructions to unpack
// do better with more warps of fewer rows.
template <class T, int F, int G>
int launch_format(const Args& args, const Plan& plan, const Device& device, int64_t workspace_bytes, cudaStream_t stream) {
  constexpr bool LIGHT = F == QK_INT4 || F == QK_INT4Z;
#define QK_TRY(WHERE, NT, RB, WK) \
  if constexpr (WHERE) { \
    if (plan.columns == 8 * NT && plan.rb == RB && plan.wk == WK) \
      return launch<Traits<T, F, G, NT, RB, WK>>(args, plan, device, workspace_bytes, stream); \
  }
  QK_TRY(true, 1, 4, 8)
  QK_TRY(true, 1, 2, 8)
  QK_TRY(LIGHT, 1, 4, 4)
  QK_TRY(!LIGHT, 1, 2, 4)
  QK_TRY(true, 2, 2, 8)
  QK_TRY(true, 2, 2, 4)
  QK_TRY(LIGHT, 4, 4, 8)
  QK_TRY(true, 4, 2, 8)
#undef QK_TRY
  return QK_UNSUPPORTED;
}

// One for each source file, so that they compile side by side.
template <class T>
int launch_int4(const Args& args, const Plan& plan, const Device& device, int64_t workspace_bytes, cudaStream_t stream);
int launch_nf4(const Args& args, const Plan& plan, const Device& device, int64_t workspace_bytes, cudaStream_t stream);
int launch_q8_0(const Args& args, const Plan& plan, const Device& device, int64_t workspace_bytes, cudaStream_t stream);
template <class T>
int launch_kquant(const Args& args, const Plan& plan, const Device& device, int64_t workspace_bytes, cudaStream_t stream);

}  // namespace decode
}  // namespace qk
