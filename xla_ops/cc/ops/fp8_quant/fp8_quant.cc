// Operand checks of fp8_quant, for every platform.

#include "xla_ops/cc/ops/fp8_quant/fp8_quant.h"

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant_checks.h"

namespace xla_ops {
namespace {

ffi::Error BindInput(const char* op, ffi::AnyBuffer input,
                     Fp8QuantParams* params) {
  params->input = input.untyped_data();
  return BindRows(op, input, &params->dtype, &params->num_tokens,
                  &params->hidden_size);
}

ffi::Error BindOut(const char* op, ffi::AnyBuffer input,
                   ffi::Result<ffi::AnyBuffer> out, Fp8QuantParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(op, "out", out, {DType::kF8E4M3FN}));
  params->out = out->untyped_data();
  return CheckShapeOf(op, "out", out, input);
}

}  // namespace

ffi::Error MakeStaticFp8QuantParams(ffi::AnyBuffer input, ffi::AnyBuffer scale,
                                    ffi::Result<ffi::AnyBuffer> out,
                                    Fp8QuantParams* params) {
  constexpr char kOp[] = "static_scaled_fp8_quant";
  XLA_OPS_RETURN_IF_ERROR(BindInput(kOp, input, params));
  XLA_OPS_RETURN_IF_ERROR(CheckScale(kOp, "scale", scale));
  params->scale = static_cast<const float*>(scale.untyped_data());
  return BindOut(kOp, input, out, params);
}

ffi::Error MakeDynamicFp8QuantParams(ffi::AnyBuffer input,
                                     ffi::Result<ffi::AnyBuffer> out,
                                     ffi::Result<ffi::AnyBuffer> scale,
                                     Fp8QuantParams* params) {
  constexpr char kOp[] = "dynamic_scaled_fp8_quant";
  XLA_OPS_RETURN_IF_ERROR(BindInput(kOp, input, params));
  XLA_OPS_RETURN_IF_ERROR(BindOut(kOp, input, out, params));
  params->scale_out = static_cast<float*>(scale->untyped_data());
  return CheckScale(kOp, "scale result", scale);
}

ffi::Error MakePerTokenFp8QuantParams(ffi::AnyBuffer input,
                                      ffi::RemainingArgs optional,
                                      ffi::Result<ffi::AnyBuffer> out,
                                      ffi::Result<ffi::AnyBuffer> scale,
                                      Fp8QuantParams* params) {
  constexpr char kOp[] = "dynamic_per_token_scaled_fp8_quant";
  XLA_OPS_RETURN_IF_ERROR(BindInput(kOp, input, params));
  if (optional.size() > 1) {
    return MustError(kOp, "scale_ub", "be one operand at most",
                     std::to_string(optional.size()));
  }
  if (optional.size() == 1) {
    const auto scale_ub = optional.get<ffi::AnyBuffer>(0);
    if (!scale_ub.has_value()) return scale_ub.error();
    XLA_OPS_RETURN_IF_ERROR(CheckScale(kOp, "scale_ub", *scale_ub));
    params->scale_ub = static_cast<const float*>(scale_ub->untyped_data());
  }
  XLA_OPS_RETURN_IF_ERROR(BindOut(kOp, input, out, params));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "scale result", scale, {DType::kF32}));
  params->scale_out = static_cast<float*>(scale->untyped_data());
  return CheckShape(kOp, "scale result", scale, {params->num_tokens, 1});
}

}  // namespace xla_ops
