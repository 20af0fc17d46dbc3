// wgmma kernels of Q4_K.
#include "launch.cuh"

int qk::prefill_q4_k(const Call& call) { return prefill_type<QK_Q4_K, 32>(call); }
