// What both libraries' xla_ops_attention_backward_plan share.
//
// Tested by attention_backward_plan_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_WORKSPACE_H_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_WORKSPACE_H_

#include "xla_ops/cc/ops/attention_backward/attention_backward_plan.h"

namespace xla_ops {

// xla_ops_attention_backward_plan; `uses_workspace`: the handler works there.
const char* MakeAttentionBackwardPlan(
    const XlaOpsAttentionBackwardRequest& request, bool uses_workspace,
    XlaOpsAttentionBackwardPlan* plan);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_WORKSPACE_H_
