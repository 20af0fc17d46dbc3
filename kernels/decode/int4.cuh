// Instances of INT4 and INT4Z for one type of x.
#pragma once
#include "launch.cuh"

#define QK_INT4(TYPE) \
  namespace qk { \
  namespace decode { \
  template <> \
  int launch_int4<TYPE>(const Args& args, const Plan& plan, const Device& device, int64_t bytes, cudaStream_t stream) { \
    using T = TYPE; \
    switch (args.weight.format * 256 + args.weight.group) { \
      case QK_INT4 * 256 + 128: return launch_format<T, QK_INT4, 128>(args, plan, device, bytes, stream); \
      case QK_INT4Z * 256 + 128: return launch_format<T, QK_INT4Z, 128>(args, plan, device, bytes, stream); \
      case QK_INT4 * 256 + 64: return launch_format<T, QK_INT4, 64>(args, plan, device, bytes, stream); \
      case QK_INT4Z * 256 + 64: return launch_format<T, QK_INT4Z, 64>(args, plan, device, bytes, stream); \
      case QK_INT4 * 256 + 32: return launch_format<T, QK_INT4, 32>(args, plan, device, bytes, stream); \
      case QK_INT4Z * 256 + 32: return launch_format<T, QK_INT4Z, 32>(args, plan, device, bytes, stream); \
      default: return QK_UNSUPPORTED; \
    } \
  } \
  } \
  }
