// wgmma kernels of NF4 with nested scales.
#include "launch.cuh"

int qk::prefill_nf4n(const Call& call) { return prefill_type<QK_NF4N, 64>(call); }
