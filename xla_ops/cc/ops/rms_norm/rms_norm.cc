// Operand checks of rms_norm, for every platform.

#include "xla_ops/cc/ops/rms_norm/rms_norm.h"

#include <cmath>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_checks.h"

namespace xla_ops {

ffi::Error MakeRmsNormParams(ffi::AnyBuffer input, ffi::AnyBuffer weight,
                             ffi::Result<ffi::AnyBuffer> out, float eps,
                             RmsNormParams* params) {
  constexpr char kOp[] = "rms_norm";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "input", input, kFloatDTypes));
  const auto dims = input.dimensions();
  if (dims.size() == 0) {
    return MustError(kOp, "input", "have rank 1 or more",
                     "shape " + FormatShape(dims));
  }
  const DType dtype = *ToDType(input.element_type());
  const int64_t hidden_size = dims.back();
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "weight", weight, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "weight", weight, {hidden_size}));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "out", out, input));
  // The comparison is false for NaN.
  if (!(eps > 0 && std::isfinite(eps))) {
    return MustError(kOp, "eps", "be positive and finite", FormatFloat(eps));
  }

  params->dtype = dtype;
  params->num_tokens = 1;
  for (const int64_t dim : dims.first(dims.size() - 1)) {
    params->num_tokens *= dim;
  }
  params->hidden_size = hidden_size;
  params->eps = eps;
  params->input = input.untyped_data();
  params->weight = weight.untyped_data();
  params->out = out->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
