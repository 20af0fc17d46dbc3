// NF4 and NF4N: multiplied in fp16 whatever the type of x.
#include "launch.cuh"

namespace qk {
namespace decode {

int launch_nf4(const Args& args, const Plan& plan, const Device& device, int64_t bytes, cudaStream_t stream) {
  if (args.weight.format == QK_NF4N) return launch_format<__half, QK_NF4N, 64>(args, plan, device, bytes, stream);
  switch (args.weight.group) {
    case 128: return launch_format<__half, QK_NF4, 128>(args, plan, device, bytes, stream);
    case 64: return launch_format<__half, QK_NF4, 64>(args, plan, device, bytes, stream);
    case 32: return launch_format<__half, QK_NF4, 32>(args, plan, device, bytes, stream);
    default: return QK_UNSUPPORTED;
  }
}

}  // namespace decode
}  // namespace qk
