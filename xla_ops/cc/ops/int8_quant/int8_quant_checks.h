// From FFI operands to Int8QuantParams; the CPU and CUDA handlers share it.
//
// Errors (InvalidArgument), in the order of the checks; op is
// static_scaled_int8_quant or, for both dynamic targets,
// dynamic_scaled_int8_quant:
//   op: input must be float32, float16 or bfloat16, got int32
//   op: input must have rank 1 or more, got shape []
//   op: scale must be float32, got float16
//   op: scale must have 1 element, got shape [2]
//   op: azp must be int32, got int64
//   op: azp must have 1 element, got shape [2]
//   op: out must ..., scale result must ..., azp result must ... (dtype,
//       shape; handler only)
//
// Tested by int8_quant_test.cc.

#ifndef XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_CHECKS_H_
#define XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant.h"

namespace xla_ops {

using xla::ffi::AnyBuffer;
using xla::ffi::RemainingArgs;
using AnyResult = xla::ffi::Result<xla::ffi::AnyBuffer>;

// The bindings of every platform; handlers append their context.
inline auto StaticInt8QuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<AnyBuffer>()   // input
      .Arg<AnyBuffer>()   // scale
      .RemainingArgs()    // azp, or nothing
      .Ret<AnyBuffer>();  // out
}
inline auto DynamicInt8QuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<AnyBuffer>()   // input
      .Ret<AnyBuffer>()   // out
      .Ret<AnyBuffer>();  // scale
}
inline auto DynamicInt8AzpQuantBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<AnyBuffer>()   // input
      .Ret<AnyBuffer>()   // out
      .Ret<AnyBuffer>()   // scale
      .Ret<AnyBuffer>();  // azp
}

// None reads a buffer.
xla::ffi::Error MakeStaticInt8QuantParams(AnyBuffer input, AnyBuffer scale,
                                          RemainingArgs azp, AnyResult out,
                                          Int8QuantParams* params);
xla::ffi::Error MakeDynamicInt8QuantParams(AnyBuffer input, AnyResult out,
                                           AnyResult scale,
                                           Int8QuantParams* params);
xla::ffi::Error MakeDynamicInt8AzpQuantParams(AnyBuffer input, AnyResult out,
                                              AnyResult scale, AnyResult azp,
                                              Int8QuantParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_INT8_QUANT_INT8_QUANT_CHECKS_H_
