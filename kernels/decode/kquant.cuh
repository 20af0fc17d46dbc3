// Instances of Q4_K, Q5_K and Q6_K for one type of x.
#pragma once
#include "launch.cuh"

#define QK_KQUANT(TYPE) \
  namespace qk { \
  namespace decode { \
  template <> \
  int launch_kquant<TYPE>(const Args& args, const Plan& plan, const Device& device, int64_t bytes, cudaStream_t stream) { \
    switch (args.weight.format) { \
      case QK_Q4_K: return launch_format<TYPE, QK_Q4_K, 32>(args, plan, device, bytes, stream); \
      case QK_Q5_K: return launch_format<TYPE, QK_Q5_K, 32>(args, plan, device, bytes, stream); \
      case QK_Q6_K: return launch_format<TYPE, QK_Q6_K, 16>(args, plan, device, bytes, stream); \
      default: return QK_UNSUPPORTED; \
    } \
  } \
  } \
  }
