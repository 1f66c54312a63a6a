// RMSNorm: out[t, :] = T(T(x[t, :] * s_t) * weight),
//          s_t = rsqrt(mean(x[t, :]^2) + eps), sums in fp32.
//
// Two roundings, as vLLM's rms_norm has: the normalised value is rounded to
// the tensor's type T before it is multiplied by the weight.
//
// Target `xla_ops.rms_norm`:
//   args     input  [..., hidden]  fp32, fp16 or bf16
//            weight [hidden]       same dtype
//   results  out    [..., hidden]  same dtype
//   attrs    eps    f32, > 0
// Leading dimensions are flattened to num_tokens; either may be zero.
//
// Tested by rms_norm_test.cc and tests/ops/test_rms_norm.py.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_H_
#define XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct RmsNormParams {
  DType dtype;
  int64_t num_tokens;
  int64_t hidden_size;
  float eps;
  const void* input;   // [num_tokens, hidden_size]
  const void* weight;  // [hidden_size]
  void* out;           // [num_tokens, hidden_size]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_H_
