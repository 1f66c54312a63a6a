// From FFI operands to ConvertFp8Params; the CPU and CUDA handlers share it.
//
// Errors (InvalidArgument), in the order of the checks, each after
// "convert_fp8: ":
//   kv_cache_dtype must be fp8, fp8_e4m3 or fp8_e5m2, got auto
//   scale must be positive and finite, got 0
//   src must be float32, float16, bfloat16, float8_e4m3fn or uint8, got int32
//   dst must be float8_e4m3fn or uint8, got float32     (src is not fp8)
//   dst must be float32, float16 or bfloat16, got int32    (src is fp8)
//   dst must have shape [4, 8], got [4, 16]
//
// Tested by convert_fp8_test.cc.

#ifndef XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_CHECKS_H_
#define XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_CHECKS_H_

#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto ConvertFp8Binding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // src
      .Ret<xla::ffi::AnyBuffer>()  // dst
      .Attr<std::string_view>("kv_cache_dtype")
      .Attr<float>("scale");
}

// Reads no buffer.
xla::ffi::Error MakeConvertFp8Params(xla::ffi::AnyBuffer src,
                                     xla::ffi::Result<xla::ffi::AnyBuffer> dst,
                                     std::string_view kv_cache_dtype,
                                     float scale, ConvertFp8Params* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FP8_QUANT_CONVERT_FP8_CHECKS_H_
