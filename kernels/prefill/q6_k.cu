// wgmma kernels of Q6_K.
#include "launch.cuh"

int qk::prefill_q6_k(const Call& call) { return prefill_type<QK_Q6_K, 16>(call); }
