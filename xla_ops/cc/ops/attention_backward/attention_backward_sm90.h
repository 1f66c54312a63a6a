// The Hopper launcher of attention's gradient. Kernel and limits:
// attention_backward_sm90.cu.cc, which a build without 9.0a leaves out.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_H_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/attention_backward/attention_backward.h"

namespace xla_ops {

struct AttentionBackwardArgs;

// Of a tile of queries and one of keys.
struct BackwardTileRows {
  int query;
  int key;
};

#ifndef XLA_OPS_BUILT_SM90
#error "depend on //third_party/cuda:built_define"
#endif
#if XLA_OPS_BUILT_SM90

// Whether the kernel takes the call, on a device of compute capability 9.0.
bool CanRunBackwardSm90(const AttentionBackwardParams& params);

// Loads the kernels for the current device, of compute capability 9.0.
cudaError_t PrepareBackwardSm90();

BackwardTileRows BackwardSm90TileRows(const AttentionBackwardParams& params);

// Queues lse and delta, the products, and what rounds dq, behind the table of
// segments. cudaErrorNotSupported: the driver cannot describe the operands to
// the copy engine, and nothing was queued.
cudaError_t LaunchBackwardSm90(cudaStream_t stream,
                               const AttentionBackwardParams& params,
                               const AttentionBackwardArgs& args);

#else

inline bool CanRunBackwardSm90(const AttentionBackwardParams&) { return false; }
inline cudaError_t PrepareBackwardSm90() { return cudaSuccess; }
inline BackwardTileRows BackwardSm90TileRows(const AttentionBackwardParams&) {
  return {};
}
inline cudaError_t LaunchBackwardSm90(cudaStream_t,
                                      const AttentionBackwardParams&,
                                      const AttentionBackwardArgs&) {
  return cudaErrorNotSupported;
}

#endif  // XLA_OPS_BUILT_SM90

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_H_
