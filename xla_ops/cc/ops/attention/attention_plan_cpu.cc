// The plan of the CPU library, whose handler ignores num_splits.

#include "xla_ops/cc/ops/attention/attention_num_splits.h"
#include "xla_ops/cc/ops/attention/attention_plan.h"

const char* xla_ops_attention_plan(const XlaOpsAttentionRequest* request,
                                   XlaOpsAttentionPlan* plan) {
  return xla_ops::MakeAttentionPlan(*request, /*can_split=*/false, plan);
}
