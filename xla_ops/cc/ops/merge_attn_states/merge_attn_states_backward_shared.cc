// Operand checks of merge_attn_states_backward, for every platform.

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "merge_attn_states_backward";

}  // namespace

ffi::Error MakeMergeAttnStatesBackwardParams(
    ffi::AnyBuffer grad_output, ffi::AnyBuffer grad_lse,
    ffi::AnyBuffer prefix_output, ffi::AnyBuffer prefix_lse,
    ffi::AnyBuffer suffix_output, ffi::AnyBuffer suffix_lse,
    ffi::Result<ffi::AnyBuffer> dprefix_output,
    ffi::Result<ffi::AnyBuffer> dprefix_lse,
    ffi::Result<ffi::AnyBuffer> dsuffix_output,
    ffi::Result<ffi::AnyBuffer> dsuffix_lse,
    MergeAttnStatesBackwardParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "prefix_output", prefix_output, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "prefix_output", prefix_output,
                                     {"num_tokens", "num_heads", "head_dim"}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "grad_output", grad_output, prefix_output));
  const auto dims = prefix_output.dimensions();
  const auto check_lse = [&dims](const char* name, ffi::AnyBuffer lse) {
    XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, name, lse, {DType::kF32}));
    return CheckShape(kOp, name, lse, {dims[1], dims[0]});
  };
  params->grad_lse = nullptr;
  if (grad_lse.dimensions().size() != 1 || grad_lse.dimensions()[0] != 0) {
    XLA_OPS_RETURN_IF_ERROR(check_lse("grad_lse", grad_lse));
    params->grad_lse = static_cast<const float*>(grad_lse.untyped_data());
  }
  XLA_OPS_RETURN_IF_ERROR(check_lse("prefix_lse", prefix_lse));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "suffix_output", suffix_output, prefix_output));
  XLA_OPS_RETURN_IF_ERROR(check_lse("suffix_lse", suffix_lse));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "dprefix_output", dprefix_output, prefix_output));
  XLA_OPS_RETURN_IF_ERROR(check_lse("dprefix_lse", *dprefix_lse));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "dsuffix_output", dsuffix_output, prefix_output));
  XLA_OPS_RETURN_IF_ERROR(check_lse("dsuffix_lse", *dsuffix_lse));

  params->dtype = *ToDType(prefix_output.element_type());
  params->num_tokens = dims[0];
  params->num_heads = dims[1];
  params->head_dim = dims[2];
  params->grad_output = grad_output.untyped_data();
  params->prefix_output = prefix_output.untyped_data();
  params->prefix_lse = static_cast<const float*>(prefix_lse.untyped_data());
  params->suffix_output = suffix_output.untyped_data();
  params->suffix_lse = static_cast<const float*>(suffix_lse.untyped_data());
  params->dprefix_output = dprefix_output->untyped_data();
  params->dprefix_lse = static_cast<float*>(dprefix_lse->untyped_data());
  params->dsuffix_output = dsuffix_output->untyped_data();
  params->dsuffix_lse = static_cast<float*>(dsuffix_lse->untyped_data());
  return ffi::Error::Success();
}

}  // namespace xla_ops
