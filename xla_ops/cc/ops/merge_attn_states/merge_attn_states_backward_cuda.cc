// The CUDA handler of merge_attn_states_backward: checks operands, then
// launches the kernel on XLA's stream.
//
// Tested by tests/gpu/check_gradients.py and
// tests/ops/test_merge_attn_states_backward.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward_checks.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(merge_attn_states_backward,
                     MergeAttnStatesBackwardBinding(),
                     MakeMergeAttnStatesBackwardParams,
                     LaunchMergeAttnStatesBackward);

}  // namespace xla_ops
