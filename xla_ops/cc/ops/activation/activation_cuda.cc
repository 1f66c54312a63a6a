// The CUDA handlers of the gated activations: check operands, then launch the
// kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_activation.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/activation/activation.h"
#include "xla_ops/cc/ops/activation/activation_checks.h"
#include "xla_ops/cc/ops/activation/activation_launch.h"

namespace xla_ops {
namespace {

ffi::Error Launch(cudaStream_t stream, const ActivationParams& params) {
  const cudaError_t error = LaunchActivation(stream, params);
  if (error != cudaSuccess) {
    return ffi::Error::Internal(
        LaunchErrorText(Name(params.activation), error));
  }
  return ffi::Error::Success();
}

template <Activation kActivation>
ffi::Error ActivationCuda(ffi::AnyBuffer input, ffi::Result<ffi::AnyBuffer> out,
                          cudaStream_t stream) {
  ActivationParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeActivationParams(kActivation, input, out, &params));
  return Launch(stream, params);
}

ffi::Error ActivationQuantCuda(ffi::AnyBuffer input, ffi::AnyBuffer scale,
                               ffi::Result<ffi::AnyBuffer> out,
                               cudaStream_t stream) {
  ActivationParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeActivationQuantParams(input, scale, out, &params));
  return Launch(stream, params);
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_silu_and_mul_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_mul_and_silu_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_gelu_and_mul_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_gelu_tanh_and_mul_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_silu_and_mul_quant_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_silu_and_mul_cuda,
    xla_ops::ActivationCuda<xla_ops::Activation::kSiluAndMul>,
    xla_ops::ActivationBinding().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_mul_and_silu_cuda,
    xla_ops::ActivationCuda<xla_ops::Activation::kMulAndSilu>,
    xla_ops::ActivationBinding().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_gelu_and_mul_cuda,
    xla_ops::ActivationCuda<xla_ops::Activation::kGeluAndMul>,
    xla_ops::ActivationBinding().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_gelu_tanh_and_mul_cuda,
    xla_ops::ActivationCuda<xla_ops::Activation::kGeluTanhAndMul>,
    xla_ops::ActivationBinding().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_silu_and_mul_quant_cuda, xla_ops::ActivationQuantCuda,
    xla_ops::ActivationQuantBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.silu_and_mul",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_silu_and_mul_cuda}},
    {"xla_ops.mul_and_silu",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_mul_and_silu_cuda}},
    {"xla_ops.gelu_and_mul",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_gelu_and_mul_cuda}},
    {"xla_ops.gelu_tanh_and_mul",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_gelu_tanh_and_mul_cuda}},
    {"xla_ops.silu_and_mul_quant",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_silu_and_mul_quant_cuda}})
