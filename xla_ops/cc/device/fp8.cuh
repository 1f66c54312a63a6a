// Conversion to 8-bit floats as the KV cache stores them: round to nearest
// even, saturate (infinities too) to the largest finite value, keep NaN.
// One instruction for two values from compute capability 8.9 on, integer
// code of CUDA's header below.

#ifndef XLA_OPS_CC_DEVICE_FP8_CUH_
#define XLA_OPS_CC_DEVICE_FP8_CUH_

#include <cuda_fp8.h>

#include <cstdint>

namespace xla_ops {

template <__nv_fp8_interpretation_t kFormat>
__device__ __forceinline__ uint8_t ToFp8(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kFormat);
}

// The first value goes to the low byte.
template <__nv_fp8_interpretation_t kFormat>
__device__ __forceinline__ uint16_t ToFp8Pair(float x, float y) {
  return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, kFormat);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_FP8_CUH_
