// Tests of exact_div.h, on the host, where fma() is the same function.

#include "xla_ops/cc/device/exact_div.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

float Divide(const ExactDiv& div, float x) {
  const float dividend[1] = {x};
  float quotient[1];
  div.Divide(dividend, quotient);
  return quotient[0];
}

// Exponents change neither side's rounding, so significands do.
XLA_OPS_TEST(QuotientsAreCorrectlyRounded) {
  // Coprime to 2^23, so that the low bits of the divisors vary.
  constexpr uint32_t kStep = 251;
  int64_t wrong = 0;
  for (uint32_t significand = 0; significand < 1u << 23; significand += kStep) {
    const uint32_t bits = 0x3f800000u | significand;
    float divisor;
    std::memcpy(&divisor, &bits, sizeof(divisor));
    const ExactDiv div(divisor);
    for (int i = 0; i < 1024; ++i) {
      const float x = 1.0f + static_cast<float>(i) / 1024.0f;
      wrong += Divide(div, x) != x / divisor;
    }
  }
  EXPECT_EQ(wrong, 0);
}

XLA_OPS_TEST(SpecialDividendsAndDivisors) {
  for (const float divisor :
       {0.02f, 3.0f, -0.7f, 0x1p-100f, 0x1p100f, 0.0f, kInf, -kInf}) {
    const ExactDiv div(divisor);
    for (const float x : {0.0f, -0.0f, kInf, -kInf, 65504.0f, -3.0e38f}) {
      const float want = x / divisor;
      const float got = Divide(div, x);
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(got));
      } else if (std::fabs(want) <= 0x1p40f) {
        EXPECT_EQ(got, want);
        if (divisor > 0.0f) {
          EXPECT_TRUE(std::signbit(got) == std::signbit(want));
        }
      } else {
        EXPECT_TRUE(std::fabs(got) >= 0x1p40f);
        EXPECT_TRUE(std::signbit(got) == std::signbit(want));
      }
    }
    EXPECT_TRUE(std::isnan(Divide(div, std::nanf(""))));
  }
  EXPECT_TRUE(std::isnan(Divide(ExactDiv(std::nanf("")), 1.0f)));
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
