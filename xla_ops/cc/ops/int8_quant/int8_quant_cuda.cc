// The CUDA handlers of int8_quant: each checks its operands, then launches
// on XLA's stream.
//
// Tested by tests/ops/test_int8_quant.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant_checks.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant_launch.h"

namespace xla_ops {
namespace {

ffi::Error Status(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(LaunchErrorText(op, error));
}

ffi::Error StaticCuda(AnyBuffer input, AnyBuffer scale, RemainingArgs azp,
                      AnyResult out, cudaStream_t stream) {
  Int8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeStaticInt8QuantParams(input, scale, azp, out, &params));
  return Status("static_scaled_int8_quant",
                LaunchStaticInt8Quant(stream, params));
}

ffi::Error DynamicCuda(AnyBuffer input, AnyResult out, AnyResult scale,
                       cudaStream_t stream) {
  Int8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeDynamicInt8QuantParams(input, out, scale, &params));
  return Status("dynamic_scaled_int8_quant",
                LaunchDynamicInt8Quant(stream, params));
}

ffi::Error DynamicAzpCuda(AnyBuffer input, AnyResult out, AnyResult scale,
                          AnyResult azp, cudaStream_t stream) {
  Int8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeDynamicInt8AzpQuantParams(input, out, scale, azp, &params));
  return Status("dynamic_scaled_int8_quant",
                LaunchDynamicInt8Quant(stream, params));
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_static_scaled_int8_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_dynamic_scaled_int8_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_dynamic_scaled_int8_azp_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_static_scaled_int8_quant_cuda, xla_ops::StaticCuda,
    xla_ops::StaticInt8QuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_dynamic_scaled_int8_quant_cuda, xla_ops::DynamicCuda,
    xla_ops::DynamicInt8QuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_dynamic_scaled_int8_azp_quant_cuda, xla_ops::DynamicAzpCuda,
    xla_ops::DynamicInt8AzpQuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.static_scaled_int8_quant",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_static_scaled_int8_quant_cuda}},
    {"xla_ops.dynamic_scaled_int8_quant",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_dynamic_scaled_int8_quant_cuda}},
    {"xla_ops.dynamic_scaled_int8_azp_quant",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_dynamic_scaled_int8_azp_quant_cuda}})
