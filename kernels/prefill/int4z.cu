// wgmma kernels of INT4Z.
#include "launch.cuh"

int qk::prefill_int4z(const Call& call) { return prefill_group<QK_INT4Z>(call); }
