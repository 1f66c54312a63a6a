// Operand checks of activation_backward, for every platform.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/activation/activation_backward.h"
#include "xla_ops/cc/ops/activation/activation_backward_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "activation_backward";

constexpr Activation kDifferentiable[] = {
    Activation::kSiluAndMul,    Activation::kMulAndSilu,
    Activation::kGeluAndMul,    Activation::kGeluTanhAndMul,
    Activation::kFatreluAndMul, Activation::kSwigluoaiAndMul,
    Activation::kGeluNew,       Activation::kGeluFast,
    Activation::kGeluQuick,
};

ffi::Error FindActivation(std::string_view name, Activation* found) {
  for (const Activation activation : kDifferentiable) {
    if (name == Name(activation)) {
      *found = activation;
      return ffi::Error::Success();
    }
  }
  return MustError(kOp, "activation", "be an op with a gradient",
                   std::string(name));
}

}  // namespace

ffi::Error MakeActivationBackwardParams(ffi::AnyBuffer grad,
                                        ffi::AnyBuffer input,
                                        ffi::Result<ffi::AnyBuffer> dinput,
                                        std::string_view activation,
                                        float threshold, float alpha,
                                        float limit,
                                        ActivationBackwardParams* params) {
  XLA_OPS_RETURN_IF_ERROR(FindActivation(activation, &params->activation));
  int64_t columns;
  XLA_OPS_RETURN_IF_ERROR(
      BindRows(kOp, input, &params->dtype, &params->num_tokens, &columns));
  const bool is_gated = IsGated(params->activation);
  if (is_gated && columns % 2 != 0) {
    return MustError(kOp, "input", "have an even last dimension",
                     std::to_string(columns));
  }
  params->size = is_gated ? columns / 2 : columns;
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "grad", grad, {params->dtype}));
  const auto dims = input.dimensions();
  std::vector<int64_t> wanted(dims.begin(), dims.end());
  wanted.back() = params->size;
  const ffi::Span<const int64_t> shape(wanted.data(), wanted.size());
  if (!(grad.dimensions() == shape)) {
    return MustError(kOp, "grad", "have shape " + FormatShape(shape),
                     FormatShape(grad.dimensions()));
  }
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "dinput", dinput, input));
  params->constants = {threshold, alpha, limit};
  params->grad = grad.untyped_data();
  params->input = input.untyped_data();
  params->dinput = dinput->untyped_data();
  return ffi::Error::Success();
}

}  // namespace xla_ops
