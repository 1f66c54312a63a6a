// From FFI operands to RmsNormBackwardParams; the CPU and the CUDA handlers
// share it.
//
// Errors (InvalidArgument), in the order of the checks, each after
// "rms_norm_backward: ":
//   input must be float32, float16 or bfloat16, got int32
//   input must have rank 1 or more, got shape []
//   grad must be float16, got float32
//   grad must have shape [4, 64], got [4, 32]
//   weight must be float16, got float32
//   weight must have shape [64], got [32]
//   added must be float16, got float32
//   added must have shape [4, 64], got [4, 32]
//   dx must be float16, got float32
//   dx must have shape [4, 64], got [4, 32]
//   parts must be float32, got float16
//   parts must have shape [..., 64], got [4, 32]
//   parts must have 1 row or more, got shape [0, 64]
//   scratch must be float32, got float16
//   scratch must have shape [..., 64], got [4, 32]
//   eps must be positive and finite, got 0
//
// Tested by rms_norm_backward_test.cc.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_CHECKS_H_
#define XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward.h"

namespace xla_ops {

// The bindings of every platform; handlers append their context.
inline auto RmsNormBackwardInputBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // grad
      .Arg<xla::ffi::AnyBuffer>()  // input
      .Arg<xla::ffi::AnyBuffer>()  // weight
      .Arg<xla::ffi::AnyBuffer>()  // added
      .Ret<xla::ffi::AnyBuffer>()  // dx
      .Attr<float>("eps");
}

inline auto RmsNormBackwardBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // grad
      .Arg<xla::ffi::AnyBuffer>()  // input
      .Arg<xla::ffi::AnyBuffer>()  // weight
      .Arg<xla::ffi::AnyBuffer>()  // added
      .Ret<xla::ffi::AnyBuffer>()  // dx
      .Ret<xla::ffi::AnyBuffer>()  // parts
      .Ret<xla::ffi::AnyBuffer>()  // scratch
      .Attr<float>("eps");
}

// Read no buffer.
xla::ffi::Error MakeRmsNormBackwardInputParams(
    xla::ffi::AnyBuffer grad, xla::ffi::AnyBuffer input,
    xla::ffi::AnyBuffer weight, xla::ffi::AnyBuffer added,
    xla::ffi::Result<xla::ffi::AnyBuffer> dx, float eps,
    RmsNormBackwardParams* params);

xla::ffi::Error MakeRmsNormBackwardParams(
    xla::ffi::AnyBuffer grad, xla::ffi::AnyBuffer input,
    xla::ffi::AnyBuffer weight, xla::ffi::AnyBuffer added,
    xla::ffi::Result<xla::ffi::AnyBuffer> dx,
    xla::ffi::Result<xla::ffi::AnyBuffer> parts,
    xla::ffi::Result<xla::ffi::AnyBuffer> scratch, float eps,
    RmsNormBackwardParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_BACKWARD_CHECKS_H_
