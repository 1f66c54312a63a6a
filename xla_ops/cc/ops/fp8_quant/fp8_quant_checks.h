// From FFI operands to Fp8QuantParams; the CPU and CUDA handlers share it.
//
// Errors (InvalidArgument), in the order of the checks; op is the target's
// name:
//   op: input must be float32, float16 or bfloat16, got int32
//   op: input must have rank 1 or more, got shape []
//   op: scale must be float32, got float16
//   op: scale must have 1 element, got shape [2]
//   op: scale_ub must ... (the same; per token)
//   op: out must ..., scale result must ... (dtype, shape; handler only)
//
// Tested by fp8_quant_test.cc.

#ifndef XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_CHECKS_H_
#define XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant.h"

namespace xla_ops {

// The bindings of every platform; handlers append their context.
inline auto StaticFp8QuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // input
      .Arg<xla::ffi::AnyBuffer>()   // scale
      .Ret<xla::ffi::AnyBuffer>();  // out
}
inline auto DynamicFp8QuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // input
      .Ret<xla::ffi::AnyBuffer>()   // out
      .Ret<xla::ffi::AnyBuffer>();  // scale
}
inline auto PerTokenFp8QuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // input
      .RemainingArgs()              // scale_ub, or nothing
      .Ret<xla::ffi::AnyBuffer>()   // out
      .Ret<xla::ffi::AnyBuffer>();  // scale
}

// None reads a buffer.
xla::ffi::Error MakeStaticFp8QuantParams(
    xla::ffi::AnyBuffer input, xla::ffi::AnyBuffer scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> out, Fp8QuantParams* params);
xla::ffi::Error MakeDynamicFp8QuantParams(
    xla::ffi::AnyBuffer input, xla::ffi::Result<xla::ffi::AnyBuffer> out,
    xla::ffi::Result<xla::ffi::AnyBuffer> scale, Fp8QuantParams* params);
xla::ffi::Error MakePerTokenFp8QuantParams(
    xla::ffi::AnyBuffer input, xla::ffi::RemainingArgs optional,
    xla::ffi::Result<xla::ffi::AnyBuffer> out,
    xla::ffi::Result<xla::ffi::AnyBuffer> scale, Fp8QuantParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FP8_QUANT_FP8_QUANT_CHECKS_H_
