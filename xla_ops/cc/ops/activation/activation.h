// Gated activations of a feed-forward layer. A row of the input holds two
// halves x and y:
//   silu_and_mul       out = T(T(silu(x)) * y)
//   mul_and_silu       out = T(x * T(silu(y)))
//   gelu_and_mul       out = T(T(gelu(x)) * y), gelu by erf
//   gelu_tanh_and_mul  the same, gelu by its tanh approximation
//   silu_and_mul_quant out = fp8(clamp(T(T(silu(x)) * y) * (1 / scale)))
// The activation is computed in fp32 and rounded to the tensor's type T
// before the product: the two roundings of vLLM's ops of these names.
//   silu(x) = x / (1 + exp(-x))
//   (on CUDA, where T has 16 bits, to two units of fp32's last place)
//   gelu(x) = 0.5 x (1 + erf(x / sqrt(2)))
//   gelu_tanh(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
// clamp() is to [-448, 448] and, as in vLLM, makes 448 of NaN. fp32 input to
// silu_and_mul_quant, which vLLM refuses, follows the same formula.
//
// Targets `xla_ops.<name>`:
//   args     input [..., 2 * size]  fp32, fp16 or bf16
//            scale [1] f32          silu_and_mul_quant only
//   results  out   [..., size]      input's dtype; e4m3fn when quantised
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
};

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
  }
  return "unknown";
}

struct ActivationParams {
  Activation activation;
  DType dtype;  // of input, and of out unless it is quantised
  int64_t num_tokens;
  int64_t size;        // of one half
  const void* input;   // [num_tokens, 2 * size]
  const float* scale;  // [1]; null unless quantised
  void* out;           // [num_tokens, size]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_H_
