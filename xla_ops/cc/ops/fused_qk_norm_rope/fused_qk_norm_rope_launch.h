// The CUDA launcher of fused_qk_norm_rope; contract and parameters in
// fused_qk_norm_rope.h.

#ifndef XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_LAUNCH_H_
#define XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"

namespace xla_ops {

// Queues one kernel on `stream`, of parameters within CheckCudaLimits, which
// works on `out` alone; neither allocates
// nor synchronises. Any alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchFusedQkNormRope(cudaStream_t stream,
                                  const FusedQkNormRopeParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_LAUNCH_H_
