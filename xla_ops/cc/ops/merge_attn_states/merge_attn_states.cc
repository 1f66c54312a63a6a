// Operand checks of merge_attn_states, for every platform.

#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states.h"

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_checks.h"

namespace xla_ops {

ffi::Error MakeMergeAttnStatesParams(ffi::AnyBuffer prefix_output,
                                     ffi::AnyBuffer prefix_lse,
                                     ffi::AnyBuffer suffix_output,
                                     ffi::AnyBuffer suffix_lse,
                                     ffi::Result<ffi::AnyBuffer> output,
                                     ffi::Result<ffi::AnyBuffer> output_lse,
                                     MergeAttnStatesParams* params) {
  constexpr char kOp[] = "merge_attn_states";
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "prefix_output", prefix_output, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "prefix_output", prefix_output,
                                     {"num_tokens", "num_heads", "head_dim"}));
  const auto dims = prefix_output.dimensions();
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "prefix_lse", prefix_lse, {DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "prefix_lse", prefix_lse, {dims[1], dims[0]}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "suffix_output", suffix_output, prefix_output));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "suffix_lse", suffix_lse, prefix_lse));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "output", output, prefix_output));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "output_lse", output_lse, prefix_lse));

  params->dtype = *ToDType(prefix_output.element_type());
  params->num_tokens = dims[0];
  params->num_heads = dims[1];
  params->head_dim = dims[2];
  params->prefix_output = prefix_output.untyped_data();
  params->prefix_lse = static_cast<const float*>(prefix_lse.untyped_data());
  params->suffix_output = suffix_output.untyped_data();
  params->suffix_lse = static_cast<const float*>(suffix_lse.untyped_data());
  params->output = output->untyped_data();
  params->output_lse = static_cast<float*>(output_lse->untyped_data());
  return ffi::Error::Success();
}

}  // namespace xla_ops
