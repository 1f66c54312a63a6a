// The CUDA launcher of new_op; contract and parameters in new_op.h.

#ifndef XLA_OPS_CC_OPS_NEW_OP_NEW_OP_LAUNCH_H_
#define XLA_OPS_CC_OPS_NEW_OP_NEW_OP_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/new_op/new_op.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchNewOp(cudaStream_t stream, const NewOpParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_NEW_OP_NEW_OP_LAUNCH_H_
