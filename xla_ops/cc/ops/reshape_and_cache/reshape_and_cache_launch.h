// The CUDA launcher of reshape_and_cache; contract and parameters in
// reshape_and_cache.h.

#ifndef XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_LAUNCH_H_
#define XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache.h"

namespace xla_ops {

// Queues one kernel for both caches on `stream` (and, with params.debug, a
// second one that prints the slots that are skipped for being out of range) of
// parameters within CheckCudaLimits;
// neither allocates nor synchronises, and leaves the copies alone. Any
// alignment of pointers and strides is legal, 16 bytes is fast.
cudaError_t LaunchReshapeAndCache(cudaStream_t stream,
                                  const ReshapeAndCacheParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_LAUNCH_H_
