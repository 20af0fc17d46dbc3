#include "kquant.cuh"
QK_KQUANT(__half)
