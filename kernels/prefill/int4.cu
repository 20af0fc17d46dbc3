// wgmma kernels of INT4.
#include "launch.cuh"

int qk::prefill_int4(const Call& call) { return prefill_group<QK_INT4>(call); }
