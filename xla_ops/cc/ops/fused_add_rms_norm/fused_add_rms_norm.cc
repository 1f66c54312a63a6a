// Operand checks of fused_add_rms_norm, for every platform.

#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm.h"

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm_checks.h"

namespace xla_ops {

ffi::Error MakeFusedAddRmsNormParams(ffi::AnyBuffer input,
                                     ffi::AnyBuffer residual,
                                     ffi::AnyBuffer weight,
                                     ffi::Result<ffi::AnyBuffer> out,
                                     ffi::Result<ffi::AnyBuffer> residual_out,
                                     float eps, FusedAddRmsNormParams* params) {
  constexpr char kOp[] = "fused_add_rms_norm";
  XLA_OPS_RETURN_IF_ERROR(BindRows(kOp, input, &params->dtype,
                                   &params->num_tokens, &params->hidden_size));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "residual", residual, input));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "weight", weight, {params->dtype}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "weight", weight, {params->hidden_size}));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "out", out, input));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "residual_out", residual_out, input));
  XLA_OPS_RETURN_IF_ERROR(CheckPositiveFinite(kOp, "eps", eps));

  params->eps = eps;
  params->input = input.untyped_data();
  params->residual = residual.untyped_data();
  params->weight = weight.untyped_data();
  params->out = out->untyped_data();
  params->residual_out = residual_out->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
