// The CUDA handlers of fused_qk_norm_rope_and_cache: two targets that differ in
// their operands and share one kernel.
//
// Tested by tests/gpu/check_kernels.py and
// tests/ops/test_fused_qk_norm_rope_and_cache.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_checks.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_launch.h"

namespace xla_ops {
namespace {

cudaError_t CopyAndLaunch(cudaStream_t stream,
                          const FusedQkNormRopeAndCacheParams& params) {
  for (int i = 0; i < params.num_copies; ++i) {
    const CacheCopy& copy = params.copies[i];
    const cudaError_t error =
        cudaMemcpyAsync(copy.to, copy.from, static_cast<size_t>(copy.bytes),
                        cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return LaunchFusedQkNormRopeAndCache(stream, params);
}

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const FusedQkNormRopeAndCacheParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params));
  return ToLaunchError("fused_qk_norm_rope_and_cache",
                       CopyAndLaunch(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER(fused_qk_norm_rope_and_cache,
                     FusedQkNormRopeAndCacheBinding(),
                     MakeFusedQkNormRopeAndCacheParams, CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(fused_qk_norm_rope_and_cache_stacked,
                     FusedQkNormRopeAndCacheStackedBinding(),
                     MakeFusedQkNormRopeAndCacheStackedParams, CheckAndLaunch);

}  // namespace xla_ops
