// RMSNorm, with or without a residual addition, whose result is quantised in
// the same pass over memory.
//
//   rms_norm_static_fp8_quant                   out = fp8(y * (1 / scale))
//   fused_add_rms_norm_static_fp8_quant         the same
//   rms_norm_dynamic_per_token_quant            out = fp8(y / scale[t]) or
//                                               int8(y * (1 / scale[t]))
//   fused_add_rms_norm_dynamic_per_token_quant  the same
//
// where y = T(T(x * s_t) * weight), s_t = rsqrt(mean(x[t, :]^2) + eps), T
// rounds to the input's type, and x is
//   - input, or
//   - static:  T(input + residual), as in fused_add_rms_norm;
//   - dynamic: input + residual in fp32, not rounded;
// residual_out is T(input + residual) in both. The dynamic scales are
//   fp8:   max(min(absmax(y[t, :]), scale_ub) / 448, 1 / (448 * 512))
//   int8:  max(absmax(y[t, :]) / 127, 2^-23)
// All this in vLLM's order of operations. fp8() clamps to [-448, 448], where
// NaN becomes 448; int8() to [-128, 127], where NaN becomes 0; both round to
// nearest even. NaN does not count in absmax.
//
// Targets, each `xla_ops.<name>`; ... is [..., hidden], T fp32, fp16 or bf16:
//   args     input ... T; residual ... T (the fused ones); weight [hidden] T;
//            scale fp32, 1 element (static), or scale_ub fp32, 1 element
//            (dynamic, fp8 only, may be left out)
//   results  out ... e4m3fn (dynamic: or int8);
//            scale [num_tokens, 1] fp32 (dynamic); residual_out ... T (fused)
//   attrs    eps f32, > 0
// Leading dimensions are flattened to num_tokens; any may be zero.
// `residual_out` may be `residual`'s buffer.
//
// Tested by rms_norm_quant_test.cc and tests/ops/test_rms_norm_quant.py.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_H_
#define XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct RmsNormQuantParams {
  DType dtype;
  DType quant_dtype;  // e4m3fn or int8
  int64_t num_tokens;
  int64_t hidden_size;
  float eps;
  const void* input;                // [num_tokens, hidden_size]
  const void* residual = nullptr;   // the same; null for none
  const void* weight;               // [hidden_size]
  const float* scale = nullptr;     // [1]; null for dynamic scales
  const float* scale_ub = nullptr;  // [1] or null
  void* out;                        // [num_tokens, hidden_size]
  float* scale_out = nullptr;       // [num_tokens]; dynamic only
  void* residual_out = nullptr;     // [num_tokens, hidden_size]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_H_
