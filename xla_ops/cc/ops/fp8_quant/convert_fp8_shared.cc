// Operand checks of convert_fp8, for every platform.

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8_checks.h"

namespace xla_ops {

ffi::Error MakeConvertFp8Params(ffi::AnyBuffer src,
                                ffi::Result<ffi::AnyBuffer> dst,
                                std::string_view kv_cache_dtype, float scale,
                                ConvertFp8Params* params) {
  constexpr char kOp[] = "convert_fp8";
  if (kv_cache_dtype == "fp8" || kv_cache_dtype == "fp8_e4m3") {
    params->fp8_dtype = DType::kF8E4M3FN;
  } else if (kv_cache_dtype == "fp8_e5m2") {
    params->fp8_dtype = DType::kF8E5M2;
  } else {
    return MustError(kOp, "kv_cache_dtype", "be fp8, fp8_e4m3 or fp8_e5m2",
                     kv_cache_dtype);
  }
  XLA_OPS_RETURN_IF_ERROR(CheckPositiveFinite(kOp, "scale", scale));
  const DType fp8 = params->fp8_dtype;
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "src", src,
                 {DType::kF32, DType::kF16, DType::kBF16, fp8, DType::kU8}));
  const DType src_dtype = *ToDType(src.element_type());
  params->to_fp8 = src_dtype != fp8 && src_dtype != DType::kU8;
  if (params->to_fp8) {
    XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "dst", dst, {fp8, DType::kU8}));
    params->dtype = src_dtype;
  } else {
    XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "dst", dst, kFloatDTypes));
    params->dtype = *ToDType(dst->element_type());
  }
  params->scale = scale;
  params->size = static_cast<int64_t>(src.element_count());
  params->src = src.untyped_data();
  params->dst = dst->untyped_data();
  return CheckShapeOf(kOp, "dst", dst, src);
}

}  // namespace xla_ops
