// Functions that activations are made of, on CUDA.
//
// Tested by tests/gpu/check_elementwise.py and tests/ops/test_activation.py.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_MATH_CUH_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_MATH_CUH_

#include "xla_ops/cc/device/softmax.cuh"

namespace xla_ops {

// 1 / x to one unit of the last place; zero for infinity.
__device__ __forceinline__ float FastInverse(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// 1 / (1 + exp(-x)). Where the result is rounded to 16 bits: to some ten units
// of fp32's last place, and zero below -87. Exact division branches, and the
// elements of a vector would wait for one another.
template <typename T>
__device__ __forceinline__ float Sigmoid(float x) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  return FastInverse(1.0f + Exp2(-kLog2E * x));
}

// x / (1 + exp(-beta * x)), to the same accuracy.
template <typename T>
__device__ __forceinline__ float Swish(float x, float beta) {
  if constexpr (sizeof(T) == 4) return x / (1.0f + expf(-beta * x));
  return x * Sigmoid<T>(beta * x);
}

// Where it is added to one and rounded to 16 bits: to one unit of fp32's last
// place of one.
template <typename T>
__device__ __forceinline__ float Tanh(float x) {
  if constexpr (sizeof(T) == 4) return tanhf(x);
  return 1.0f - 2.0f * FastInverse(1.0f + Exp2(2.0f * kLog2E * x));
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_MATH_CUH_
