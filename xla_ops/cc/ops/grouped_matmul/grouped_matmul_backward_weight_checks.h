// From FFI operands to GroupedMatmulBackwardWeightParams; the CPU and the CUDA
// handler share it.
//
// Errors (InvalidArgument), each after "grouped_matmul_backward_weight: ", in
// the order of the checks:
//   input must be float32, float16 or bfloat16, got int32
//   input must have shape [M, K], got [4]
//   grad must be float32, got float16
//   grad must have shape [4, N], got [5, 16]
//   group_offsets must be int32, got int64
//   group_offsets must have shape [E + 1], got [0]
//   dweight must be float32, got float16
//   dweight must have shape [8, 16, 64], got [8, 64, 16]
//
// Tested by grouped_matmul_backward_weight_test.cc.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_CHECKS_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto GroupedMatmulBackwardWeightBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()   // grad
      .Arg<xla::ffi::AnyBuffer>()   // input
      .Arg<xla::ffi::AnyBuffer>()   // group_offsets
      .Ret<xla::ffi::AnyBuffer>();  // dweight
}

// Reads no buffer. Zero sizes are success.
xla::ffi::Error MakeGroupedMatmulBackwardWeightParams(
    xla::ffi::AnyBuffer grad, xla::ffi::AnyBuffer input,
    xla::ffi::AnyBuffer group_offsets,
    xla::ffi::Result<xla::ffi::AnyBuffer> dweight,
    GroupedMatmulBackwardWeightParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_CHECKS_H_
