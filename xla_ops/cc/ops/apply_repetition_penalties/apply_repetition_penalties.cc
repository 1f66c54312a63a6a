// Operand checks of apply_repetition_penalties, for every platform.

#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties.h"

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties_checks.h"

namespace xla_ops {

ffi::Error MakeApplyRepetitionPenaltiesParams(
    ffi::AnyBuffer logits, ffi::AnyBuffer prompt_mask,
    ffi::AnyBuffer output_mask, ffi::AnyBuffer penalties,
    ffi::Result<ffi::AnyBuffer> logits_result,
    ApplyRepetitionPenaltiesParams* params) {
  constexpr char kOp[] = "apply_repetition_penalties_";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "logits", logits, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "logits", logits, {"num_seqs", "vocab_size"}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "prompt_mask", prompt_mask, {DType::kBool}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShapeOf(kOp, "prompt_mask", prompt_mask, logits));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "output_mask", output_mask, {DType::kBool}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShapeOf(kOp, "output_mask", output_mask, logits));
  params->dtype = *ToDType(logits.element_type());
  params->num_seqs = logits.dimensions()[0];
  params->vocab_size = logits.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "repetition_penalties", penalties, {params->dtype}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "repetition_penalties", penalties, {params->num_seqs}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "logits result", logits_result, logits));
  params->logits = logits.untyped_data();
  params->prompt_mask = static_cast<const uint8_t*>(prompt_mask.untyped_data());
  params->output_mask = static_cast<const uint8_t*>(output_mask.untyped_data());
  params->penalties = penalties.untyped_data();
  params->out = logits_result->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
