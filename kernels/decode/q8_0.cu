// Q8_0: multiplied in fp16 whatever the type of x.
#include "launch.cuh"

namespace qk {
namespace decode {

int launch_q8_0(const Args& args, const Plan& plan, const Device& device, int64_t bytes, cudaStream_t stream) {
  return launch_format<__half, QK_Q8_0, 32>(args, plan, device, bytes, stream);
}

}  // namespace decode
}  // namespace qk
