// The CUDA handlers of reshape_and_cache: three targets that differ in their
// operands and share one kernel.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_reshape_and_cache.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache.h"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache_checks.h"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache_launch.h"

namespace xla_ops {
namespace {

cudaError_t CopyAndLaunch(cudaStream_t stream,
                          const ReshapeAndCacheParams& params) {
  for (const ReshapeAndCacheSide& side : params.sides) {
    if (side.copy_bytes == 0) continue;
    const cudaError_t error = cudaMemcpyAsync(
        side.copy_to, side.copy_from, static_cast<size_t>(side.copy_bytes),
        cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return LaunchReshapeAndCache(stream, params);
}

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const ReshapeAndCacheParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params));
  return ToLaunchError("reshape_and_cache", CopyAndLaunch(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER(reshape_and_cache, ReshapeAndCacheBinding(),
                     MakeReshapeAndCacheParams, CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(reshape_and_cache_stacked, ReshapeAndCacheStackedBinding(),
                     MakeReshapeAndCacheStackedParams, CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(reshape_and_cache_one, ReshapeAndCacheOneBinding(),
                     MakeReshapeAndCacheOneParams, CheckAndLaunch);

}  // namespace xla_ops
