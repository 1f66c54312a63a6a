// The plan of the CUDA library.

#include "xla_ops/cc/ops/attention/attention_num_splits.h"
#include "xla_ops/cc/ops/attention/attention_plan.h"

const char* xla_ops_attention_plan(const XlaOpsAttentionRequest* request,
                                   XlaOpsAttentionPlan* plan) {
  return xla_ops::MakeAttentionPlan(*request, /*can_split=*/true, plan);
}
