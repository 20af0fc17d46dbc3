// wgmma kernels of Q8_0.
#include "launch.cuh"

int qk::prefill_q8_0(const Call& call) { return prefill_type<QK_Q8_0, 32>(call); }
