// Operand checks of rms_norm_quant, for every platform.

#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant.h"

#include <initializer_list>
#include <string>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant_checks.h"

namespace xla_ops {
namespace {

constexpr char kDynamic[] = "rms_norm_dynamic_per_token_quant";

// What all targets have; `residual` may be null.
ffi::Error BindCommon(const char* op, AnyBuffer input,
                      const AnyBuffer* residual, AnyBuffer weight,
                      std::initializer_list<DType> out_dtypes, AnyResult out,
                      RmsNormQuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindRows(op, input, &params->dtype,
                                   &params->num_tokens, &params->hidden_size));
  if (residual != nullptr) {
    XLA_OPS_RETURN_IF_ERROR(CheckSameAs(op, "residual", *residual, input));
    params->residual = residual->untyped_data();
  }
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, "weight", weight, {params->dtype}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(op, "weight", weight, {params->hidden_size}));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, "out", out, out_dtypes));
  XLA_OPS_RETURN_IF_ERROR(CheckShapeOf(op, "out", out, input));
  params->quant_dtype = *ToDType(out->element_type());
  params->input = input.untyped_data();
  params->weight = weight.untyped_data();
  params->out = out->untyped_data();
  return ffi::Error::Success();
}

ffi::Error BindStatic(const char* op, AnyBuffer input,
                      const AnyBuffer* residual, AnyBuffer weight,
                      AnyBuffer scale, AnyResult out, float eps,
                      RmsNormQuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      BindCommon(op, input, residual, weight, {DType::kF8E4M3FN}, out, params));
  XLA_OPS_RETURN_IF_ERROR(CheckScale(op, "scale", scale));
  params->scale = static_cast<const float*>(scale.untyped_data());
  params->eps = eps;
  return CheckPositiveFinite(op, "eps", eps);
}

ffi::Error BindDynamic(AnyBuffer input, const AnyBuffer* residual,
                       AnyBuffer weight, RemainingArgs scale_ub, AnyResult out,
                       AnyResult scale, float eps, RmsNormQuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindCommon(kDynamic, input, residual, weight,
                                     {DType::kF8E4M3FN, DType::kS8}, out,
                                     params));
  if (scale_ub.size() > 1) {
    return MustError(kDynamic, "scale_ub", "be one operand at most",
                     std::to_string(scale_ub.size()));
  }
  if (scale_ub.size() == 1) {
    const auto bound = scale_ub.get<AnyBuffer>(0);
    if (!bound.has_value()) return bound.error();
    XLA_OPS_RETURN_IF_ERROR(CheckScale(kDynamic, "scale_ub", *bound));
    if (params->quant_dtype == DType::kS8) {
      return MustError(kDynamic, "scale_ub", "be left out for int8",
                       "a tensor");
    }
    params->scale_ub = static_cast<const float*>(bound->untyped_data());
  }
  XLA_OPS_RETURN_IF_ERROR(CheckPositiveFinite(kDynamic, "eps", eps));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kDynamic, "scale result", scale, {DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kDynamic, "scale result", scale, {params->num_tokens, 1}));
  params->eps = eps;
  params->scale_out = static_cast<float*>(scale->untyped_data());
  return ffi::Error::Success();
}

ffi::Error BindResidualOut(const char* op, AnyBuffer input,
                           AnyResult residual_out, RmsNormQuantParams* params) {
  params->residual_out = residual_out->untyped_data();
  return CheckSameAs(op, "residual_out", residual_out, input);
}

}  // namespace

ffi::Error MakeRmsNormStaticFp8QuantParams(AnyBuffer input, AnyBuffer weight,
                                           AnyBuffer scale, AnyResult out,
                                           float eps,
                                           RmsNormQuantParams* params) {
  return BindStatic("rms_norm_static_fp8_quant", input, nullptr, weight, scale,
                    out, eps, params);
}

ffi::Error MakeFusedAddRmsNormStaticFp8QuantParams(
    AnyBuffer input, AnyBuffer residual, AnyBuffer weight, AnyBuffer scale,
    AnyResult out, AnyResult residual_out, float eps,
    RmsNormQuantParams* params) {
  constexpr char kOp[] = "fused_add_rms_norm_static_fp8_quant";
  XLA_OPS_RETURN_IF_ERROR(
      BindStatic(kOp, input, &residual, weight, scale, out, eps, params));
  return BindResidualOut(kOp, input, residual_out, params);
}

ffi::Error MakeRmsNormDynamicPerTokenQuantParams(
    AnyBuffer input, AnyBuffer weight, RemainingArgs scale_ub, AnyResult out,
    AnyResult scale, float eps, RmsNormQuantParams* params) {
  return BindDynamic(input, nullptr, weight, scale_ub, out, scale, eps, params);
}

ffi::Error MakeFusedAddRmsNormDynamicPerTokenQuantParams(
    AnyBuffer input, AnyBuffer residual, AnyBuffer weight,
    RemainingArgs scale_ub, AnyResult out, AnyResult scale,
    AnyResult residual_out, float eps, RmsNormQuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      BindDynamic(input, &residual, weight, scale_ub, out, scale, eps, params));
  return BindResidualOut(kDynamic, input, residual_out, params);
}

}  // namespace xla_ops
