// Conversions of narrow floats against arithmetic in double: every code is
// decoded, and every boundary between two neighbouring codes is rounded,
// exactly on it and one float to each side. Conversions are monotonic, so
// that covers all floats; a sample of all bit patterns checks that they are.
// All of it runs twice: with subnormal numbers, and with subnormals flushed
// to zero, as XLA runs its threads.

#include "xla_ops/cc/core/float.h"

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A format as its specification gives it.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  bool has_infinity;  // else only the code of all ones is special, and NaN
  bool saturates;
};

template <typename T>
Format FormatOf();
template <>
Format FormatOf<Half>() {
  return {5, 10, 15, true, false};
}
template <>
Format FormatOf<BFloat16>() {
  return {8, 7, 127, true, false};
}
template <>
Format FormatOf<Float8E4M3FN>() {
  return {4, 3, 7, false, true};
}
template <>
Format FormatOf<Float8E5M2>() {
  return {5, 2, 15, true, true};
}

// The value of a code without its sign.
double SlowDecode(const Format& format, uint32_t code) {
  const uint32_t exponent = code >> format.mantissa_bits;
  const uint32_t mantissa = code & ((1u << format.mantissa_bits) - 1);
  const uint32_t last_exponent = (1u << format.exponent_bits) - 1;
  if (exponent == last_exponent) {
    if (format.has_infinity) return mantissa == 0 ? kInf : std::nan("");
    if (mantissa == (1u << format.mantissa_bits) - 1) return std::nan("");
  }
  const double fraction =
      std::ldexp(static_cast<double>(mantissa), -format.mantissa_bits);
  return exponent == 0 ? std::ldexp(fraction, 1 - format.bias)
                       : std::ldexp(1 + fraction,
                                    static_cast<int>(exponent) - format.bias);
}

// The finite codes without sign are 0 .. LastFinite, in order of value.
uint32_t LastFinite(const Format& format) {
  uint32_t code = 0;
  while (std::isfinite(SlowDecode(format, code + 1))) ++code;
  return code;
}

struct SlowEncoder {
  explicit SlowEncoder(const Format& format)
      : format(format), last(LastFinite(format)) {
    for (uint32_t code = 0; code <= last; ++code) {
      values.push_back(SlowDecode(format, code));
    }
    // Where the next code would be, were there one.
    values.push_back(2 * values[last] - values[last - 1]);
  }

  // The code of a magnitude; NaN has no one code.
  uint32_t operator()(double magnitude) const {
    const uint32_t above = static_cast<uint32_t>(
        std::lower_bound(values.begin(), values.end(), magnitude) -
        values.begin());
    uint32_t code;
    if (above == values.size()) {
      code = last + 1;
    } else if (values[above] == magnitude) {
      code = above;
    } else {
      const double down = magnitude - values[above - 1];
      const double up = values[above] - magnitude;
      const bool round_up = up < down || (up == down && above % 2 == 0);
      code = round_up ? above : above - 1;
    }
    if (code <= last) return code;
    return format.saturates ? last : last + 1;  // the latter is infinity
  }

  Format format;
  uint32_t last;
  std::vector<double> values;
};

template <typename T>
constexpr uint32_t SignBit() {
  return 1u << (8 * sizeof(T) - 1);
}

template <typename T>
T FromCode(uint32_t code) {
  return T{static_cast<decltype(T::bits)>(code)};
}

template <typename T>
void TestDecode() {
  const Format format = FormatOf<T>();
  for (uint32_t code = 0; code < SignBit<T>(); ++code) {
    const double want = SlowDecode(format, code);
    const float got = ToFloat(FromCode<T>(code));
    const float negative = ToFloat(FromCode<T>(code | SignBit<T>()));
    EXPECT_TRUE(std::signbit(negative));
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got) && std::isnan(negative));
      // NaN comes back as NaN.
      EXPECT_TRUE(std::isnan(ToFloat(FromFloat<T>(got))));
      continue;
    }
    // Compared as bits: with subnormals flushed, == calls them all zero.
    const float want_float = static_cast<float>(want);
    EXPECT_EQ(internal::BitsOf(got), internal::BitsOf(want_float));
    EXPECT_EQ(internal::BitsOf(negative),
              internal::BitsOf(want_float) | internal::kSign);
  }
}

template <typename T>
void ExpectCode(const SlowEncoder& slow, float magnitude) {
  const uint32_t want = slow(magnitude);
  EXPECT_EQ(uint32_t{FromFloat<T>(magnitude).bits}, want);
  EXPECT_EQ(uint32_t{FromFloat<T>(-magnitude).bits}, want | SignBit<T>());
}

template <typename T>
void TestEncode() {
  const SlowEncoder slow(FormatOf<T>());
  for (uint32_t code = 0; code <= slow.last; ++code) {
    const float value = static_cast<float>(slow.values[code]);
    const float middle =
        static_cast<float>((slow.values[code] + slow.values[code + 1]) / 2);
    ExpectCode<T>(slow, value);
    ExpectCode<T>(slow, middle);
    ExpectCode<T>(slow, std::nextafter(middle, 0.0f));
    ExpectCode<T>(
        slow, std::nextafter(middle, std::numeric_limits<float>::infinity()));
  }
  ExpectCode<T>(slow, std::numeric_limits<float>::max());
  ExpectCode<T>(slow, std::numeric_limits<float>::infinity());
  for (const float sign : {1.0f, -1.0f}) {
    const float nan =
        std::copysign(std::numeric_limits<float>::quiet_NaN(), sign);
    EXPECT_TRUE(std::isnan(ToFloat(FromFloat<T>(nan))));
  }
  // A NaN whose payload lies below the bits that are kept.
  EXPECT_TRUE(std::isnan(ToFloat(FromFloat<T>(internal::FloatOf(0x7f800001)))));
}

template <typename T>
void TestSample() {
  const SlowEncoder slow(FormatOf<T>());
  for (uint32_t bits = 0; bits < internal::kInfinity - 4099; bits += 4099) {
    // The slow way sees no subnormal floats when they are flushed.
    if (bits < 0x00800000 && sizeof(T) == 1) continue;
    ExpectCode<T>(slow, internal::FloatOf(bits));
  }
}

// Runs `body` with subnormals, then without: MXCSR bits 15 (results flushed)
// and 6 (operands taken as zero).
template <typename Body>
void InBothModes(const Body& body) {
  const unsigned int saved = _mm_getcsr();
  body();
  _mm_setcsr(saved | 0x8040);
  body();
  _mm_setcsr(saved);
}

XLA_OPS_TEST(DecodesEveryCode) {
  InBothModes([] {
    TestDecode<Half>();
    TestDecode<Float8E4M3FN>();
    TestDecode<Float8E5M2>();
  });
  // Half of bfloat16's small codes are subnormal floats: the double-to-float
  // conversion of the expected value needs subnormals.
  TestDecode<BFloat16>();
}

XLA_OPS_TEST(RoundsAtEveryBoundary) {
  InBothModes([] {
    TestEncode<Half>();
    TestEncode<Float8E4M3FN>();
    TestEncode<Float8E5M2>();
  });
  TestEncode<BFloat16>();
}

XLA_OPS_TEST(RoundsASampleOfAllFloats) {
  TestSample<Half>();
  TestSample<BFloat16>();
  InBothModes([] {
    TestSample<Float8E4M3FN>();
    TestSample<Float8E5M2>();
  });
}

XLA_OPS_TEST(KnownValues) {
  EXPECT_EQ(FromFloat<Half>(1.0f).bits, 0x3c00);
  EXPECT_EQ(FromFloat<Half>(65520.0f).bits, 0x7c00);
  EXPECT_EQ(FromFloat<BFloat16>(1.0f).bits, 0x3f80);
  EXPECT_EQ(FromFloat<Float8E4M3FN>(1.0f).bits, 0x38);
  EXPECT_EQ(FromFloat<Float8E4M3FN>(1e9f).bits, 0x7e);
  EXPECT_EQ(ToFloat(Float8E4M3FN{0x7e}), 448.0f);
  EXPECT_EQ(FromFloat<Float8E5M2>(-1e9f).bits, 0xfb);
  EXPECT_EQ(ToFloat(Float8E5M2{0x7b}), 57344.0f);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
