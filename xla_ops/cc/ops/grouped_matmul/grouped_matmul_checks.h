// From FFI operands to GroupedMatmulParams; the CPU and the CUDA handler share
// it.
//
// Errors (InvalidArgument), each after "grouped_matmul: ", in the order of the
// checks:
//   input must be float32, float16 or bfloat16, got int32
//   input must have shape [M, K], got [4]
//   weight must be float32, got float16
//   weight must have shape [E, N, 64], got [8, 64, 32]
//   group_offsets must be int32, got int64
//   group_offsets must have shape [9], got [8]
//   out must be float32, got float16
//   out must have shape [4, 64], got [4, 32]
//
// Tested by grouped_matmul_test.cc.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_CHECKS_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto GroupedMatmulBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // input
      .Arg<xla::ffi::AnyBuffer>()   // weight
      .Arg<xla::ffi::AnyBuffer>()   // group_offsets
      .Ret<xla::ffi::AnyBuffer>();  // out
}

// Reads no buffer. Zero sizes are success.
xla::ffi::Error MakeGroupedMatmulParams(
    xla::ffi::AnyBuffer input, xla::ffi::AnyBuffer weight,
    xla::ffi::AnyBuffer group_offsets,
    xla::ffi::Result<xla::ffi::AnyBuffer> out, GroupedMatmulParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_CHECKS_H_
