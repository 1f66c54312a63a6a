// The gradients of the activations (activation.h). For an element of the
// result, g of its gradient, x and y what it was made of:
//
//   gated by halves, act(x) * y    dx = T(g * y * act'(x)), dy = T(g * act(x))
//   mul_and_silu                   the same with x and y exchanged
//   swigluoai_and_mul              dx = T(g * (u + 1) * (s + alpha m s (1 -
//   s)))
//                                  dy = T(g * m * s), with s = sigmoid(alpha
//                                  m), m = min(x, limit), u as in activation.h;
//                                  0 where x or y is beyond the limit
//   without a gate                 dx = T(g * act'(x))
//
// All of it is fp32 and rounded once: the roundings between the steps of the
// forward are not differentiated. gelu_new and gelu_fast so have the
// derivative of gelu_tanh. fatrelu's is 0 at the threshold.
//
// Target `xla_ops.activation_backward`:
//   args     grad   [..., size]      fp32, fp16 or bf16
//            input  [..., 2 * size]  same dtype; [..., size] without a gate
//   results  dinput                  as input
//   attrs    activation str          an op of activation.h, silu_and_mul_quant
//                                    excepted
//            threshold, alpha, limit f32, each read by the op that has it
// Leading dimensions are flattened to num_tokens; either may be zero.
//
// Tested by activation_backward_test.cc and
// tests/ops/test_activation_backward.py.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_H_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/ops/activation/activation.h"

namespace xla_ops {

struct ActivationBackwardParams {
  Activation activation;
  DType dtype;
  int64_t num_tokens;
  int64_t size;  // of a row of grad
  ActivationConstants constants;
  const void* grad;   // [num_tokens, size]
  const void* input;  // [num_tokens, 2 * size], or [num_tokens, size]
  void* dinput;       // as input
};

template <Activation kValue>
struct ActivationConstant {
  static constexpr Activation value = kValue;
};

// Calls f(ActivationConstant) with the activation whose formula is meant.
template <typename F>
auto DispatchActivation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kMulAndSilu:
      return f(ActivationConstant<Activation::kMulAndSilu>{});
    case Activation::kGeluAndMul:
      return f(ActivationConstant<Activation::kGeluAndMul>{});
    case Activation::kGeluTanhAndMul:
      return f(ActivationConstant<Activation::kGeluTanhAndMul>{});
    case Activation::kFatreluAndMul:
      return f(ActivationConstant<Activation::kFatreluAndMul>{});
    case Activation::kSwigluoaiAndMul:
      return f(ActivationConstant<Activation::kSwigluoaiAndMul>{});
    case Activation::kGeluNew:
    case Activation::kGeluFast:  // the same formula but for its roundings
      return f(ActivationConstant<Activation::kGeluNew>{});
    case Activation::kGeluQuick:
      return f(ActivationConstant<Activation::kGeluQuick>{});
    default:  // the checks admit no other
      return f(ActivationConstant<Activation::kSiluAndMul>{});
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_H_
