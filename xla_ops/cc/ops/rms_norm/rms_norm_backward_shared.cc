// Operand checks of rms_norm_backward, for every platform.

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "rms_norm_backward";

// `added` of one dimension of no element stands for none.
bool IsAbsent(ffi::AnyBuffer buffer) {
  const auto dims = buffer.dimensions();
  return dims.size() == 1 && dims[0] == 0;
}

// A result of fp32 rows of `size`; `rows`: how many.
ffi::Error BindSums(const char* name, ffi::AnyBuffer buffer, int64_t size,
                    int64_t* rows) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, name, buffer, {DType::kF32}));
  const auto dims = buffer.dimensions();
  if (dims.size() == 0 || dims.back() != size) {
    return MustError(kOp, name,
                     "have shape [..., " + std::to_string(size) + "]",
                     FormatShape(dims));
  }
  *rows = 1;
  for (const int64_t dim : dims.first(dims.size() - 1)) *rows *= dim;
  return ffi::Error::Success();
}

}  // namespace

ffi::Error MakeRmsNormBackwardInputParams(
    ffi::AnyBuffer grad, ffi::AnyBuffer input, ffi::AnyBuffer weight,
    ffi::AnyBuffer added, ffi::Result<ffi::AnyBuffer> dx, float eps,
    RmsNormBackwardParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindRows(kOp, input, &params->dtype,
                                   &params->num_tokens, &params->hidden_size));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "grad", grad, input));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "weight", weight, {params->dtype}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "weight", weight, {params->hidden_size}));
  params->added = nullptr;
  if (!IsAbsent(added)) {
    XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "added", added, input));
    params->added = added.untyped_data();
  }
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "dx", dx, input));
  XLA_OPS_RETURN_IF_ERROR(CheckPositiveFinite(kOp, "eps", eps));

  params->num_parts = 0;
  params->eps = eps;
  params->grad = grad.untyped_data();
  params->input = input.untyped_data();
  params->weight = weight.untyped_data();
  params->dx = dx->untyped_data();
  params->parts = nullptr;
  params->scratch_rows = 0;
  params->scratch = nullptr;
  return ffi::Error::Success();
}

ffi::Error MakeRmsNormBackwardParams(ffi::AnyBuffer grad, ffi::AnyBuffer input,
                                     ffi::AnyBuffer weight,
                                     ffi::AnyBuffer added,
                                     ffi::Result<ffi::AnyBuffer> dx,
                                     ffi::Result<ffi::AnyBuffer> parts,
                                     ffi::Result<ffi::AnyBuffer> scratch,
                                     float eps, RmsNormBackwardParams* params) {
  XLA_OPS_RETURN_IF_ERROR(MakeRmsNormBackwardInputParams(
      grad, input, weight, added, dx, eps, params));
  XLA_OPS_RETURN_IF_ERROR(
      BindSums("parts", *parts, params->hidden_size, &params->num_parts));
  if (params->num_parts == 0 && params->num_tokens > 0) {
    return MustError(kOp, "parts", "have 1 row or more",
                     "shape " + FormatShape(parts->dimensions()));
  }
  XLA_OPS_RETURN_IF_ERROR(BindSums("scratch", *scratch, params->hidden_size,
                                   &params->scratch_rows));
  params->parts = static_cast<float*>(parts->untyped_data());
  params->scratch = static_cast<float*>(scratch->untyped_data());
  return ffi::Error::Success();
}

}  // namespace xla_ops
