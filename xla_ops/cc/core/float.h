// CPU forms of the narrow floating-point types, and their conversions.
//
//   Half h = FromFloat<Half>(0.1f);      // to nearest, ties to even
//   float f = ToFloat(h);                // exact
//
// fp16 and bf16 overflow to infinity as IEEE 754 says. The fp8 types
// saturate: anything above the largest finite value, infinity included,
// becomes that value, and NaN stays NaN; so do CUDA's SATFINITE conversions
// and vLLM's caches.
//
// Branch-free integer code that compilers turn into vector instructions. It
// assumes the default rounding mode, but not that subnormal numbers work:
// XLA runs its threads with subnormals flushed to zero, and no step below
// has a subnormal float as an input or output that matters.
//
// Tested by float_test.cc: all 16-bit values, against arithmetic in double.

#ifndef XLA_OPS_CC_CORE_FLOAT_H_
#define XLA_OPS_CC_CORE_FLOAT_H_

#include <cstdint>
#include <cstring>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8E4M3FN {
  uint8_t bits;
};
struct Float8E5M2 {
  uint8_t bits;
};

template <DType kDType>
struct CpuTypeOf;
template <>
struct CpuTypeOf<DType::kF32> {
  using Type = float;
};
template <>
struct CpuTypeOf<DType::kF16> {
  using Type = Half;
};
template <>
struct CpuTypeOf<DType::kBF16> {
  using Type = BFloat16;
};
template <>
struct CpuTypeOf<DType::kF8E4M3FN> {
  using Type = Float8E4M3FN;
};
template <>
struct CpuTypeOf<DType::kF8E5M2> {
  using Type = Float8E5M2;
};
template <DType kDType>
using CpuType = typename CpuTypeOf<kDType>::Type;

namespace internal {

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// `a` where `condition` holds, else `b`. By masks, since compilers sink the
// arithmetic of a conditional expression's operands into branches, and loops
// with branches do not vectorise.
inline uint32_t Select(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = uint32_t{0} - static_cast<uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

// Rounds a float without its sign to a format of `kMantissa` mantissa bits
// and exponent bias `kBias`, as if that format had no largest exponent: what
// overflows, infinity and NaN included, is above its largest finite code.
template <int kMantissa, int kBias>
inline uint32_t RoundMagnitude(uint32_t magnitude) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kSmallestNormal = uint32_t{128 - kBias} << 23;
  const uint32_t odd = (magnitude >> kShift) & 1;
  const uint32_t normal =
      ((magnitude + (uint32_t{1} << (kShift - 1)) - 1 + odd) >> kShift) -
      (uint32_t{127 - kBias} << kMantissa);
  // One unit in the last place of this number is the format's smallest
  // subnormal, so the addition rounds to it and leaves its multiple in the
  // low bits.
  constexpr uint32_t kMagic = uint32_t{151 - kBias - kMantissa} << 23;
  const uint32_t subnormal =
      BitsOf(FloatOf(magnitude) + FloatOf(kMagic)) - kMagic;
  return Select(magnitude < kSmallestNormal, subnormal, normal);
}

// The inverse, for finite codes and, with `kHasInfinity`, the IEEE specials.
template <int kMantissa, int kBias, bool kHasInfinity>
inline float WidenMagnitude(uint32_t code) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kRebias = uint32_t{127 - kBias} << 23;
  uint32_t normal = (code << kShift) + kRebias;
  if constexpr (kHasInfinity) {
    // An exponent of all ones stays all ones.
    constexpr uint32_t kFirstSpecial = uint32_t{2 * kBias + 1} << kMantissa;
    normal += code >= kFirstSpecial ? kRebias : 0;
  }
  constexpr uint32_t kMagic = uint32_t{151 - kBias - kMantissa} << 23;
  const float subnormal = FloatOf(kMagic + code) - FloatOf(kMagic);
  return FloatOf(
      Select(code < (uint32_t{1} << kMantissa), BitsOf(subnormal), normal));
}

inline uint32_t Min(uint32_t a, uint32_t b) { return a < b ? a : b; }

inline constexpr uint32_t kSign = 0x80000000;
inline constexpr uint32_t kInfinity = 0x7f800000;

}  // namespace internal

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) {
  return internal::FloatOf(uint32_t{value.bits} << 16);
}

inline float ToFloat(Half value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x8000) << 16;
  const float magnitude =
      internal::WidenMagnitude<10, 15, true>(value.bits & 0x7fff);
  return internal::FloatOf(internal::BitsOf(magnitude) | sign);
}

inline float ToFloat(Float8E5M2 value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x80) << 24;
  const float magnitude =
      internal::WidenMagnitude<2, 15, true>(value.bits & 0x7f);
  return internal::FloatOf(internal::BitsOf(magnitude) | sign);
}

// No infinity; both codes of all ones are NaN.
inline float ToFloat(Float8E4M3FN value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x80) << 24;
  const uint32_t code = value.bits & 0x7f;
  const float magnitude = internal::WidenMagnitude<3, 7, false>(code);
  const uint32_t bits = code == 0x7f ? 0x7fc00000 : internal::BitsOf(magnitude);
  return internal::FloatOf(bits | sign);
}

template <typename T>
T FromFloat(float value);

template <>
inline float FromFloat<float>(float value) {
  return value;
}

template <>
inline BFloat16 FromFloat<BFloat16>(float value) {
  const uint32_t bits = internal::BitsOf(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;
  const bool is_nan = (bits & ~internal::kSign) > internal::kInfinity;
  return BFloat16{
      static_cast<uint16_t>(internal::Select(is_nan, nan, rounded))};
}

template <>
inline Half FromFloat<Half>(float value) {
  const uint32_t bits = internal::BitsOf(value);
  const uint32_t magnitude = bits & ~internal::kSign;
  uint32_t code =
      internal::Min(internal::RoundMagnitude<10, 15>(magnitude), 0x7c00);
  code = internal::Select(magnitude > internal::kInfinity, 0x7e00, code);
  return Half{static_cast<uint16_t>(code | ((bits >> 16) & 0x8000))};
}

template <>
inline Float8E4M3FN FromFloat<Float8E4M3FN>(float value) {
  const uint32_t bits = internal::BitsOf(value);
  const uint32_t magnitude = bits & ~internal::kSign;
  uint32_t code =
      internal::Min(internal::RoundMagnitude<3, 7>(magnitude), 0x7e);
  code = internal::Select(magnitude > internal::kInfinity, 0x7f, code);
  return Float8E4M3FN{static_cast<uint8_t>(code | ((bits >> 24) & 0x80))};
}

template <>
inline Float8E5M2 FromFloat<Float8E5M2>(float value) {
  const uint32_t bits = internal::BitsOf(value);
  const uint32_t magnitude = bits & ~internal::kSign;
  uint32_t code =
      internal::Min(internal::RoundMagnitude<2, 15>(magnitude), 0x7b);
  code = internal::Select(magnitude > internal::kInfinity, 0x7f, code);
  return Float8E5M2{static_cast<uint8_t>(code | ((bits >> 24) & 0x80))};
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_FLOAT_H_
