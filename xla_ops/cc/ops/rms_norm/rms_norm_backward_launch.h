// The CUDA launcher of rms_norm_backward; contract and parameters in
// rms_norm_backward.h.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_LAUNCH_H_
#define XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/rms_norm/rms_norm_backward.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchRmsNormBackward(cudaStream_t stream,
                                  const RmsNormBackwardParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_LAUNCH_H_
