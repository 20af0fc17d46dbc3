// quantkit_matmul: the family of kernels that a configuration names, or that the shape asks for. Which configuration is best where is
// measured and kept in quantkit/ops/kernel_table.json; the rule here is for shapes that no table knows.
#include "quantkit.h"

namespace {

// Rows of x from which the tensor cores set the pace and wgmma, with twice the rate of mma, wins; and from which a dense product beats mma.
constexpr int64_t WGMMA_ROWS = 17, DENSE_ROWS = 33;

// Tiles of y as large as its rows fill, K shared by clusters where they would leave multiprocessors idle. See prefill/matmul.cu.
QkConfig wgmma_rule(int64_t n, int64_t k, int64_t m, int multiprocessors) {
  const auto tiles = [&](int64_t rows) { return (m + rows - 1) / rows * ((n + 127) / 128); };
  int64_t rows = 16;
  while (rows < m && rows < 256) rows *= 2;
  if (rows == 256 && tiles(256) < multiprocessors) rows = 128;
  int64_t splits = multiprocessors / tiles(rows);
  if (splits > 8) splits = 8;
  if (splits > k / 512) splits = k / 512;
  QkConfig config = {QK_WGMMA, static_cast<int32_t>(rows), 2, static_cast<int32_t>(splits), 2};
  if (splits < 1) config.c = tiles(rows) > multiprocessors ? -1 : 1;
  return config;
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}

}  // namespace

extern "C" int quantkit_matmul(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                               void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream) {
  const auto run = [&](auto family, const QkConfig* how) {
    return family(weight, x, m, ldx, x_type, bias, y, workspace, workspace_bytes, how, stream);
  };
  const int kernel = config ? config->kernel : QK_RULE;
  if (kernel == QK_WGMMA) return run(quantkit_matmul_wgmma, config);
  if (kernel == QK_MMA || kernel == QK_GEMV) return run(quantkit_matmul_mma, config);
  if (m >= WGMMA_ROWS && attribute(cudaDevAttrComputeCapabilityMajor) == 9) {
    const QkConfig rule = wgmma_rule(weight->n, weight->k, m, attribute(cudaDevAttrMultiProcessorCount));
    if (const int found = run(quantkit_matmul_wgmma, &rule); found != QK_UNSUPPORTED) return found;
  }
  return m < DENSE_ROWS ? run(quantkit_matmul_mma, nullptr) : QK_UNSUPPORTED;
}
