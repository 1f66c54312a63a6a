// Quantisation to fp8 (e4m3fn), three ways to get the scale:
//
//   static_scaled_fp8_quant             out = fp8(x * (1 / scale)), scale given
//   dynamic_scaled_fp8_quant            the same with one scale for all,
//                                       absmax(x) / 448
//   dynamic_per_token_scaled_fp8_quant  out = fp8(x / scale[t]), scale[t] =
//       max(min(absmax(x[t, :]), scale_ub) / 448, 1 / (448 * 512))
//
// fp8() clamps to [-448, 448], where NaN becomes 448, and rounds to nearest
// even. The order of operations is vLLM's, so that codes agree to the bit.
// NaN does not count in absmax. The scale of no elements, or of zeros only,
// is 0 for the whole tensor and the smallest one for a token; zeros divided
// by a scale of 0 become 448, as in vLLM.
//
// Targets, each `xla_ops.<name>`:
//   static_scaled_fp8_quant
//     args     input [..., hidden] fp32, fp16 or bf16; scale fp32, 1 element
//     results  out   [..., hidden] e4m3fn
//   dynamic_scaled_fp8_quant
//     args     input
//     results  out, scale [1] fp32
//   dynamic_per_token_scaled_fp8_quant
//     args     input; scale_ub fp32, 1 element, may be left out
//     results  out, scale [num_tokens, 1] fp32
// Leading dimensions are flattened to num_tokens; any may be zero.
//
// Tested by fp8_quant_test.cc and tests/ops/test_fp8_quant.py.

#ifndef XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_H_
#define XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct Fp8QuantParams {
  DType dtype;
  int64_t num_tokens;
  int64_t hidden_size;
  const void* input;                // [num_tokens, hidden_size]
  const float* scale = nullptr;     // [1]; static only
  const float* scale_ub = nullptr;  // [1]; per token only, null for none
  float* scale_out = nullptr;       // [1], or [num_tokens] per token
  void* out;                        // [num_tokens, hidden_size] of e4m3fn
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_H_
