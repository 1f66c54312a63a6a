// Quantisation of one number on the CPU, and the scales of rows. The device
// code, xla_ops/cc/device/quant.cuh, computes the same to the last bit.
//
// Comparisons are written so that a NaN operand loses, as with fminf() and
// fmaxf(), yet vectorise.
//
// Tested by the C++ tests of the quantising ops.

#ifndef XLA_OPS_CC_CORE_QUANT_H_
#define XLA_OPS_CC_CORE_QUANT_H_

#include <cmath>
#include <cstdint>

#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/quant_constants.h"

namespace xla_ops {

// Saturates, infinities too. NaN becomes 448, as in vLLM. By the bits: a
// comparison of floats would keep loops from being vectorised.
inline Float8E4M3FN ToFp8(float x) {
  constexpr uint32_t kNan = 0x7f, kMax = 0x7e;
  const uint32_t code = FromFloat<Float8E4M3FN>(x).bits;
  const bool is_nan = (code & kNan) == kNan;
  return Float8E4M3FN{
      static_cast<uint8_t>(internal::Select(is_nan, kMax, code))};
}

// To nearest, ties to even. Adding 1.5 * 2^23 leaves no room for a fraction;
// exact for |x| < 2^22.
inline float RoundSmall(float x) {
  constexpr float kMagic = 12582912.0f;
  return (x + kMagic) - kMagic;
}

// Rounds to nearest even and saturates. NaN becomes 0.
inline int8_t ToInt8(float x) {
  x = x == x ? x : 0.0f;
  x = x > -128.0f ? x : -128.0f;
  x = x < 127.0f ? x : 127.0f;
  return static_cast<int8_t>(RoundSmall(x));
}

// The same to 32 bits.
inline int32_t ToInt32(float x) {
  if (!(x == x)) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x <= -2147483648.0f) return INT32_MIN;
  return static_cast<int32_t>(std::nearbyint(x));
}

// Sum and result saturate: |azp| may be up to 2^31.
inline int8_t AddZeroPoint(int32_t x, int32_t azp) {
  const int64_t sum = int64_t{x} + azp;
  return static_cast<int8_t>(sum < -128 ? -128 : sum > 127 ? 127 : sum);
}

// The largest magnitude of row(i) for i in [0, size); NaN does not count.
template <typename Row>
float AbsMax(int64_t size, const Row& row) {
  float max = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    const float x = std::fabs(row(i));
    max = x > max ? x : max;
  }
  return max;
}

// `upper_bound` limits the magnitude that must be representable; null for
// none.
inline float Fp8RowScale(float abs_max, const float* upper_bound) {
  if (upper_bound != nullptr && *upper_bound < abs_max) abs_max = *upper_bound;
  const float scale = abs_max / kFp8Max;
  return scale > kMinFp8Scale ? scale : kMinFp8Scale;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_QUANT_H_
