// The CUDA launcher of fused_qk_norm_rope_and_cache; contract and parameters in
// fused_qk_norm_rope_and_cache.h.

#ifndef XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_LAUNCH_H_
#define XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"

namespace xla_ops {

// Queues on `stream` what `copies` asks for, with params.debug a kernel that
// prints the slots that are skipped for being out of range, and one kernel that
// does the rest and lets the next one start early (device/overlap.cuh); of
// parameters within CheckCudaLimits. It neither allocates nor synchronises. Any
// alignment of pointers and strides is legal, 16 bytes is fast.
cudaError_t LaunchFusedQkNormRopeAndCache(
    cudaStream_t stream, const FusedQkNormRopeAndCacheParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_LAUNCH_H_
