// Operand checks of scale_rows, for every platform. A program may come from
// elsewhere than mine/__init__.py, so they are not left to Python.

#include "scale_rows.h"

#include "scale_rows_checks.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/error.h"

namespace mine {

ffi::Error MakeScaleRowsParams(ffi::AnyBuffer input, ffi::AnyBuffer scale,
                               ffi::Result<ffi::AnyBuffer> out,
                               ScaleRowsParams* params) {
  constexpr char kOp[] = "scale_rows";
  XLA_OPS_RETURN_IF_ERROR(
      xla_ops::CheckDType(kOp, "input", input, xla_ops::kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(
      xla_ops::CheckShape(kOp, "input", input, {"rows", "columns"}));
  XLA_OPS_RETURN_IF_ERROR(
      xla_ops::CheckDType(kOp, "scale", scale, {xla_ops::DType::kF32}));
  const auto dims = input.dimensions();
  XLA_OPS_RETURN_IF_ERROR(xla_ops::CheckShape(kOp, "scale", scale, {dims[0]}));
  XLA_OPS_RETURN_IF_ERROR(xla_ops::CheckSameAs(kOp, "out", out, input));

  params->dtype = *xla_ops::ToDType(input.element_type());
  params->num_rows = dims[0];
  params->num_columns = dims[1];
  params->input = input.untyped_data();
  params->scale = static_cast<const float*>(scale.untyped_data());
  params->out = out->untyped_data();
  return ffi::Error::Success();
}

}  // namespace mine
