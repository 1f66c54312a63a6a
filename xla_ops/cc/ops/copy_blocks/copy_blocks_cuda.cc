// The CUDA handlers of copy_blocks and swap_blocks: check operands, then launch
// the kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py, tests/ops/test_copy_blocks.py and
// tests/ops/test_swap_blocks.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_checks.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_launch.h"

namespace xla_ops {
namespace {

cudaError_t CopyAndLaunch(cudaStream_t stream, const CopyBlocksParams& params) {
  if (params.copy_size > 0) {
    const cudaError_t error = cudaMemcpyAsync(
        params.copy_to, params.copy_from, static_cast<size_t>(params.copy_size),
        cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return LaunchCopyBlocks(stream, params);
}

ffi::Error CheckAndLaunch(cudaStream_t stream, const CopyBlocksParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params));
  return ToLaunchError(params.within_one ? "copy_blocks" : "swap_blocks",
                       CopyAndLaunch(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER(copy_blocks, CopyBlocksBinding(), MakeCopyBlocksParams,
                     CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(swap_blocks, SwapBlocksBinding(), MakeSwapBlocksParams,
                     CheckAndLaunch);

}  // namespace xla_ops
