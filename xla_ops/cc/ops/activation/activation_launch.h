// The CUDA launchers of the activations; contract and parameters in
// activation.h.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_LAUNCH_H_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/activation/activation.h"

namespace xla_ops {

// Queue a kernel on `stream`; neither allocate nor synchronise. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchActivation(cudaStream_t stream,
                             const ActivationParams& params);

// What LaunchActivation calls for those that take no halves: swigluoai_and_mul
// and the ones without a gate.
cudaError_t LaunchFlatActivation(cudaStream_t stream,
                                 const ActivationParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_LAUNCH_H_
