// The CUDA handlers of reshape_and_cache_flash: three targets that differ in
// their operands and share one kernel.
//
// Tested by tests/gpu/check_kernels.py and
// tests/ops/test_reshape_and_cache_flash.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_checks.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_launch.h"

namespace xla_ops {
namespace {

cudaError_t CopyAndLaunch(cudaStream_t stream,
                          const ReshapeAndCacheFlashParams& params) {
  for (int i = 0; i < params.num_copies; ++i) {
    const CacheCopy& copy = params.copies[i];
    const cudaError_t error =
        cudaMemcpyAsync(copy.to, copy.from, static_cast<size_t>(copy.bytes),
                        cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return IsEmpty(params) ? cudaSuccess
                         : LaunchReshapeAndCacheFlash(stream, params);
}

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const ReshapeAndCacheFlashParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params));
  return ToLaunchError("reshape_and_cache_flash",
                       CopyAndLaunch(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER(reshape_and_cache_flash, ReshapeAndCacheFlashBinding(),
                     MakeReshapeAndCacheFlashParams, CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(reshape_and_cache_flash_stacked,
                     ReshapeAndCacheFlashStackedBinding(),
                     MakeReshapeAndCacheFlashStackedParams, CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(reshape_and_cache_flash_one,
                     ReshapeAndCacheFlashOneBinding(),
                     MakeReshapeAndCacheFlashOneParams, CheckAndLaunch);

}  // namespace xla_ops
