// Operand checks of grouped_matmul, for every platform.

#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul.h"

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_checks.h"

namespace xla_ops {

ffi::Error MakeGroupedMatmulParams(ffi::AnyBuffer input, ffi::AnyBuffer weight,
                                   ffi::AnyBuffer group_offsets,
                                   ffi::Result<ffi::AnyBuffer> out,
                                   GroupedMatmulParams* params) {
  constexpr char kOp[] = "grouped_matmul";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "input", input, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "input", input, {"M", "K"}));
  const DType dtype = *ToDType(input.element_type());
  const int64_t num_rows = input.dimensions()[0];
  const int64_t depth = input.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "weight", weight, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "weight", weight, {"E", "N", depth}));
  const int64_t num_groups = weight.dimensions()[0];
  const int64_t num_columns = weight.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "group_offsets", group_offsets, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "group_offsets", group_offsets, {num_groups + 1}));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "out", out, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "out", out, {num_rows, num_columns}));

  params->dtype = dtype;
  params->num_rows = num_rows;
  params->num_columns = num_columns;
  params->depth = depth;
  params->num_groups = num_groups;
  params->input = input.untyped_data();
  params->weight = weight.untyped_data();
  params->group_offsets =
      static_cast<const int32_t*>(group_offsets.untyped_data());
  params->out = out->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
