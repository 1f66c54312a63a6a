// Operand checks of linear, for every platform.

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/grouped_matmul/linear.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_checks.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_plan.h"

namespace xla_ops {

ffi::Error MakeLinearParams(ffi::AnyBuffer input, ffi::AnyBuffer weight,
                            ffi::AnyBuffer bias,
                            ffi::Result<ffi::AnyBuffer> out, int64_t plan,
                            LinearParams* params) {
  constexpr char kOp[] = "linear";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "input", input, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "input", input, {"M", "K"}));
  const DType dtype = *ToDType(input.element_type());
  const int64_t num_rows = input.dimensions()[0];
  const int64_t depth = input.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "weight", weight, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "weight", weight, {"N", depth}));
  const int64_t num_columns = weight.dimensions()[0];
  const bool has_bias = bias.element_count() > 0;
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "bias", bias, {dtype}));
  if (has_bias) {
    XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "bias", bias, {num_columns}));
  }
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "out", out, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "out", out, {num_rows, num_columns}));
  if (plan != 0 && !DecodeLinearPlan(plan).has_value()) {
    return MustError(kOp, "plan", "be 0 or a plan of linear_plan.h",
                     std::to_string(plan));
  }

  params->dtype = dtype;
  params->num_rows = num_rows;
  params->num_columns = num_columns;
  params->depth = depth;
  params->plan = plan;
  params->input = input.untyped_data();
  params->weight = weight.untyped_data();
  params->bias = has_bias ? bias.untyped_data() : nullptr;
  params->out = out->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
