// From FFI operands to RmsNormParams; the CPU and the CUDA handler share it.
//
// Errors (InvalidArgument), in the order of the checks:
//   rms_norm: input must be float32, float16 or bfloat16, got int32
//   rms_norm: input must have rank 1 or more, got shape []
//   rms_norm: weight must be float16, got float32
//   rms_norm: weight must have shape [64], got [32]
//   rms_norm: out must be float16, got float32
//   rms_norm: out must have shape [4, 64], got [4, 32]
//   rms_norm: eps must be positive and finite, got 0
//
// Tested by rms_norm_test.cc.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_CHECKS_H_
#define XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto RmsNormBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // input
      .Arg<xla::ffi::AnyBuffer>()  // weight
      .Ret<xla::ffi::AnyBuffer>()  // out
      .Attr<float>("eps");
}

// Reads no buffer. A zero num_tokens or hidden_size is success: the handler
// has nothing to do then.
xla::ffi::Error MakeRmsNormParams(xla::ffi::AnyBuffer input,
                                  xla::ffi::AnyBuffer weight,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                  float eps, RmsNormParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_RMS_NORM_CHECKS_H_
