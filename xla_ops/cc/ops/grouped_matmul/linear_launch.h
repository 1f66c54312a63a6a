// The CUDA launcher of linear; contract and parameters in linear.h.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_LAUNCH_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/grouped_matmul/linear.h"

namespace xla_ops {

// Queues one kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal; fp16 and bf16 use tensor cores from
// compute capability 8.0 on where input and weight are aligned to 16 bytes
// and the depth is a multiple of 8.
cudaError_t LaunchLinear(cudaStream_t stream, const LinearParams& params);

// Loads the kernels on the current device.
cudaError_t PrepareLinear();

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_LAUNCH_H_
