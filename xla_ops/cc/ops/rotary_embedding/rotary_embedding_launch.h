// The CUDA launcher of rotary_embedding; contract and parameters in
// rotary_embedding.h.

#ifndef XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_LAUNCH_H_
#define XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"

namespace xla_ops {

// Queues one kernel for queries and keys on `stream`; neither allocates nor
// synchronises. Any alignment of the pointers is legal, 16 bytes is fast.
// `params` have passed CheckCudaLimits.
cudaError_t LaunchRotaryEmbedding(cudaStream_t stream,
                                  const RotaryEmbeddingParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_LAUNCH_H_
