// Operand checks of new_op, for every platform.

#include "xla_ops/cc/ops/new_op/new_op.h"

#include <cmath>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/new_op/new_op_checks.h"

namespace xla_ops {

ffi::Error MakeNewOpParams(ffi::AnyBuffer input,
                           ffi::Result<ffi::AnyBuffer> out, float scale,
                           NewOpParams* params) {
  constexpr char kOp[] = "new_op";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "input", input, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "out", out, input));
  if (!std::isfinite(scale)) {
    return MustError(kOp, "scale", "be finite", FormatFloat(scale));
  }

  params->dtype = *ToDType(input.element_type());
  params->num_elements = static_cast<int64_t>(input.element_count());
  params->scale = scale;
  params->input = input.untyped_data();
  params->out = out->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
