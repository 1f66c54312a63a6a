// The CUDA launcher of copy_blocks; contract and parameters in copy_blocks.h.

#ifndef XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_LAUNCH_H_
#define XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"

namespace xla_ops {

// Queues the copies between blocks on `stream` (and, with params.debug, a
// kernel that prints the pairs that are skipped for being out of range);
// neither allocates nor synchronises, and leaves copy_from alone. Any
// alignment of pointer and strides is legal, 16 bytes is fast. `params` have
// passed CheckCudaLimits.
cudaError_t LaunchCopyBlocks(cudaStream_t stream,
                             const CopyBlocksParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_LAUNCH_H_
