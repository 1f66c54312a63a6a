// Operand checks of grouped_matmul_backward_weight, for every platform.

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight_checks.h"

namespace xla_ops {

ffi::Error MakeGroupedMatmulBackwardWeightParams(
    ffi::AnyBuffer grad, ffi::AnyBuffer input, ffi::AnyBuffer group_offsets,
    ffi::Result<ffi::AnyBuffer> dweight,
    GroupedMatmulBackwardWeightParams* params) {
  constexpr char kOp[] = "grouped_matmul_backward_weight";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "input", input, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "input", input, {"M", "K"}));
  const DType dtype = *ToDType(input.element_type());
  const int64_t num_rows = input.dimensions()[0];
  const int64_t depth = input.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "grad", grad, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "grad", grad, {num_rows, "N"}));
  const int64_t num_columns = grad.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "group_offsets", group_offsets, {DType::kS32}));
  const auto offsets = group_offsets.dimensions();
  if (offsets.size() != 1 || offsets[0] == 0) {
    return MustError(kOp, "group_offsets", "have shape [E + 1]",
                     FormatShape(offsets));
  }
  const int64_t num_groups = offsets[0] - 1;
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "dweight", dweight, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "dweight", dweight, {num_groups, num_columns, depth}));

  params->dtype = dtype;
  params->num_rows = num_rows;
  params->num_columns = num_columns;
  params->depth = depth;
  params->num_groups = num_groups;
  params->grad = grad.untyped_data();
  params->input = input.untyped_data();
  params->group_offsets =
      static_cast<const int32_t*>(group_offsets.untyped_data());
  params->dweight = dweight->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
