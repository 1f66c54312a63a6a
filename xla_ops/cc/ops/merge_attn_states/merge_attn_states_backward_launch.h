// The CUDA launcher of merge_attn_states_backward; contract and parameters in
// merge_attn_states_backward.h.

#ifndef XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_LAUNCH_H_
#define XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchMergeAttnStatesBackward(
    cudaStream_t stream, const MergeAttnStatesBackwardParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_LAUNCH_H_
