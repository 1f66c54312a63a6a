// Scalar pieces of an online softmax kept in base 2: logits are multiplied
// by log2(e) once, so that each weight is a single exp2.

#ifndef XLA_OPS_CC_DEVICE_SOFTMAX_CUH_
#define XLA_OPS_CC_DEVICE_SOFTMAX_CUH_

#include <math_constants.h>

namespace xla_ops {

constexpr float kLog2E = 1.4426950408889634f;

// 2^x to within 2 ulp; denormal results become zero, Exp2(-inf) is zero.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A row that has seen nothing has maximum -inf; subtracting zero in its
// place keeps -inf - -inf from becoming NaN, and all its weights zero.
__device__ __forceinline__ float FiniteMax(float max) {
  return max == -CUDART_INF_F ? 0.0f : max;
}

// cap * tanh(logit / cap), in base 2: `logit_over_cap` is the true logit
// over cap, `cap_log2` is cap * log2(e). The formula is exact to about one
// fp32 ulp of 1, at both ends too.
__device__ __forceinline__ float SoftCap(float logit_over_cap, float cap_log2) {
  const float e = Exp2(2.0f * kLog2E * logit_over_cap);
  return cap_log2 * (1.0f - __fdividef(2.0f, e + 1.0f));
}

// What a row's accumulator is multiplied by, and log(denominator), natural.
struct SoftmaxEnd {
  float factor;
  float lse;
};

// Ends a row's softmax from its running maximum (base 2) and sum. `sink` is
// a further logit, natural, that has no value; -inf for none. A row whose sum
// is zero saw no token: it is zero, and its lse +inf.
__device__ __forceinline__ SoftmaxEnd EndSoftmax(float max, float sum,
                                                 float sink) {
  // Compared with zero exactly: a NaN sum has to reach the output.
  const bool empty = sum == 0.0f;
  sink *= kLog2E;
  // The larger of the two becomes the base, so that neither overflows.
  const float base = FiniteMax(fmaxf(max, sink));
  const float rescale = Exp2(FiniteMax(max) - base);
  const float total = sum * rescale + Exp2(sink - base);
  constexpr float kLn2 = 0.6931471805599453f;
  return {empty ? 0.0f : rescale / total,
          empty ? CUDART_INF_F : (base + log2f(total)) * kLn2};
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_SOFTMAX_CUH_
