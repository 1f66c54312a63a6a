// The CUDA launcher of reshape_and_cache_flash; contract and parameters in
// reshape_and_cache_flash.h.

#ifndef XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_RESHAPE_AND_CACHE_FLASH_LAUNCH_H_
#define XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_RESHAPE_AND_CACHE_FLASH_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"

namespace xla_ops {

// Queues one kernel for both caches on `stream` (and, with params.debug, a
// second one that prints the slots that are skipped for being out of range);
// neither allocates nor synchronises, and leaves `copies` alone. Any alignment
// of pointers and strides is legal, 16 bytes is fast. `params` have passed
// CheckCudaLimits.
cudaError_t LaunchReshapeAndCacheFlash(
    cudaStream_t stream, const ReshapeAndCacheFlashParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_RESHAPE_AND_CACHE_FLASH_LAUNCH_H_
