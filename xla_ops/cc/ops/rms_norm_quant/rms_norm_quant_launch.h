// The CUDA launcher of rms_norm_quant; contract in rms_norm_quant.h.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_LAUNCH_H_
#define XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchRmsNormQuant(cudaStream_t stream,
                               const RmsNormQuantParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_LAUNCH_H_
