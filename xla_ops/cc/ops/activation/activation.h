// Activations of a feed-forward layer. T rounds to the tensor's type.
//
// Gated ones: a row of the input holds two halves x and y:
//   silu_and_mul       out = T(T(silu(x)) * y)
//   mul_and_silu       out = T(x * T(silu(y)))
//   gelu_and_mul       out = T(T(gelu(x)) * y), gelu by erf
//   gelu_tanh_and_mul  the same, gelu by its tanh approximation
//   silu_and_mul_quant out = fp8(clamp(T(T(silu(x)) * y) * (1 / scale)))
//   fatrelu_and_mul    out = T((x > threshold ? x : 0) * y)
// The activation is computed in fp32 and rounded to T before the product: the
// two roundings of vLLM's ops of these names. fatrelu makes 0 of NaN, as vLLM's
// does.
//   silu(x) = x / (1 + exp(-x))
//   (on CUDA, where T has 16 bits, to two units of fp32's last place)
//   gelu(x) = 0.5 x (1 + erf(x / sqrt(2)))
//   gelu_tanh(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
// clamp() is to [-448, 448] and, as in vLLM, makes 448 of NaN. fp32 input to
// silu_and_mul_quant, which vLLM refuses, follows the same formula.
//
// Gated, and the elements of a row alternate, x = row[2 i], y = row[2 i + 1]:
//   swigluoai_and_mul  g = min(x, limit), u = clamp(y, -limit, limit),
//                      out = T((u + 1) * (g / (1 + exp(-alpha * g))))
// All of it is fp32, rounded once. NaN stays NaN.
//
// Without a gate, where the first two round after each step, as vLLM's do:
//   gelu_new   out = T(T(x / 2) * T(1 + T(tanh(u)))), where
//              u = T(c * T(x + T(0.044715 * T(T(x * x) * x))))
//   gelu_fast  the same, u = T(T(c * x) * T(1 + T(T(0.044715 * x) * x)))
//              with c = sqrt(2 / pi)
//   gelu_quick out = T(x / (1 + exp(-1.702 * x)))
//
// Targets `xla_ops.<name>`:
//   args     input [..., 2 * size]  fp32, fp16 or bf16; [..., size] where there
//                                   is no gate
//            scale [1] f32          silu_and_mul_quant only
//   results  out   [..., size]      input's dtype; e4m3fn when quantised. May
//                                   be input's buffer where there is no gate
//   attrs    threshold f32          fatrelu_and_mul only
//            alpha, limit f32       swigluoai_and_mul only
// Leading dimensions are flattened to num_tokens; either may be zero.
//
// Tested by activation_test.cc and tests/ops/test_activation.py.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_H_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

enum class Activation : uint8_t {
  kSiluAndMul,
  kMulAndSilu,
  kGeluAndMul,
  kGeluTanhAndMul,
  kSiluAndMulQuant,
  kFatreluAndMul,
  kSwigluoaiAndMul,
  kGeluNew,
  kGeluFast,
  kGeluQuick,
};

// Whether the input holds two elements for each of the result.
constexpr bool IsGated(Activation activation) {
  return activation < Activation::kGeluNew;
}

// The op's name in targets and errors.
constexpr const char* Name(Activation activation) {
  switch (activation) {
    case Activation::kSiluAndMul:
      return "silu_and_mul";
    case Activation::kMulAndSilu:
      return "mul_and_silu";
    case Activation::kGeluAndMul:
      return "gelu_and_mul";
    case Activation::kGeluTanhAndMul:
      return "gelu_tanh_and_mul";
    case Activation::kSiluAndMulQuant:
      return "silu_and_mul_quant";
    case Activation::kFatreluAndMul:
      return "fatrelu_and_mul";
    case Activation::kSwigluoaiAndMul:
      return "swigluoai_and_mul";
    case Activation::kGeluNew:
      return "gelu_new";
    case Activation::kGeluFast:
      return "gelu_fast";
    case Activation::kGeluQuick:
      return "gelu_quick";
  }
  return "unknown";
}

// The numbers in an activation's formula; each is read by one of them.
struct ActivationConstants {
  float threshold;
  float alpha;
  float limit;
};

struct ActivationParams {
  Activation activation;
  DType dtype;  // of input, and of out unless it is quantised
  int64_t num_tokens;
  int64_t size;  // of a row of out
  ActivationConstants constants;
  const void* input;   // [num_tokens, 2 * size], or [num_tokens, size]
  const float* scale;  // [1]; null unless quantised
  void* out;           // [num_tokens, size]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_H_
