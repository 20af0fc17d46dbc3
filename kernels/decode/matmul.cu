// quantkit_matmul_mma: checks, and the configuration where none is given.
#include "launch.cuh"

namespace qk {
namespace decode {
namespace {

// By measurement on an H100 (kernels/README.md): enough blocks to keep every multiprocessor at work, K split no further than that takes or
// than x's part needs to leave room for the rings. Two blocks to a multiprocessor where x is small and no team has a second item.
Plan make_plan(const Args& args, const Device& device, const QkConfig* config) {
  const int a = config ? config->a : 0, b = config ? config->b : 0, c = config ? config->c : 0, d = config ? config->d : 0;
  const int format = args.weight.format;
  const bool light = format == QK_INT4 || format == QK_INT4Z, lookup = format == QK_NF4 || format == QK_NF4N;
  Plan plan = {};
  plan.columns = a ? a : args.m <= 8 ? 8 : args.m <= 16 ? 16 : 32;
  plan.rb = c & 15 ? c & 15 : (light && plan.columns != 16) || (lookup && plan.columns == 8) ? 4 : 2;
  plan.wk = c >> 4 & 255 ? c >> 4 & 255 : 8;
  plan.teams = c >> 12 & 255;
  plan.per_sm = c >> 20;
  plan.splits = b & 255;
  plan.blocks = b >> 8;
  plan.stages = d & 255;
  plan.cluster = device.major >= 9 && !(d & WORKSPACE);
  plan.dependent = device.major >= 9 && (d & DEPENDENT);
  const int64_t x_bytes = static_cast<int64_t>(args.k_tiles) * tile_columns(format) * (args.m < plan.columns ? args.m : plan.columns) * 2;
  const int64_t items = static_cast<int64_t>(args.items) * 4 / plan.rb, chunks = (args.m + plan.columns - 1) / plan.columns;
  const auto choose = [&](int per_sm, int teams, int64_t x_limit) {  // false: x does not fit
    if (!plan.teams) plan.teams = teams;
    if (!plan.per_sm) plan.per_sm = per_sm;
    if (plan.splits) return true;
    const int64_t blocks = (items + plan.teams - 1) / plan.teams * chunks;
    int splits = 1;
    while (splits < 8 && 2 * splits * blocks <= device.sms * plan.per_sm && 2 * splits * plan.wk <= 2 * args.k_tiles) splits *= 2;
    while (splits < 8 && x_bytes / splits > x_limit) splits *= 2;
    plan.splits = splits;
    return x_bytes / splits <= x_limit;
  };
  const Plan given = plan;
  if (plan.columns == 8 && items * chunks <= 2 * device.sms && choose(2, 1, device.block_memory / 6)) return plan;
  plan = given;
  const bool many = plan.columns == 16 || (!light && plan.columns == 8);
  choose(1, many ? 2 : 1, plan.columns == 8 || (lookup && plan.columns == 16) ? device.block_memory * 3 / 10 : device.block_memory * 6 / 10);
  return plan;
}

}  // namespace
}  // namespace decode
}  // namespace qk

extern "C" int quantkit_matmul_mma(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                                   void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream) {
  using namespace qk::decode;
  if (m <= 0 || weight->n <= 0) return 0;
  Device device;
  if (const int error = device_facts(device)) return error;
  const int64_t columns = qk::tile_columns(weight->format);
  const int64_t strips = (weight->n + 63) / 64, k_tiles = (weight->k + columns - 1) / columns;
  if (strips > INT32_MAX / 64 || k_tiles > INT32_MAX / 256) return QK_UNSUPPORTED;
  Args args = {};
  args.weight = *weight;
  if (args.weight.group > 128) args.weight.group = 128;
  args.tiles = static_cast<const uint8_t*>(weight->tiles);
  args.x = static_cast<const uint8_t*>(x);
  args.bias = bias;
  args.y = y;
  args.counters = static_cast<uint32_t*>(workspace);
  args.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + QK_COUNTER_BYTES);
  args.ldx = ldx;
  args.m = m;
  args.bf16 = x_type == QK_BF16;
  args.n = weight->n;
  args.k = weight->k;
  args.items = static_cast<int>(strips);
  args.k_tiles = static_cast<int>(k_tiles);
  args.vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0 && ldx % 8 == 0;
  const Plan plan = make_plan(args, device, config);
  switch (weight->format) {
    case QK_INT4:
    case QK_INT4Z:
      return x_type == QK_FP16 ? launch_int4<__half>(args, plan, device, workspace_bytes, stream)
                               : launch_int4<__nv_bfloat16>(args, plan, device, workspace_bytes, stream);
    case QK_NF4:
    case QK_NF4N: return launch_nf4(args, plan, device, workspace_bytes, stream);
    case QK_Q8_0: return launch_q8_0(args, plan, device, workspace_bytes, stream);
    default:
      return x_type == QK_FP16 ? launch_kquant<__half>(args, plan, device, workspace_bytes, stream)
                               : launch_kquant<__nv_bfloat16>(args, plan, device, workspace_bytes, stream);
  }
}
