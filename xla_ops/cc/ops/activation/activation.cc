// Operand checks of the activations, for every platform.

#include "xla_ops/cc/ops/activation/activation.h"

#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/activation/activation_checks.h"

namespace xla_ops {
namespace {

ffi::Error CheckInput(Activation activation, ffi::AnyBuffer input,
                      ActivationParams* params) {
  const char* op = Name(activation);
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, "input", input, kFloatDTypes));
  const auto dims = input.dimensions();
  if (dims.size() == 0) {
    return MustError(op, "input", "have rank 1 or more",
                     "shape " + FormatShape(dims));
  }
  if (IsGated(activation) && dims.back() % 2 != 0) {
    return MustError(op, "input", "have an even last dimension",
                     std::to_string(dims.back()));
  }
  *params = ActivationParams{};
  params->activation = activation;
  params->dtype = *ToDType(input.element_type());
  params->num_tokens = 1;
  for (const int64_t dim : dims.first(dims.size() - 1)) {
    params->num_tokens *= dim;
  }
  params->size = IsGated(activation) ? dims.back() / 2 : dims.back();
  params->input = input.untyped_data();
  return ffi::Error::Success();
}

ffi::Error CheckOut(ffi::AnyBuffer input, DType dtype,
                    ffi::Result<ffi::AnyBuffer> out, ActivationParams* params) {
  const char* op = Name(params->activation);
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, "out", out, {dtype}));
  const auto dims = input.dimensions();
  std::vector<int64_t> wanted(dims.begin(), dims.end());
  wanted.back() = params->size;
  const ffi::Span<const int64_t> shape(wanted.data(), wanted.size());
  if (!(out->dimensions() == shape)) {
    return MustError(op, "out", "have shape " + FormatShape(shape),
                     FormatShape(out->dimensions()));
  }
  params->out = out->untyped_data();
  return ffi::Error::Success();
}

ffi::Error CheckFinite(const char* op, const char* argument, float value) {
  if (std::isfinite(value)) return ffi::Error::Success();
  return MustError(op, argument, "be finite", FormatFloat(value));
}

}  // namespace

ffi::Error MakeActivationParams(Activation activation, ffi::AnyBuffer input,
                                ffi::Result<ffi::AnyBuffer> out,
                                ActivationParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckInput(activation, input, params));
  return CheckOut(input, params->dtype, out, params);
}

ffi::Error MakeFatreluParams(ffi::AnyBuffer input,
                             ffi::Result<ffi::AnyBuffer> out, float threshold,
                             ActivationParams* params) {
  constexpr Activation kFatrelu = Activation::kFatreluAndMul;
  XLA_OPS_RETURN_IF_ERROR(MakeActivationParams(kFatrelu, input, out, params));
  params->constants.threshold = threshold;
  return CheckFinite(Name(kFatrelu), "threshold", threshold);
}

ffi::Error MakeSwigluoaiParams(ffi::AnyBuffer input,
                               ffi::Result<ffi::AnyBuffer> out, float alpha,
                               float limit, ActivationParams* params) {
  constexpr Activation kSwigluoai = Activation::kSwigluoaiAndMul;
  XLA_OPS_RETURN_IF_ERROR(MakeActivationParams(kSwigluoai, input, out, params));
  params->constants.alpha = alpha;
  params->constants.limit = limit;
  XLA_OPS_RETURN_IF_ERROR(CheckFinite(Name(kSwigluoai), "alpha", alpha));
  // The comparison is false for NaN. Infinity is no limit.
  if (limit >= 0) return ffi::Error::Success();
  return MustError(Name(kSwigluoai), "limit", "be at least 0",
                   FormatFloat(limit));
}

ffi::Error MakeActivationQuantParams(ffi::AnyBuffer input, ffi::AnyBuffer scale,
                                     ffi::Result<ffi::AnyBuffer> out,
                                     ActivationParams* params) {
  constexpr Activation kQuant = Activation::kSiluAndMulQuant;
  XLA_OPS_RETURN_IF_ERROR(CheckInput(kQuant, input, params));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(Name(kQuant), "scale", scale, {DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(CheckOneElement(Name(kQuant), "scale", scale));
  params->scale = static_cast<const float*>(scale.untyped_data());
  return CheckOut(input, DType::kF8E4M3FN, out, params);
}

}  // namespace xla_ops
