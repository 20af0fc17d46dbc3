// The small operations between two products, each in one kernel. References and checks: quantkit/ops/fused.py.
// All round where torch's separate operations round, so a fused pass gives the same bits but for the order of a norm's sum.
#pragma once
#include "quantkit.h"

#ifdef __cplusplus
extern "C" {
#endif

// out [rows, columns] = silu(gate) * up; gate's and up's rows are so many elements apart.
int quantkit_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t columns,
                      int type, cudaStream_t stream);

// out [rows, columns] = v / rms(v) * (offset + weight [columns]); v is x, or x + residual, which then goes to sum.
int quantkit_rms_norm(const void* x, const void* residual, const void* weight, void* sum, void* out, int64_t rows, int64_t columns,
                      float eps, float offset, int type, cudaStream_t stream);

// Rotate the first `width` elements of every head of q [tokens, heads, dim] into q_out and of k [tokens, kv_heads, dim] into a cache, and
// copy v there: token t goes to row slots[t] of keys and values [places, kv_heads, dim], or nowhere where that is negative. cos, sin
// [tokens, width / 2]; slots is the device's. fp8: keys and values are float8 e4m3, of scale 1, and saturate.
int quantkit_rotary_write(const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                          const void* cos, const void* sin, const int64_t* slots, void* q_out, void* keys, void* values,
                          int64_t tokens, int heads, int kv_heads, int dim, int width, int type, int fp8, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
