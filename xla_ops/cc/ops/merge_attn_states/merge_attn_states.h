// Merges two attention results over disjoint keys (a shared prefix and the
// rest) by their log-sum-exps. For token t and head h, with p and s the two
// lse values and m = max(p, s):
//   wp = exp(p - m) / (exp(p - m) + exp(s - m)),  ws likewise
//   output = T(prefix * wp + suffix * ws)
//   lse    = log(exp(p - m) + exp(s - m)) + m
// all in fp32 until the one rounding to the tensor's type T. An lse of +inf
// is taken as -inf, "no key seen", which some attention kernels write so.
// Where both are, output = prefix and lse = -inf. A side of weight zero adds
// nothing, whatever it holds (vLLM: NaN if it holds NaN). NaN in an lse gives
// NaN.
//
// Target `xla_ops.merge_attn_states`:
//   args     prefix_output [num_tokens, num_heads, head_dim]  fp32, fp16, bf16
//            prefix_lse    [num_heads, num_tokens]  f32
//            suffix_output, suffix_lse              likewise
//   results  output        like prefix_output
//            output_lse    like prefix_lse
// head_dim is any number; vLLM asks for a multiple of 16 bytes.
// `output` may lie in the buffer of prefix_output or suffix_output; output_lse
// lies in no argument's.
//
// Source: section 2.2 of Ye et al., "FlashInfer: Efficient and Customizable
// Attention Engine for LLM Inference Serving", 2025.
//
// Tested by merge_attn_states_test.cc and tests/ops/test_merge_attn_states.py.

#ifndef XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_H_
#define XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct MergeAttnStatesParams {
  DType dtype;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_dim;
  const void* prefix_output;  // [num_tokens, num_heads, head_dim]
  const float* prefix_lse;    // [num_heads, num_tokens]
  const void* suffix_output;  // [num_tokens, num_heads, head_dim]
  const float* suffix_lse;    // [num_heads, num_tokens]
  void* output;               // [num_tokens, num_heads, head_dim]
  float* output_lse;          // [num_heads, num_tokens]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_H_
