// quantkit_matmul: the family of kernels that a configuration names, or that the shape asks for. Which configuration is best where is
// measured and kept in quantkit/ops/kernel_table.json; the rule here is for shapes that no table knows.
#include "quantkit.h"

namespace {

// Rows of x from which the tensor cores set the pace and wgmma, with twice the rate of mma, wins; and from which a dense product beats mma.
constexpr int64_t WGMMA_ROWS = 17, DENSE_ROWS = 33;

bool hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

}  // namespace

extern "C" int quantkit_interface(void) { return QK_INTERFACE; }

extern "C" int quantkit_matmul(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                               void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream) {
  const auto run = [&](auto family, const QkConfig* how) {
    return family(weight, x, m, ldx, x_type, bias, y, workspace, workspace_bytes, how, stream);
  };
  const int kernel = config ? config->kernel : QK_RULE;
  if (kernel == QK_WGMMA) return run(quantkit_matmul_wgmma, config);
  if (kernel == QK_MMA || kernel == QK_GEMV) return run(quantkit_matmul_mma, config);
  if (m >= WGMMA_ROWS && hopper()) {
    if (const int found = run(quantkit_matmul_wgmma, nullptr); found != QK_UNSUPPORTED) return found;
  }
  if (m >= DENSE_ROWS) return QK_UNSUPPORTED;
  const QkConfig dependent = {QK_MMA, 0, 0, 0, 1 << 9};  // weights are read under the tail of the kernel ahead
  return run(quantkit_matmul_mma, &dependent);
}
