// From FFI operands to ActivationParams; the CPU and the CUDA handlers share
// it.
//
// Errors (InvalidArgument), each after the op's name and ": ":
//   input must be float32, float16 or bfloat16, got int32
//   input must have rank 1 or more, got shape []
//   input must have an even last dimension, got 7 (the gated ones)
//   scale must be float32, got float16            (silu_and_mul_quant)
//   scale must have 1 element, got shape [2]      (silu_and_mul_quant)
//   threshold must be finite, got inf             (fatrelu_and_mul)
//   alpha must be finite, got nan                 (swigluoai_and_mul)
//   limit must be at least 0, got -1              (swigluoai_and_mul)
//   out must be float16, got float32
//   out must have shape [4, 32], got [4, 64]
//
// Tested by activation_test.cc.

#ifndef XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_CHECKS_H_
#define XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/activation/activation.h"

namespace xla_ops {

// The bindings of every platform; handlers append their context.
inline auto ActivationBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // input
      .Ret<xla::ffi::AnyBuffer>();  // out
}

inline auto ActivationQuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // input
      .Arg<xla::ffi::AnyBuffer>()   // scale
      .Ret<xla::ffi::AnyBuffer>();  // out
}

inline auto FatreluBinding() {
  return ActivationBinding().Attr<float>("threshold");
}

inline auto SwigluoaiBinding() {
  return ActivationBinding().Attr<float>("alpha").Attr<float>("limit");
}

// Read no buffer. A zero num_tokens or size is success: the handler has
// nothing to do then.
xla::ffi::Error MakeActivationParams(Activation activation,
                                     xla::ffi::AnyBuffer input,
                                     xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                     ActivationParams* params);

template <Activation kActivation>
xla::ffi::Error MakeActivationParams(xla::ffi::AnyBuffer input,
                                     xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                     ActivationParams* params) {
  return MakeActivationParams(kActivation, input, out, params);
}

xla::ffi::Error MakeActivationQuantParams(
    xla::ffi::AnyBuffer input, xla::ffi::AnyBuffer scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> out, ActivationParams* params);

xla::ffi::Error MakeFatreluParams(xla::ffi::AnyBuffer input,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                  float threshold, ActivationParams* params);

xla::ffi::Error MakeSwigluoaiParams(xla::ffi::AnyBuffer input,
                                    xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                    float alpha, float limit,
                                    ActivationParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ACTIVATION_ACTIVATION_CHECKS_H_
