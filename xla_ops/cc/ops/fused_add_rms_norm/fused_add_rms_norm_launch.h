// The CUDA launcher of fused_add_rms_norm; contract in fused_add_rms_norm.h.

#ifndef XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_LAUNCH_H_
#define XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchFusedAddRmsNorm(cudaStream_t stream,
                                  const FusedAddRmsNormParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_LAUNCH_H_
