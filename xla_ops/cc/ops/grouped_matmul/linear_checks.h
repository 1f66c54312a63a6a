// From FFI operands to LinearParams; the CPU and the CUDA handler share it.
//
// Errors (InvalidArgument), each after "linear: ", in the order of the checks:
//   input must be float32, float16 or bfloat16, got int32
//   input must have shape [M, K], got [4]
//   weight must be float32, got float16
//   weight must have shape [N, 64], got [64, 32]
//   bias must be float32, got float16
//   bias must have shape [64], got [32]
//   out must be float32, got float16
//   out must have shape [4, 64], got [4, 32]
//   plan must be 0 or a plan of linear_plan.h, got 1
//
// Tested by linear_test.cc.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_CHECKS_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_CHECKS_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/grouped_matmul/linear.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto LinearBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // input
      .Arg<xla::ffi::AnyBuffer>()  // weight
      .Arg<xla::ffi::AnyBuffer>()  // bias
      .Ret<xla::ffi::AnyBuffer>()  // out
      .Attr<int64_t>("plan");
}

// Reads no buffer. Zero sizes are success.
xla::ffi::Error MakeLinearParams(xla::ffi::AnyBuffer input,
                                 xla::ffi::AnyBuffer weight,
                                 xla::ffi::AnyBuffer bias,
                                 xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                 int64_t plan, LinearParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_CHECKS_H_
