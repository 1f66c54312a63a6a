// The CUDA handlers of reshape_and_cache_flash: three targets that differ in
// their operands and share one kernel.
//
// Tested by tests/gpu/check_kernels.py and
// tests/ops/test_reshape_and_cache_flash.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cache_copy.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_checks.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_launch.h"

namespace xla_ops {
namespace {

cudaError_t CopyAndLaunch(cudaStream_t stream,
                          const ReshapeAndCacheFlashParams& params) {
  const cudaError_t error = CopyCaches(stream, params.copies);
  if (error != cudaSuccess || IsEmpty(params)) return error;
  return LaunchReshapeAndCacheFlash(stream, params);
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
