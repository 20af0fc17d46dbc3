// wgmma kernels of Q5_K.
#include "launch.cuh"

int qk::prefill_q5_k(const Call& call) { return prefill_type<QK_Q5_K, 32>(call); }
