// The derivatives of the activations, for CPU and CUDA code: `Math` has the
// functions that they are made of, as static members,
//
//   float Sigmoid(float x);  float Tanh(float x);
//   float Erf(float x);      float Exp(float x);
//
// Tested by activation_backward_test.cc and tests/gpu/check_gradients.py.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_GRADIENT_H_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_GRADIENT_H_

#include "xla_ops/cc/ops/activation/activation.h"

#ifdef __CUDACC__
#define XLA_OPS_ACTIVATION_INLINE __device__ __forceinline__
#else
#define XLA_OPS_ACTIVATION_INLINE inline
#endif

namespace xla_ops {

// An activation's value and derivative at one point.
struct ValueAndSlope {
  float value;
  float slope;
};

// x sigmoid(beta x).
template <typename Math>
XLA_OPS_ACTIVATION_INLINE ValueAndSlope SwishSlope(float x, float beta) {
  const float s = Math::Sigmoid(beta * x);
  const float value = x * s;
  // In this order nothing overflows that is then multiplied by zero.
  return {value, s + value * (1.0f - s) * beta};
}

template <typename Math>
XLA_OPS_ACTIVATION_INLINE ValueAndSlope GeluTanhSlope(float x) {
  constexpr float kScale = 0.79788456f;  // sqrt(2 / pi)
  constexpr float kCubic = 0.044715f;
  const float t = Math::Tanh(kScale * (x + kCubic * (x * x * x)));
  // Beyond 10 the tanh is flat, and x^2 could be infinite.
  const float z = x > 10.0f ? 10.0f : x < -10.0f ? -10.0f : x;
  const float slope = kScale * (1.0f + 3.0f * kCubic * (z * z));
  return {0.5f * x * (1.0f + t),
          0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * slope};
}

template <Activation kActivation, typename Math>
XLA_OPS_ACTIVATION_INLINE ValueAndSlope
Slope(float x, const ActivationConstants& constants) {
  if constexpr (kActivation == Activation::kGeluAndMul) {
    const float share = 0.5f * (1.0f + Math::Erf(x * 0.70710678f));
    const float density = 0.39894228f * Math::Exp(-0.5f * x * x);
    return {x * share, share + x * density};
  } else if constexpr (kActivation == Activation::kGeluTanhAndMul ||
                       kActivation == Activation::kGeluNew) {
    return GeluTanhSlope<Math>(x);
  } else if constexpr (kActivation == Activation::kGeluQuick) {
    return SwishSlope<Math>(x, 1.702f);
  } else if constexpr (kActivation == Activation::kFatreluAndMul) {
    return x > constants.threshold ? ValueAndSlope{x, 1.0f}
                                   : ValueAndSlope{0.0f, 0.0f};
  } else {
    return SwishSlope<Math>(x, 1.0f);
  }
}

struct InputGradient {
  float dx;
  float dy;  // of the other element, where there is a gate
};

// Of one element of the result with gradient `g`, made of `x` and `y`.
template <Activation kActivation, typename Math>
XLA_OPS_ACTIVATION_INLINE InputGradient
GradientOf(float g, float x, float y, const ActivationConstants& constants) {
  if constexpr (kActivation == Activation::kMulAndSilu) {
    const InputGradient swapped =
        GradientOf<Activation::kSiluAndMul, Math>(g, y, x, constants);
    return {swapped.dy, swapped.dx};
  } else if constexpr (kActivation == Activation::kSwigluoaiAndMul) {
    // Comparisons that NaN passes by.
    const float limit = constants.limit;
    const bool x_beyond = x > limit;
    const bool y_beyond = y > limit || y < -limit;
    x = x_beyond ? limit : x;
    y = y > limit ? limit : y < -limit ? -limit : y;
    const ValueAndSlope swish = SwishSlope<Math>(x, constants.alpha);
    return {x_beyond ? 0.0f : g * (y + 1.0f) * swish.slope,
            y_beyond ? 0.0f : g * swish.value};
  } else {
    const ValueAndSlope at = Slope<kActivation, Math>(x, constants);
    if constexpr (!IsGated(kActivation)) return {g * at.slope, 0.0f};
    return {g * y * at.slope, g * at.value};
  }
}

}  // namespace xla_ops

#undef XLA_OPS_ACTIVATION_INLINE

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_GRADIENT_H_
