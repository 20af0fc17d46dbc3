#include "kquant.cuh"
QK_KQUANT(__nv_bfloat16)
