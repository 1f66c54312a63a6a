// The CUDA launchers of fp8_quant; contract and parameters in fp8_quant.h.
// They neither allocate nor synchronise. Any alignment is legal, 16 bytes is
// fast.

#ifndef XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_LAUNCH_H_
#define XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/fp8_quant/fp8_quant.h"

namespace xla_ops {

cudaError_t LaunchStaticFp8Quant(cudaStream_t stream,
                                 const Fp8QuantParams& params);
cudaError_t LaunchDynamicFp8Quant(cudaStream_t stream,
                                  const Fp8QuantParams& params);
cudaError_t LaunchPerTokenFp8Quant(cudaStream_t stream,
                                   const Fp8QuantParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_LAUNCH_H_
