// The CUDA handlers of fp8_quant: each checks its operands, then launches on
// XLA's stream.
//
// Tested by tests/ops/test_fp8_quant.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant_checks.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant_launch.h"

namespace xla_ops {
namespace {

ffi::Error Status(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(LaunchErrorText(op, error));
}

ffi::Error StaticCuda(ffi::AnyBuffer input, ffi::AnyBuffer scale,
                      ffi::Result<ffi::AnyBuffer> out, cudaStream_t stream) {
  Fp8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeStaticFp8QuantParams(input, scale, out, &params));
  return Status("static_scaled_fp8_quant",
                LaunchStaticFp8Quant(stream, params));
}

ffi::Error DynamicCuda(ffi::AnyBuffer input, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> scale,
                       cudaStream_t stream) {
  Fp8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeDynamicFp8QuantParams(input, out, scale, &params));
  return Status("dynamic_scaled_fp8_quant",
                LaunchDynamicFp8Quant(stream, params));
}

ffi::Error PerTokenCuda(ffi::AnyBuffer input, ffi::RemainingArgs optional,
                        ffi::Result<ffi::AnyBuffer> out,
                        ffi::Result<ffi::AnyBuffer> scale,
                        cudaStream_t stream) {
  Fp8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakePerTokenFp8QuantParams(input, optional, out, scale, &params));
  return Status("dynamic_per_token_scaled_fp8_quant",
                LaunchPerTokenFp8Quant(stream, params));
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_static_scaled_fp8_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_dynamic_scaled_fp8_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_dynamic_per_token_scaled_fp8_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_static_scaled_fp8_quant_cuda, xla_ops::StaticCuda,
    xla_ops::StaticFp8QuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_dynamic_scaled_fp8_quant_cuda, xla_ops::DynamicCuda,
    xla_ops::DynamicFp8QuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_dynamic_per_token_scaled_fp8_quant_cuda, xla_ops::PerTokenCuda,
    xla_ops::PerTokenFp8QuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.static_scaled_fp8_quant",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_static_scaled_fp8_quant_cuda}},
    {"xla_ops.dynamic_scaled_fp8_quant",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_dynamic_scaled_fp8_quant_cuda}},
    {"xla_ops.dynamic_per_token_scaled_fp8_quant",
     "CUDA",
     {nullptr, nullptr, nullptr,
      xla_ops_dynamic_per_token_scaled_fp8_quant_cuda}})
