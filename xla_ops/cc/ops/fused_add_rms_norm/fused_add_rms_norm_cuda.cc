// The CUDA handler of fused_add_rms_norm: checks operands, then launches the
// kernel on XLA's stream.
//
// Tested by tests/ops/test_fused_add_rms_norm.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm_checks.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm_launch.h"

namespace xla_ops {
namespace {

ffi::Error FusedAddRmsNormCuda(ffi::AnyBuffer input, ffi::AnyBuffer residual,
                               ffi::AnyBuffer weight,
                               ffi::Result<ffi::AnyBuffer> out,
                               ffi::Result<ffi::AnyBuffer> residual_out,
                               float eps, cudaStream_t stream) {
  FusedAddRmsNormParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeFusedAddRmsNormParams(
      input, residual, weight, out, residual_out, eps, &params));
  const cudaError_t error = LaunchFusedAddRmsNorm(stream, params);
  if (error != cudaSuccess) {
    return ffi::Error::Internal(LaunchErrorText("fused_add_rms_norm", error));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_fused_add_rms_norm_cuda(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_fused_add_rms_norm_cuda, xla_ops::FusedAddRmsNormCuda,
    xla_ops::FusedAddRmsNormBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.fused_add_rms_norm",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_fused_add_rms_norm_cuda}})
