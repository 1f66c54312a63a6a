// From FFI operands to FusedAddRmsNormParams; both handlers share it.
//
// Errors (InvalidArgument), in the order of the checks; op is
// fused_add_rms_norm:
//   op: input must be float32, float16 or bfloat16, got int32
//   op: input must have rank 1 or more, got shape []
//   op: residual must be float16, got float32
//   op: residual must have shape [4, 64], got [4, 32]
//   op: weight must be float16, got float32
//   op: weight must have shape [64], got [32]
//   op: out must ..., residual_out must ... (dtype, shape; handler only)
//   op: eps must be positive and finite, got 0
//
// Tested by fused_add_rms_norm_test.cc.

#ifndef XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_CHECKS_H_
#define XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto FusedAddRmsNormBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // input
      .Arg<xla::ffi::AnyBuffer>()  // residual
      .Arg<xla::ffi::AnyBuffer>()  // weight
      .Ret<xla::ffi::AnyBuffer>()  // out
      .Ret<xla::ffi::AnyBuffer>()  // residual_out
      .Attr<float>("eps");
}

// Reads no buffer. A zero num_tokens or hidden_size is success: the handler
// has nothing to do then.
xla::ffi::Error MakeFusedAddRmsNormParams(
    xla::ffi::AnyBuffer input, xla::ffi::AnyBuffer residual,
    xla::ffi::AnyBuffer weight, xla::ffi::Result<xla::ffi::AnyBuffer> out,
    xla::ffi::Result<xla::ffi::AnyBuffer> residual_out, float eps,
    FusedAddRmsNormParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_ADD_RMS_NORM_FUSED_ADD_RMS_NORM_CHECKS_H_
