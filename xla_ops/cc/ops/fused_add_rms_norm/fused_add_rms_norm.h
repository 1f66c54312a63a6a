// Residual addition and RMSNorm in one pass over memory:
//   residual_out[t, :] = T(input[t, :] + residual[t, :]) = z
//   out[t, :]          = T(T(z * s_t) * weight),
//   s_t = rsqrt(mean(z^2) + eps), sums in fp32.
//
// The mean square is that of the rounded sum z, and the normalised value is
// rounded to the tensor's type T before it is multiplied by the weight, as
// vLLM's fused_add_rms_norm has it.
//
// Target `xla_ops.fused_add_rms_norm`:
//   args     input        [..., hidden]  fp32, fp16 or bf16
//            residual     [..., hidden]  same dtype
//            weight       [hidden]       same dtype
//   results  out          [..., hidden]  same dtype
//            residual_out [..., hidden]  same dtype
//   attrs    eps          f32, > 0
// Leading dimensions are flattened to num_tokens; any may be zero.
// `out` may be `input`'s buffer and `residual_out` `residual`'s.
//
// Tested by fused_add_rms_norm_test.cc and
// tests/ops/test_fused_add_rms_norm.py.

#ifndef XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_H_
#define XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct FusedAddRmsNormParams {
  DType dtype;
  int64_t num_tokens;
  int64_t hidden_size;
  float eps;
  const void* input;     // [num_tokens, hidden_size]
  const void* residual;  // [num_tokens, hidden_size]
  const void* weight;    // [hidden_size]
  void* out;             // [num_tokens, hidden_size]
  void* residual_out;    // [num_tokens, hidden_size]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_H_
