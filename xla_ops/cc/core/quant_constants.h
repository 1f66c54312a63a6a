// What quantisation on the CPU (quant.h) and on CUDA (device/quant.cuh) must
// agree on.

#ifndef XLA_OPS_CC_CORE_QUANT_CONSTANTS_H_
#define XLA_OPS_CC_CORE_QUANT_CONSTANTS_H_

namespace xla_ops {

// The largest number of float8_e4m3fn.
inline constexpr float kFp8Max = 448.0f;
// The smallest scale of a row that is quantised to fp8, and to int8 after
// RMSNorm. vLLM's: the second is FLT_EPSILON.
inline constexpr float kMinFp8Scale = 1.0f / (kFp8Max * 512.0f);
inline constexpr float kMinInt8Scale = 1.1920928955078125e-07f;

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_QUANT_CONSTANTS_H_
