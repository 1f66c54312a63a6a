// From FFI operands to RmsNormQuantParams; both platforms share it.
//
// Errors (InvalidArgument), in the order of the checks; op is the target's
// name, for the dynamic ones rms_norm_dynamic_per_token_quant:
//   op: input must be float32, float16 or bfloat16, got int32
//   op: input must have rank 1 or more, got shape []
//   op: residual must be float16, got float32
//   op: residual must have shape [4, 64], got [4, 32]
//   op: weight must be float16, got float32
//   op: weight must have shape [64], got [32]
//   op: out must ... (dtype, shape; handler only)
//   op: scale must be float32, got float16
//   op: scale must have 1 element, got shape [2]
//   op: scale_ub must ... (the same)
//   op: scale_ub must be left out for int8, got a tensor
//   op: eps must be positive and finite, got 0
//   op: scale result must ..., residual_out must ... (handler only)
//
// Tested by rms_norm_quant_test.cc.

#ifndef XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_CHECKS_H_
#define XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant.h"

namespace xla_ops {

using xla::ffi::AnyBuffer;
using xla::ffi::RemainingArgs;
using AnyResult = xla::ffi::Result<xla::ffi::AnyBuffer>;

// The bindings of every platform; handlers append their context.
inline auto RmsNormStaticFp8QuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<AnyBuffer>()  // input
      .Arg<AnyBuffer>()  // weight
      .Arg<AnyBuffer>()  // scale
      .Ret<AnyBuffer>()  // out
      .Attr<float>("eps");
}
inline auto FusedAddRmsNormStaticFp8QuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<AnyBuffer>()  // input
      .Arg<AnyBuffer>()  // residual
      .Arg<AnyBuffer>()  // weight
      .Arg<AnyBuffer>()  // scale
      .Ret<AnyBuffer>()  // out
      .Ret<AnyBuffer>()  // residual_out
      .Attr<float>("eps");
}
inline auto RmsNormDynamicPerTokenQuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<AnyBuffer>()  // input
      .Arg<AnyBuffer>()  // weight
      .RemainingArgs()   // scale_ub, or nothing
      .Ret<AnyBuffer>()  // out
      .Ret<AnyBuffer>()  // scale
      .Attr<float>("eps");
}
inline auto FusedAddRmsNormDynamicPerTokenQuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<AnyBuffer>()  // input
      .Arg<AnyBuffer>()  // residual
      .Arg<AnyBuffer>()  // weight
      .RemainingArgs()   // scale_ub, or nothing
      .Ret<AnyBuffer>()  // out
      .Ret<AnyBuffer>()  // scale
      .Ret<AnyBuffer>()  // residual_out
      .Attr<float>("eps");
}

// None reads a buffer.
xla::ffi::Error MakeRmsNormStaticFp8QuantParams(AnyBuffer input,
                                                AnyBuffer weight,
                                                AnyBuffer scale, AnyResult out,
                                                float eps,
                                                RmsNormQuantParams* params);
xla::ffi::Error MakeFusedAddRmsNormStaticFp8QuantParams(
    AnyBuffer input, AnyBuffer residual, AnyBuffer weight, AnyBuffer scale,
    AnyResult out, AnyResult residual_out, float eps,
    RmsNormQuantParams* params);
xla::ffi::Error MakeRmsNormDynamicPerTokenQuantParams(
    AnyBuffer input, AnyBuffer weight, RemainingArgs scale_ub, AnyResult out,
    AnyResult scale, float eps, RmsNormQuantParams* params);
xla::ffi::Error MakeFusedAddRmsNormDynamicPerTokenQuantParams(
    AnyBuffer input, AnyBuffer residual, AnyBuffer weight,
    RemainingArgs scale_ub, AnyResult out, AnyResult scale,
    AnyResult residual_out, float eps, RmsNormQuantParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RMS_NORM_QUANT_RMS_NORM_QUANT_CHECKS_H_
