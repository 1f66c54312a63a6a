// From FFI operands to MergeAttnStatesBackwardParams; the CPU and the CUDA
// handler share it.
//
// Errors (InvalidArgument), in the order of the checks, each after
// "merge_attn_states_backward: "; the results' are like the last two:
//   prefix_output must be float32, float16 or bfloat16, got int32
//   prefix_output must have shape [num_tokens, num_heads, head_dim], got [4, 8]
//   grad_output must be float16, got float32
//   grad_output must have shape [4, 2, 8], got [4, 2, 16]
//   grad_lse must be float32, got float16
//   grad_lse must have shape [2, 4], got [4, 2]
//   prefix_lse must be float32, got float16
//   prefix_lse must have shape [2, 4], got [4, 2]
//   suffix_output must be float16, got float32
//   suffix_output must have shape [4, 2, 8], got [4, 2, 16]
//   suffix_lse must be float32, got float16
//   suffix_lse must have shape [2, 4], got [4, 2]
//
// Tested by merge_attn_states_backward_test.cc.

#ifndef XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_CHECKS_H_
#define XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto MergeAttnStatesBackwardBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // grad_output
      .Arg<xla::ffi::AnyBuffer>()   // grad_lse
      .Arg<xla::ffi::AnyBuffer>()   // prefix_output
      .Arg<xla::ffi::AnyBuffer>()   // prefix_lse
      .Arg<xla::ffi::AnyBuffer>()   // suffix_output
      .Arg<xla::ffi::AnyBuffer>()   // suffix_lse
      .Ret<xla::ffi::AnyBuffer>()   // dprefix_output
      .Ret<xla::ffi::AnyBuffer>()   // dprefix_lse
      .Ret<xla::ffi::AnyBuffer>()   // dsuffix_output
      .Ret<xla::ffi::AnyBuffer>();  // dsuffix_lse
}

// Reads no buffer.
xla::ffi::Error MakeMergeAttnStatesBackwardParams(
    xla::ffi::AnyBuffer grad_output, xla::ffi::AnyBuffer grad_lse,
    xla::ffi::AnyBuffer prefix_output, xla::ffi::AnyBuffer prefix_lse,
    xla::ffi::AnyBuffer suffix_output, xla::ffi::AnyBuffer suffix_lse,
    xla::ffi::Result<xla::ffi::AnyBuffer> dprefix_output,
    xla::ffi::Result<xla::ffi::AnyBuffer> dprefix_lse,
    xla::ffi::Result<xla::ffi::AnyBuffer> dsuffix_output,
    xla::ffi::Result<xla::ffi::AnyBuffer> dsuffix_lse,
    MergeAttnStatesBackwardParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_BACKWARD_CHECKS_H_
