#include "int4.cuh"
QK_INT4(__nv_bfloat16)
