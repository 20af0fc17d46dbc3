// wgmma kernels of NF4.
#include "launch.cuh"

int qk::prefill_nf4(const Call& call) { return prefill_group<QK_NF4>(call); }
