// The C interface of quantkit's CUDA library. Plain structs and pointers, so that ctypes can call it; no torch.
// Every function returns 0, a cudaError_t, or QK_UNSUPPORTED. None allocates or synchronises: all can be captured in a graph.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#define QK_UNSUPPORTED (-1)
#define QK_INTERFACE 3  // of this header and the others that Python calls; one more with each change of what a function takes
#define QK_COUNTER_BYTES 65536  // of the workspace: zero at first, and left zero by every kernel

enum QkType { QK_FP16 = 0, QK_BF16 = 1 };
enum QkFormat { QK_INT4 = 0, QK_INT4Z = 1, QK_NF4 = 2, QK_NF4N = 3, QK_Q4_K = 4, QK_Q5_K = 5, QK_Q6_K = 6, QK_Q8_0 = 7 };
enum QkKernel { QK_RULE = 0, QK_MMA = 1, QK_WGMMA = 2, QK_GEMV = 3 };

#ifdef __cplusplus
extern "C" {
#endif

int quantkit_interface(void);  // QK_INTERFACE of the sources that the library was built from

typedef struct QkWeight {
  const void* tiles;    // see tiles.cuh; 128-byte aligned
  const void* table;    // float[16]: what a 4-bit index stands for; NF4, NF4N
  const void* code;     // float[256]: what an absmax code stands for; NF4N
  const void* absmax2;  // float[]: NF4N; as long as the largest block index of the padded matrix asks for
  const void* offsets;  // float[ceil(n / 64)]: added to an absmax of 64 rows; NF4N
  int32_t format;       // QkFormat
  int32_t scale_type;   // QkType of INT4's and INT4Z's scales
  int32_t group;        // columns that share a scale within a tile: 32, 64 or 128 (which also stands for anything longer);
                        // 32 for Q4_K, Q5_K, Q8_0; 16 for Q6_K; 64 for NF4N
  int64_t n, k;         // true sizes, before padding
  int64_t block0, block_row_stride;  // NF4N: block index of columns 64 b to 64 b + 63 of a row = block0 + row * block_row_stride + b
} QkWeight;

typedef struct QkConfig {
  int32_t kernel;      // QkKernel; QK_RULE: the library chooses
  int32_t a, b, c, d;  // by kernel: tile, splits, stages ...
} QkConfig;

// out [n, k] row-major of out_type: the float32 value of each weight, rounded once.
int quantkit_dequantize(const QkWeight* weight, void* out, int out_type, cudaStream_t stream);

// y [m, n] = x [m, k] W^T (+ bias [n]); x and y (and bias) of x_type, x's rows ldx elements apart, sums in float32.
// config may be null: the library chooses.
int quantkit_matmul(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                    void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream);
int quantkit_matmul_mma(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                        void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream);
int quantkit_matmul_wgmma(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                          void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
