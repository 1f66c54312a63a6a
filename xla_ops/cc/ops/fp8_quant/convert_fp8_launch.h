// The CUDA launcher of convert_fp8; contract and parameters in convert_fp8.h.

#ifndef XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_LAUNCH_H_
#define XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/fp8_quant/convert_fp8.h"

namespace xla_ops {

// Queues the kernel on `stream`; neither allocates nor synchronises. Any
// alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchConvertFp8(cudaStream_t stream,
                             const ConvertFp8Params& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_LAUNCH_H_
