// quantkit_matmul: the family of kernels that a configuration names, or that the shape asks for. Which configuration is best where is
// measured and kept in quantkit/ops/kernel_table.json; the rule here serves callers without a table.
#include "quantkit.h"

namespace {

bool hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

}  // namespace

extern "C" int quantkit_matmul(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                               void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream) {
  const auto run = [&](auto family) {
    return family(weight, x, m, ldx, x_type, bias, y, workspace, workspace_bytes, config, stream);
  };
  const int kernel = config ? config->kernel : QK_RULE;
  if (kernel == QK_WGMMA) return run(quantkit_matmul_wgmma);
  if (kernel == QK_RULE && m >= 64 && hopper()) {  // where the tensor cores set the pace, and wgmma has twice the rate of mma
    if (const int found = run(quantkit_matmul_wgmma); found != QK_UNSUPPORTED) return found;
  }
  // mma unpacks a weight again for every 64 rows of x: above two of those the caller does better to unpack it once.
  if (kernel == QK_RULE && m > 128) return QK_UNSUPPORTED;
  return run(quantkit_matmul_mma);
}
