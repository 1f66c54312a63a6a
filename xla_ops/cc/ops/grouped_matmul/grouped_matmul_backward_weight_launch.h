// The CUDA launcher of grouped_matmul_backward_weight; contract and parameters
// in grouped_matmul_backward_weight.h.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_LAUNCH_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal; fp16 and bf16 use tensor cores from
// compute capability 8.0 on where grad and input are aligned to 16 bytes and
// N and K are multiples of 8.
cudaError_t LaunchGroupedMatmulBackwardWeight(
    cudaStream_t stream, const GroupedMatmulBackwardWeightParams& params);

// Loads the kernels on the current device.
cudaError_t PrepareGroupedMatmulBackwardWeight();

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_LAUNCH_H_
