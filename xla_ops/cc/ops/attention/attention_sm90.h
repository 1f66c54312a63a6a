// The Hopper launcher of attention: prefill on wgmma and TMA. Kernel and
// limits: attention_sm90.cu.cc, which a build without 9.0a leaves out.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_choice.h"

namespace xla_ops {

struct AttentionArgs;

#ifndef XLA_OPS_BUILT_SM90
#error "depend on //third_party/cuda:built_define"
#endif
#if XLA_OPS_BUILT_SM90

// Loads the kernels for the current device, whose capability is known, and
// sets `device->has_wgmma` where it can run them.
cudaError_t PrepareAttentionSm90(AttentionDevice* device);

// Queues the kernel behind a memset of its counter in the workspace, which
// LaunchAttention has checked. `args` are those of `params`, a call that
// ChooseAttentionKernel gives to this kernel or shares between it and another
// (`few_rows`). Where the driver cannot describe
// its keys and values to the copy engine, this is cudaErrorNotSupported, and
// nothing is queued.
cudaError_t LaunchAttentionSm90(cudaStream_t stream,
                                const AttentionParams& params,
                                const AttentionArgs& args,
                                const AttentionDevice& device);

#else

inline cudaError_t PrepareAttentionSm90(AttentionDevice* device) {
  device->has_wgmma = false;
  return cudaSuccess;
}

inline cudaError_t LaunchAttentionSm90(cudaStream_t, const AttentionParams&,
                                       const AttentionArgs&,
                                       const AttentionDevice&) {
  return cudaErrorNotSupported;
}

#endif  // XLA_OPS_BUILT_SM90

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_H_
