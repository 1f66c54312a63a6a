// Operand checks of int8_quant, for every platform.

#include "xla_ops/cc/ops/int8_quant/int8_quant.h"

#include <string>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant_checks.h"

namespace xla_ops {
namespace {

constexpr char kStatic[] = "static_scaled_int8_quant";
constexpr char kDynamic[] = "dynamic_scaled_int8_quant";

ffi::Error BindInput(const char* op, AnyBuffer input, Int8QuantParams* params) {
  params->input = input.untyped_data();
  return BindRows(op, input, &params->dtype, &params->num_tokens,
                  &params->hidden_size);
}

ffi::Error BindOut(const char* op, AnyBuffer input, AnyResult out,
                   Int8QuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, "out", out, {DType::kS8}));
  params->out = out->untyped_data();
  return CheckShapeOf(op, "out", out, input);
}

}  // namespace

ffi::Error MakeStaticInt8QuantParams(AnyBuffer input, AnyBuffer scale,
                                     RemainingArgs azp, AnyResult out,
                                     Int8QuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindInput(kStatic, input, params));
  XLA_OPS_RETURN_IF_ERROR(CheckScale(kStatic, "scale", scale));
  params->scale = static_cast<const float*>(scale.untyped_data());
  if (azp.size() > 1) {
    return MustError(kStatic, "azp", "be one operand at most",
                     std::to_string(azp.size()));
  }
  if (azp.size() == 1) {
    const auto zero_point = azp.get<AnyBuffer>(0);
    if (!zero_point.has_value()) return zero_point.error();
    XLA_OPS_RETURN_IF_ERROR(
        CheckDType(kStatic, "azp", *zero_point, {DType::kS32}));
    XLA_OPS_RETURN_IF_ERROR(CheckOneElement(kStatic, "azp", *zero_point));
    params->azp = static_cast<const int32_t*>(zero_point->untyped_data());
  }
  return BindOut(kStatic, input, out, params);
}

ffi::Error MakeDynamicInt8QuantParams(AnyBuffer input, AnyResult out,
                                      AnyResult scale,
                                      Int8QuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindInput(kDynamic, input, params));
  XLA_OPS_RETURN_IF_ERROR(BindOut(kDynamic, input, out, params));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kDynamic, "scale result", scale, {DType::kF32}));
  params->scale_out = static_cast<float*>(scale->untyped_data());
  return CheckShape(kDynamic, "scale result", scale, {params->num_tokens, 1});
}

ffi::Error MakeDynamicInt8AzpQuantParams(AnyBuffer input, AnyResult out,
                                         AnyResult scale, AnyResult azp,
                                         Int8QuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      MakeDynamicInt8QuantParams(input, out, scale, params));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kDynamic, "azp result", azp, {DType::kS32}));
  params->azp_out = static_cast<int32_t*>(azp->untyped_data());
  return CheckShape(kDynamic, "azp result", azp, {params->num_tokens, 1});
}

}  // namespace xla_ops
