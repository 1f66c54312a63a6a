// What both libraries' xla_ops_attention_plan (attention_plan.h) share.
//
// Tested by attention_plan_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_NUM_SPLITS_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_NUM_SPLITS_H_

#include <cstdint>

#include "xla_ops/cc/ops/attention/attention_plan.h"

namespace xla_ops {

// Into how many pieces the CUDA kernels should cut each sequence's KV tokens.
// `rows` are query tokens times KV heads.
int64_t ChooseNumSplits(int64_t rows, int64_t max_kv_len);

// xla_ops_attention_plan; `can_split`: the handler makes use of splits.
const char* MakeAttentionPlan(const XlaOpsAttentionRequest& request,
                              bool can_split, XlaOpsAttentionPlan* plan);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_NUM_SPLITS_H_
