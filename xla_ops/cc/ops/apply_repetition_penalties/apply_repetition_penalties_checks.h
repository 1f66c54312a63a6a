// From FFI operands to ApplyRepetitionPenaltiesParams; the CPU and the CUDA
// handler share it.
//
// Errors (InvalidArgument), each after "apply_repetition_penalties_: ", the
// name of the Python op:
//   logits must be float32, float16 or bfloat16, got int32
//   logits must have shape [num_seqs, vocab_size], got [4]
//   prompt_mask must be bool, got uint8
//   prompt_mask must have shape [4, 8], got [4, 9]
//   output_mask must ... (the same)
//   repetition_penalties must be float16, got float32
//   repetition_penalties must have shape [4], got [4, 1]
//   logits result must have shape [4, 8], got [4, 16]    (and dtype)
//
// Tested by apply_repetition_penalties_test.cc.

#ifndef XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_CHECKS_H_
#define XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto ApplyRepetitionPenaltiesBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // logits
      .Arg<xla::ffi::AnyBuffer>()   // prompt_mask
      .Arg<xla::ffi::AnyBuffer>()   // output_mask
      .Arg<xla::ffi::AnyBuffer>()   // repetition_penalties
      .Ret<xla::ffi::AnyBuffer>();  // logits
}

// Reads no buffer. Zero sizes are success.
xla::ffi::Error MakeApplyRepetitionPenaltiesParams(
    xla::ffi::AnyBuffer logits, xla::ffi::AnyBuffer prompt_mask,
    xla::ffi::AnyBuffer output_mask, xla::ffi::AnyBuffer penalties,
    xla::ffi::Result<xla::ffi::AnyBuffer> logits_result,
    ApplyRepetitionPenaltiesParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_CHECKS_H_
