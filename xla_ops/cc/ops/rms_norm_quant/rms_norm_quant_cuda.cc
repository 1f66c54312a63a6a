// The CUDA handlers of rms_norm_quant: four targets that differ in their
// operands and share one launcher.
//
// Tested by tests/ops/test_rms_norm_quant.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant_checks.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant_launch.h"

namespace xla_ops {
namespace {

ffi::Error Launch(const char* op, cudaStream_t stream,
                  const RmsNormQuantParams& params) {
  const cudaError_t error = LaunchRmsNormQuant(stream, params);
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(LaunchErrorText(op, error));
}

ffi::Error RmsNormStaticFp8QuantCuda(AnyBuffer input, AnyBuffer weight,
                                     AnyBuffer scale, AnyResult out, float eps,
                                     cudaStream_t stream) {
  RmsNormQuantParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeRmsNormStaticFp8QuantParams(
      input, weight, scale, out, eps, &params));
  return Launch("rms_norm_static_fp8_quant", stream, params);
}

ffi::Error FusedAddRmsNormStaticFp8QuantCuda(AnyBuffer input,
                                             AnyBuffer residual,
                                             AnyBuffer weight, AnyBuffer scale,
                                             AnyResult out,
                                             AnyResult residual_out, float eps,
                                             cudaStream_t stream) {
  RmsNormQuantParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeFusedAddRmsNormStaticFp8QuantParams(
      input, residual, weight, scale, out, residual_out, eps, &params));
  return Launch("fused_add_rms_norm_static_fp8_quant", stream, params);
}

ffi::Error RmsNormDynamicPerTokenQuantCuda(AnyBuffer input, AnyBuffer weight,
                                           RemainingArgs scale_ub,
                                           AnyResult out, AnyResult scale,
                                           float eps, cudaStream_t stream) {
  RmsNormQuantParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeRmsNormDynamicPerTokenQuantParams(
      input, weight, scale_ub, out, scale, eps, &params));
  return Launch("rms_norm_dynamic_per_token_quant", stream, params);
}

ffi::Error FusedAddRmsNormDynamicPerTokenQuantCuda(AnyBuffer input,
                                                   AnyBuffer residual,
                                                   AnyBuffer weight,
                                                   RemainingArgs scale_ub,
                                                   AnyResult out,
                                                   AnyResult scale,
                                                   AnyResult residual_out,
                                                   float eps,
                                                   cudaStream_t stream) {
  RmsNormQuantParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeFusedAddRmsNormDynamicPerTokenQuantParams(
      input, residual, weight, scale_ub, out, scale, residual_out, eps,
      &params));
  return Launch("fused_add_rms_norm_dynamic_per_token_quant", stream, params);
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_rms_norm_static_fp8_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_fused_add_rms_norm_static_fp8_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_rms_norm_dynamic_per_token_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error*
xla_ops_fused_add_rms_norm_dynamic_per_token_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_rms_norm_static_fp8_quant_cuda,
    xla_ops::RmsNormStaticFp8QuantCuda,
    xla_ops::RmsNormStaticFp8QuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_fused_add_rms_norm_static_fp8_quant_cuda,
    xla_ops::FusedAddRmsNormStaticFp8QuantCuda,
    xla_ops::FusedAddRmsNormStaticFp8QuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_rms_norm_dynamic_per_token_quant_cuda,
    xla_ops::RmsNormDynamicPerTokenQuantCuda,
    xla_ops::RmsNormDynamicPerTokenQuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_fused_add_rms_norm_dynamic_per_token_quant_cuda,
    xla_ops::FusedAddRmsNormDynamicPerTokenQuantCuda,
    xla_ops::FusedAddRmsNormDynamicPerTokenQuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.rms_norm_static_fp8_quant",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_rms_norm_static_fp8_quant_cuda}},
    {"xla_ops.fused_add_rms_norm_static_fp8_quant",
     "CUDA",
     {nullptr, nullptr, nullptr,
      xla_ops_fused_add_rms_norm_static_fp8_quant_cuda}},
    {"xla_ops.rms_norm_dynamic_per_token_quant",
     "CUDA",
     {nullptr, nullptr, nullptr,
      xla_ops_rms_norm_dynamic_per_token_quant_cuda}},
    {"xla_ops.fused_add_rms_norm_dynamic_per_token_quant",
     "CUDA",
     {nullptr, nullptr, nullptr,
      xla_ops_fused_add_rms_norm_dynamic_per_token_quant_cuda}})
