/* What a call of attention's gradient needs of its caller: the size of the
 * scratch result `workspace`. Plain C, in the manner of attention_plan.h:
 *
 *   XlaOpsAttentionBackwardRequest request = {sizeof(request), num_tokens,
 *                                             num_heads, num_kv_heads,
 *                                             head_dim, max_num_seqs};
 *   XlaOpsAttentionBackwardPlan plan = {sizeof(plan), 0};
 *   const char* error = xla_ops_attention_backward_plan(&request, &plan);
 *
 * Tested by attention_backward_plan_test.cc.
 */

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_PLAN_H_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_PLAN_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct XlaOpsAttentionBackwardRequest {
  int64_t struct_bytes; /* sizeof(XlaOpsAttentionBackwardRequest) */
  int64_t num_tokens;   /* of the query */
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t max_num_seqs;
} XlaOpsAttentionBackwardRequest;

typedef struct XlaOpsAttentionBackwardPlan {
  int64_t struct_bytes; /* sizeof(XlaOpsAttentionBackwardPlan) */
  int64_t workspace_bytes;
} XlaOpsAttentionBackwardPlan;

/* Returns null and fills in `plan`, or returns what is wrong with the request,
 * a text that lives as long as the library. */
__attribute__((visibility("default"))) const char*
xla_ops_attention_backward_plan(const XlaOpsAttentionBackwardRequest* request,
                                XlaOpsAttentionBackwardPlan* plan);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_PLAN_H_ */
