// The plan of the CUDA library.

#include "xla_ops/cc/ops/attention_backward/attention_backward_plan.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_workspace.h"

const char* xla_ops_attention_backward_plan(
    const XlaOpsAttentionBackwardRequest* request,
    XlaOpsAttentionBackwardPlan* plan) {
  return xla_ops::MakeAttentionBackwardPlan(*request, /*uses_workspace=*/true,
                                            plan);
}
