// The CUDA handler of merge_attn_states: checks operands, then launches the
// kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_merge_attn_states.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_checks.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(merge_attn_states, MergeAttnStatesBinding(),
                     MakeMergeAttnStatesParams, LaunchMergeAttnStates);

}  // namespace xla_ops
