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

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const FusedQkNormRopeAndCacheParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params));
  return ToLaunchError("fused_qk_norm_rope_and_cache",
                       LaunchFusedQkNormRopeAndCache(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER(fused_qk_norm_rope_and_cache,
                     FusedQkNormRopeAndCacheBinding(),
                     MakeFusedQkNormRopeAndCacheParams, CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(fused_qk_norm_rope_and_cache_stacked,
                     FusedQkNormRopeAndCacheStackedBinding(),
                     MakeFusedQkNormRopeAndCacheStackedParams, CheckAndLaunch);

}  // namespace xla_ops
