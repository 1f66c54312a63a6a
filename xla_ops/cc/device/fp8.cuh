// Conversion to and from 8-bit floats as the KV cache stores them. To: round to
// nearest even, saturate (infinities too) to the largest finite value, keep
// NaN. From: exact, to fp16, which holds every value of both formats; NaN and
// infinity stay what they are. One instruction for two values from compute
// capability 8.9 on, integer code below.

#ifndef XLA_OPS_CC_DEVICE_FP8_CUH_
#define XLA_OPS_CC_DEVICE_FP8_CUH_

#include <cuda_fp16.h>
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

// Bytes kLow and kHigh of `word` as two halves.
template <__nv_fp8_interpretation_t kFormat, int kLow, int kHigh>
__device__ __forceinline__ uint32_t HalvesFromFp8(uint32_t word) {
  // Each byte becomes the upper one of a half.
  constexpr unsigned kUpper = kHigh << 12 | 4 << 8 | kLow << 4 | 4;
  if constexpr (kFormat == __NV_E5M2) return __byte_perm(word, 0, kUpper);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  const uint32_t pair =
      kLow == 0 && kHigh == 1 ? word : __byte_perm(word, 0, kHigh << 4 | kLow);
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
      : "=r"(halves)
      : "h"(static_cast<uint16_t>(pair)));
  return halves;
#else
  // Exponent and mantissa lie one bit lower in a half, and its bias is larger
  // by 8. NaN is the one magnitude that adding one takes to 0x80.
  const uint32_t bytes = __byte_perm(word, 0, kUpper);
  const uint32_t magnitude = bytes & 0x7f007f00;
  const uint32_t nan = (magnitude + 0x01000100) & 0x80008000;
  const uint32_t small = magnitude >> 1;
  const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(small),
                                 __floats2half2_rn(256.0f, 256.0f));
  return reinterpret_cast<const uint32_t&>(scaled) | (bytes & 0x80008000) |
         (nan - (nan >> 15));
#endif
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_FP8_CUH_
