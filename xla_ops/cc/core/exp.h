// e^x in vector instructions: std::exp keeps loops scalar.
//
// Tested by exp_test.cc.

#ifndef XLA_OPS_CC_CORE_EXP_H_
#define XLA_OPS_CC_CORE_EXP_H_

#include <cstdint>
#include <initializer_list>

#include "xla_ops/cc/core/float.h"

namespace xla_ops {

// Within 2 units in the last place, where the result is a normal number;
// infinity above 88.7, zero below -104, NaN for NaN.
inline float Exp(float x) {
  const uint32_t bits = internal::BitsOf(x);
  const uint32_t magnitude = bits & ~internal::kSign;
  // Beyond it nothing but the sign matters.
  const uint32_t most = internal::BitsOf(105.0f);
  const float clamped = internal::FloatOf(internal::Min(magnitude, most) |
                                          (bits & internal::kSign));
  // x = n ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to a whole
  // number, which its low bits then hold. n times the first part of ln 2 is
  // exact.
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 12582912.0f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float rounded = clamped * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = clamped - n * kLn2High - n * kLn2Low;
  // The series of e^r; what it leaves out is below 1e-8.
  float e = 1.0f / 5040;
  for (const float term :
       {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    e = e * r + term;
  }
  // In two steps, since 2^n need not be a float.
  const auto whole = static_cast<int32_t>(internal::BitsOf(rounded) -
                                          internal::BitsOf(kRound));
  const auto power = [](int32_t k) {
    return internal::FloatOf(static_cast<uint32_t>(k + 127) << 23);
  };
  const int32_t half = whole >> 1;
  e = e * power(half) * power(whole - half);
  const bool is_nan = magnitude > internal::kInfinity;
  return internal::FloatOf(internal::Select(is_nan, bits, internal::BitsOf(e)));
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_EXP_H_
