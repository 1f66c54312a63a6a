// The Hopper launcher of linear: few rows on wgmma and TMA. Kernel and limits:
// linear_sm90.cuh, which a build without 9.0a leaves out.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_SM90_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_SM90_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/grouped_matmul/linear.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_plan.h"

namespace xla_ops {

#ifndef XLA_OPS_BUILT_SM90
#error "depend on //third_party/cuda:built_define"
#endif
#if XLA_OPS_BUILT_SM90

// Loads the kernels for the current device and asks how many blocks it runs
// at once; none where it is of another architecture.
cudaError_t PrepareLinearSm90(LinearDevice* device);

// Queues the kernel for a call that LaunchLinear gives to it. Where the driver
// cannot describe the operands to the copy engine, this is
// cudaErrorNotSupported, and nothing is queued.
cudaError_t LaunchLinearSm90(cudaStream_t stream, const LinearParams& params,
                             const LinearPlan& plan);

#else

inline cudaError_t PrepareLinearSm90(LinearDevice* device) {
  *device = {};
  return cudaSuccess;
}

inline cudaError_t LaunchLinearSm90(cudaStream_t, const LinearParams&,
                                    const LinearPlan&) {
  return cudaErrorNotSupported;
}

#endif  // XLA_OPS_BUILT_SM90

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_SM90_H_
