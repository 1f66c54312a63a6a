// The gradients of merge_attn_states (merge_attn_states.h). With wp and ws the
// weights of a token and head, g of output's gradient and l of output_lse's:
//
//   dprefix_output = T(wp g)         dsuffix_output = T(ws g)
//   dprefix_lse = wp ws c + wp l     dsuffix_lse = ws l - wp ws c,
//   where c = sum over head_dim of g * (prefix - suffix)
//
// all in fp32 until the one rounding to the tensor's type T. A side of weight
// zero has no part in c, whatever it holds, and gets zeros; where both sides
// are empty, prefix gets g and both lse get 0.
//
// Target `xla_ops.merge_attn_states_backward`:
//   args     grad_output    [num_tokens, num_heads, head_dim] fp32, fp16, bf16
//            grad_lse       [num_heads, num_tokens]  f32; [0]: none
//            prefix_output  like grad_output
//            prefix_lse     [num_heads, num_tokens]  f32
//            suffix_output, suffix_lse               likewise
//   results  dprefix_output, dprefix_lse, dsuffix_output, dsuffix_lse
// Any size may be zero.
//
// Tested by merge_attn_states_backward_test.cc and
// tests/ops/test_merge_attn_states_backward.py.

#ifndef XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_H_
#define XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct MergeAttnStatesBackwardParams {
  DType dtype;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_dim;
  const void* grad_output;    // [num_tokens, num_heads, head_dim]
  const float* grad_lse;      // [num_heads, num_tokens] or null
  const void* prefix_output;  // [num_tokens, num_heads, head_dim]
  const float* prefix_lse;    // [num_heads, num_tokens]
  const void* suffix_output;  // [num_tokens, num_heads, head_dim]
  const float* suffix_lse;    // [num_heads, num_tokens]
  void* dprefix_output;       // [num_tokens, num_heads, head_dim]
  float* dprefix_lse;         // [num_heads, num_tokens]
  void* dsuffix_output;       // [num_tokens, num_heads, head_dim]
  float* dsuffix_lse;         // [num_heads, num_tokens]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_H_
