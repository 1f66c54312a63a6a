// From FFI operands to ActivationBackwardParams; the CPU and the CUDA handler
// share it.
//
// Errors (InvalidArgument), in the order of the checks, each after
// "activation_backward: ":
//   activation must be an op with a gradient, got relu
//   input must be float32, float16 or bfloat16, got int32
//   input must have rank 1 or more, got shape []
//   input must have an even last dimension, got 7 (the gated ones)
//   grad must be float16, got float32
//   grad must have shape [4, 32], got [4, 64]
//   dinput must be float16, got float32
//   dinput must have shape [4, 64], got [4, 32]
//
// Tested by activation_backward_test.cc.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_CHECKS_H_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_CHECKS_H_

#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/activation/activation_backward.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto ActivationBackwardBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // grad
      .Arg<xla::ffi::AnyBuffer>()  // input
      .Ret<xla::ffi::AnyBuffer>()  // dinput
      .Attr<std::string_view>("activation")
      .Attr<float>("threshold")
      .Attr<float>("alpha")
      .Attr<float>("limit");
}

// Reads no buffer.
xla::ffi::Error MakeActivationBackwardParams(
    xla::ffi::AnyBuffer grad, xla::ffi::AnyBuffer input,
    xla::ffi::Result<xla::ffi::AnyBuffer> dinput, std::string_view activation,
    float threshold, float alpha, float limit,
    ActivationBackwardParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_BACKWARD_CHECKS_H_
