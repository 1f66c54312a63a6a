// What both libraries' xla_ops_attention_plan (attention_plan.h) share.
//
// Tested by attention_plan_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_NUM_SPLITS_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_NUM_SPLITS_H_

#include <cstdint>

#include "xla_ops/cc/ops/attention/attention_plan.h"

namespace xla_ops {

// Into how many pieces the CUDA kernels should cut each sequence's KV tokens,
// by the tiles that the kernel of such a call has (attention_choice.h).
int64_t ChooseNumSplits(const XlaOpsAttentionRequest& request);

// The same from the number of tiles, times KV heads: for decode, whose time is
// that of bytes on the way, and for prefill, a tile a multiprocessor.
int64_t ChooseDecodeSplits(int64_t tiles, int64_t max_kv_len);
int64_t ChoosePrefillSplits(int64_t tiles, int64_t max_kv_len);

// How many slots a call of one split should have (attention.h), for the kernel
// for decode to cut long sequences among short ones; 0 where none can be long.
int64_t ChooseNumSlots(const XlaOpsAttentionRequest& request);

// xla_ops_attention_plan; `can_split`: the handler makes use of splits.
const char* MakeAttentionPlan(const XlaOpsAttentionRequest& request,
                              bool can_split, XlaOpsAttentionPlan* plan);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_NUM_SPLITS_H_
