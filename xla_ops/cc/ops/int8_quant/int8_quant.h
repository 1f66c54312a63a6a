// Quantisation to int8, symmetric or with a zero point (azp):
//
//   static_scaled_int8_quant       out = sat8(rne(x / scale)), or with azp
//                                  sat8(sat32(rne(x * (1 / scale))) + azp)
//   dynamic_scaled_int8_quant      out = sat8(rne(x * (127 / absmax[t]))),
//                                  scale[t] = absmax[t] / 127
//   dynamic_scaled_int8_azp_quant  out as the static one with azp,
//                                  scale[t] = (max[t] - min[t]) / 255,
//                                  azp[t] =
//                                      sat32(rne(-128 - min[t] / scale[t]))
//
// rne() rounds to nearest even, sat*() saturates and makes 0 of NaN. This is
// vLLM's order of operations, so that codes agree to the bit: of these forms
// only the static one without azp divides by the scale, the others multiply
// by its reciprocal, or by 127 / absmax, which rounds once (vLLM 0.12.0,
// csrc/quantization/w8a8/int8/scaled_quant.cu). NaN does not count in
// absmax, max and min, which are 0 for rows without numbers.
//
// A row of zeros has scale 0 and codes 0. A row whose (max - min) / 255 is
// not positive, such as a constant one, divides by zero in vLLM; here it is
// quantised symmetrically, as dynamic_scaled_int8_quant does, with azp 0.
//
// Targets, each `xla_ops.<name>`; ... is [..., hidden]:
//   args     input ... fp32, fp16 or bf16;
//            static: scale fp32, 1 element; azp int32, 1 element, may be
//            left out
//   results  out ... int8;
//            dynamic: scale [num_tokens, 1] fp32;
//            dynamic azp: azp [num_tokens, 1] int32
// Leading dimensions are flattened to num_tokens; any may be zero.
//
// Tested by int8_quant_test.cc and tests/ops/test_int8_quant.py.

#ifndef XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_H_
#define XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct Int8QuantParams {
  DType dtype;
  int64_t num_tokens;
  int64_t hidden_size;
  const void* input;             // [num_tokens, hidden_size]
  const float* scale = nullptr;  // [1]; static only
  const int32_t* azp = nullptr;  // [1] or null; static only
  void* out;                     // [num_tokens, hidden_size] of int8
  float* scale_out = nullptr;    // [num_tokens]; dynamic only
  int32_t* azp_out = nullptr;    // [num_tokens]; null: symmetric
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_H_
