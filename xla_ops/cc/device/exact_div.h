// Division of many 16-bit floats by one float, each quotient correctly
// rounded to fp32, by three instructions instead of some ten: the product
// with the reciprocal, corrected once by its remainder, which fma() computes
// exactly (P. Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor", IBM Journal of Research and Development 34, 1990).
//
//   const ExactDiv scale(*scale_pointer);
//   scale.Divide(values, quotients);  // arrays of one size
//
// exact_div_test.cc tries significands of fp16, and so of bf16, by those of
// fp32. A dividend of 24 bits would need a second correction.

#ifndef XLA_OPS_CC_DEVICE_EXACT_DIV_H_
#define XLA_OPS_CC_DEVICE_EXACT_DIV_H_

#include <cmath>

#ifdef __CUDACC__
#define XLA_OPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define XLA_OPS_HOST_DEVICE inline
#endif

namespace xla_ops {

class ExactDiv {
 public:
  ExactDiv() = default;

  XLA_OPS_HOST_DEVICE explicit ExactDiv(float divisor)
      : divisor_(divisor), inverse_(1.0f / divisor) {
    // Where no remainder of a bf16 above 2^-40 is subnormal, and the
    // reciprocal is a number.
    const float magnitude = fabsf(divisor);
    usual_ = magnitude > 0x1p-60f && magnitude < 0x1p60f;
  }

  // out[i] = x[i] / divisor. `x`: 16-bit floats. A quotient above 2^40 in
  // magnitude may come out as any number, or infinity, above that. Zero keeps
  // its sign if the divisor is positive.
  template <int kSize>
  XLA_OPS_HOST_DEVICE void Divide(const float (&x)[kSize],
                                  float (&out)[kSize]) const {
    // One branch for all: the compiler does not join them.
    if (!usual_) {
      for (int i = 0; i < kSize; ++i) out[i] = x[i] / divisor_;
      return;
    }
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int i = 0; i < kSize; ++i) {
      // The bounds keep infinity from becoming infinity less infinity. The
      // remainder is negated twice, for the sake of negative zero.
      const float q = fminf(fmaxf(x[i] * inverse_, -0x1p40f), 0x1p40f);
      out[i] = fmaf(-fmaf(q, divisor_, -x[i]), inverse_, q);
    }
  }

 private:
  float divisor_ = 1.0f;
  float inverse_ = 1.0f;
  bool usual_ = true;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_EXACT_DIV_H_
