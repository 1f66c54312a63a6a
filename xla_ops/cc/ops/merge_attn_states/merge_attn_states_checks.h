// From FFI operands to MergeAttnStatesParams; the CPU and the CUDA handler
// share it.
//
// Errors (InvalidArgument), each after "merge_attn_states: ":
//   prefix_output must be float32, float16 or bfloat16, got int32
//   prefix_output must have shape [num_tokens, num_heads, head_dim], got [4]
//   prefix_lse must be float32, got float16
//   prefix_lse must have shape [8, 4], got [4, 8]
//   suffix_output must be float16, got float32    (and shape)
//   suffix_lse, output, output_lse                likewise
//
// Tested by merge_attn_states_test.cc.

#ifndef XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_CHECKS_H_
#define XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto MergeAttnStatesBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // prefix_output
      .Arg<xla::ffi::AnyBuffer>()   // prefix_lse
      .Arg<xla::ffi::AnyBuffer>()   // suffix_output
      .Arg<xla::ffi::AnyBuffer>()   // suffix_lse
      .Ret<xla::ffi::AnyBuffer>()   // output
      .Ret<xla::ffi::AnyBuffer>();  // output_lse
}

// Reads no buffer. Zero sizes are success.
xla::ffi::Error MakeMergeAttnStatesParams(
    xla::ffi::AnyBuffer prefix_output, xla::ffi::AnyBuffer prefix_lse,
    xla::ffi::AnyBuffer suffix_output, xla::ffi::AnyBuffer suffix_lse,
    xla::ffi::Result<xla::ffi::AnyBuffer> output,
    xla::ffi::Result<xla::ffi::AnyBuffer> output_lse,
    MergeAttnStatesParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_MERGE_ATTN_STATES_MERGE_ATTN_STATES_CHECKS_H_
