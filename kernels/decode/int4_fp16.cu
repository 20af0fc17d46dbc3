#include "int4.cuh"
QK_INT4(__half)
