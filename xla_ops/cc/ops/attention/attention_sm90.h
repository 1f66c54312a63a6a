// The Hopper launcher of attention: prefill on wgmma and TMA. Kernel and
// limits: attention_sm90.cu.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {

// Loads the kernels for the current device, where it can run them.
cudaError_t PrepareAttentionSm90();

// Whether the kernel takes this call: compute capability 9.0, fp16 or bf16
// keys and values, alignment and strides that TMA can address, pages of a
// multiple of 16 tokens, one split, and enough query rows to fill its tiles.
bool CanLaunchAttentionSm90(const AttentionParams& params);

// Queues the kernel behind a memset of its counter in the workspace, which
// LaunchAttention has checked.
cudaError_t LaunchAttentionSm90(cudaStream_t stream,
                                const AttentionParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_H_
