/* What a call of attention needs of its caller, asked of the library before
 * the call is built: into how many pieces to cut the KV tokens (the attribute
 * num_splits) and how large the scratch result `workspace` has to be. Plain C,
 * without XLA, CUDA or torch, for any host program:
 *
 *   XlaOpsAttentionRequest request = {sizeof(request), num_tokens, num_heads,
 *                                     num_kv_heads, head_dim, max_num_seqs,
 *                                     max_kv_len, 0};
 *   XlaOpsAttentionPlan plan = {sizeof(plan), 0, 0};
 *   const char* error = xla_ops_attention_plan(&request, &plan);
 *
 * Each library answers for its own platform, from numbers alone: no device is
 * touched, and none need be there. A plan holds for every batch within the
 * request's bounds. All fields are int64_t and the first is the struct's size
 * in bytes, so a caller may pass arrays, and later versions may add fields at
 * the end: a library refuses a struct that is smaller than its own first one,
 * and fills in no more than the caller has room for.
 *
 * Tested by attention_plan_test.cc and
 * tests/ops/test_flash_attn_varlen_calls.py.
 */

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_PLAN_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_PLAN_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct XlaOpsAttentionRequest {
  int64_t struct_bytes; /* sizeof(XlaOpsAttentionRequest) */
  int64_t num_tokens;   /* of the query */
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t max_num_seqs;
  int64_t max_kv_len; /* a bound of a sequence's KV tokens, as far as known */
  int64_t num_splits; /* 0: the library chooses; else 1 to 1024, as given */
} XlaOpsAttentionRequest;

typedef struct XlaOpsAttentionPlan {
  int64_t struct_bytes; /* sizeof(XlaOpsAttentionPlan) */
  int64_t num_splits;
  int64_t workspace_bytes;
} XlaOpsAttentionPlan;

/* Returns null and fills in `plan`, or returns what is wrong with the request,
 * a text that lives as long as the library. */
__attribute__((visibility("default"))) const char* xla_ops_attention_plan(
    const XlaOpsAttentionRequest* request, XlaOpsAttentionPlan* plan);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* XLA_OPS_CC_OPS_ATTENTION_ATTENTION_PLAN_H_ */
