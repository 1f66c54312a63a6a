// The CUDA launchers of int8_quant; contract and parameters in int8_quant.h.
// They neither allocate nor synchronise. Any alignment is legal, 16 bytes is
// fast.

#ifndef XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_LAUNCH_H_
#define XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/int8_quant/int8_quant.h"

namespace xla_ops {

cudaError_t LaunchStaticInt8Quant(cudaStream_t stream,
                                  const Int8QuantParams& params);
cudaError_t LaunchDynamicInt8Quant(cudaStream_t stream,
                                   const Int8QuantParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_LAUNCH_H_
