// Exp against std::exp in double, and where it has no normal result.

#include "xla_ops/cc/core/exp.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

XLA_OPS_TEST(IsWithinTwoUnitsInTheLastPlace) {
  double worst = 0;
  // Every 1009th float, of either sign, from the smallest normal result on.
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 1009) {
    const float x = internal::FloatOf(static_cast<uint32_t>(bits));
    if (!(x > -87.3f && x < 88.7f)) continue;
    const double want = std::exp(static_cast<double>(x));
    const float nearest = static_cast<float>(want);
    const double unit = std::nextafter(nearest, kInfinity) - nearest;
    worst = std::fmax(worst, std::fabs(Exp(x) - want) / unit);
  }
  EXPECT_TRUE(worst < 2);
  EXPECT_TRUE(worst > 0.4);  // it looked at something
}

XLA_OPS_TEST(HasNoNormalResultOutside) {
  for (const float x : {89.0f, 104.0f, 1e30f, kInfinity}) {
    EXPECT_EQ(Exp(x), kInfinity);
  }
  for (const float x : {-104.0f, -1e30f, -kInfinity}) EXPECT_EQ(Exp(x), 0.0f);
  // A subnormal number, or zero where those are flushed.
  EXPECT_TRUE(Exp(-95.0f) >= 0 && Exp(-95.0f) < 1e-38f);
  EXPECT_TRUE(std::isnan(Exp(std::nanf(""))));
  EXPECT_TRUE(std::isnan(Exp(-std::nanf(""))));
  EXPECT_EQ(Exp(0.0f), 1.0f);
  EXPECT_EQ(Exp(-0.0f), 1.0f);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
