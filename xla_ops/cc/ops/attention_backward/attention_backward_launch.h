// The CUDA launcher of attention's gradient; contract and parameters in
// attention_backward.h.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_LAUNCH_H_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/attention_backward/attention_backward.h"

namespace xla_ops {

// As PrepareAttention (attention_launch.h): loads the kernels on the current
// device and raises their shared-memory limit; for the initialize stage.
cudaError_t PrepareAttentionBackward();

// Queues kernels on `stream`, and memsets in the workspace and the results;
// never allocates or synchronises. Every wanted result is written whole, also
// where there is no token or no sequence. Beyond attention.h's limits it
// returns cudaErrorInvalidConfiguration, with a workspace too small or not
// aligned to 16 bytes cudaErrorInvalidValue.
cudaError_t LaunchAttentionBackward(cudaStream_t stream,
                                    const AttentionBackwardParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_LAUNCH_H_
