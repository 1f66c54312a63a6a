// The CUDA launcher of activation_backward; contract and parameters in
// activation_backward.h.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_LAUNCH_H_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/activation/activation_backward.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchActivationBackward(cudaStream_t stream,
                                     const ActivationBackwardParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_LAUNCH_H_
