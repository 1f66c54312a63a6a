// The CUDA handler of copy_blocks: checks operands, then launches the kernel
// on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_copy_blocks.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_checks.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_launch.h"

namespace xla_ops {
namespace {

ffi::Error CopyBlocksCuda(ffi::AnyBuffer cache, ffi::AnyBuffer block_mapping,
                          ffi::Result<ffi::AnyBuffer> cache_result,
                          CopyBlocksAttrs attrs, cudaStream_t stream) {
  CopyBlocksParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeCopyBlocksParams(cache, block_mapping, cache_result, attrs, &params));
  cudaError_t error = cudaSuccess;
  if (params.copy_size > 0) {
    error = cudaMemcpyAsync(params.copy_to, params.copy_from,
                            static_cast<size_t>(params.copy_size),
                            cudaMemcpyDeviceToDevice, stream);
  }
  if (error == cudaSuccess) error = LaunchCopyBlocks(stream, params);
  if (error != cudaSuccess) {
    return ffi::Error::Internal(LaunchErrorText("copy_blocks", error));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_copy_blocks_cuda(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_copy_blocks_cuda, xla_ops::CopyBlocksCuda,
    xla_ops::CopyBlocksBinding().Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS({"xla_ops.copy_blocks",
                         "CUDA",
                         {nullptr, nullptr, nullptr, xla_ops_copy_blocks_cuda}})
