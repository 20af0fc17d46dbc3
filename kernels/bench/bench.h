// What a kernel's time is compared with. Called by quantkit/ops/kernel_bench.py alone.
#pragma once
#include "quantkit.h"

#ifdef __cplusplus
extern "C" {
#endif

// Read `bytes` (a multiple of 16, 16-byte aligned) once and write nothing: the floor of a product that reads them. sink: 4 bytes, not touched.
int quantkit_bench_read(const void* data, int64_t bytes, void* sink, cudaStream_t stream);

// Nothing: what a launch costs.
int quantkit_bench_empty(cudaStream_t stream);

#ifdef __cplusplus
}
#endif
