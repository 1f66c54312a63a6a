// The kernels of attention's gradient for bf16, but Hopper's, compiled apart
// from the others to spread the compiler's work.

#include <cuda_bf16.h>

#include "xla_ops/cc/ops/attention_backward/attention_backward_kernels.cuh"

namespace xla_ops {

cudaError_t PrepareBackwardMmaBf16() {
  return PrepareBackwardMma<__nv_bfloat16>();
}

cudaError_t LaunchBackwardMmaBf16(cudaStream_t stream,
                                  const AttentionBackwardParams& params,
                                  const AttentionBackwardArgs& args) {
  return LaunchBackwardMma<__nv_bfloat16>(stream, params, args);
}

cudaError_t LaunchBackwardSimtBf16(cudaStream_t stream,
                                   const AttentionBackwardParams& params,
                                   const AttentionBackwardArgs& args) {
  return LaunchBackwardSimt<__nv_bfloat16>(stream, params, args);
}

}  // namespace xla_ops
