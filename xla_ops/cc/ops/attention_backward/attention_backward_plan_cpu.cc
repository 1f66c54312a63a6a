// The plan of the CPU library, whose handler takes memory of its own.

#include "xla_ops/cc/ops/attention_backward/attention_backward_plan.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_workspace.h"

const char* xla_ops_attention_backward_plan(
    const XlaOpsAttentionBackwardRequest* request,
    XlaOpsAttentionBackwardPlan* plan) {
  return xla_ops::MakeAttentionBackwardPlan(*request, /*uses_workspace=*/false,
                                            plan);
}
