// The CUDA handler of new_op: checks operands, then launches the kernel on
// XLA's stream.
//
// Tested by tests/ops/test_new_op.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/new_op/new_op.h"
#include "xla_ops/cc/ops/new_op/new_op_checks.h"
#include "xla_ops/cc/ops/new_op/new_op_launch.h"

namespace xla_ops {
namespace {

ffi::Error NewOpCuda(ffi::AnyBuffer input, ffi::Result<ffi::AnyBuffer> out,
                     float scale, cudaStream_t stream) {
  NewOpParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeNewOpParams(input, out, scale, &params));
  const cudaError_t error = LaunchNewOp(stream, params);
  if (error != cudaSuccess) {
    return ffi::Error::Internal(LaunchErrorText("new_op", error));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_new_op_cuda(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_new_op_cuda, xla_ops::NewOpCuda,
    xla_ops::NewOpBinding().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS({"xla_ops.new_op",
                         "CUDA",
                         {nullptr, nullptr, nullptr, xla_ops_new_op_cuda}})
