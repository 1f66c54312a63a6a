// From FFI operands to NewOpParams; the CPU and the CUDA handler share it.
//
// Errors (InvalidArgument), in the order of the checks:
//   new_op: input must be float32, float16 or bfloat16, got int32
//   new_op: out must be float16, got float32
//   new_op: out must have shape [4, 64], got [4, 32]
//   new_op: scale must be finite, got inf
//
// Tested by new_op_test.cc.

#ifndef XLA_OPS_CC_OPS_NEW_OP_NEW_OP_CHECKS_H_
#define XLA_OPS_CC_OPS_NEW_OP_NEW_OP_CHECKS_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/new_op/new_op.h"

namespace xla_ops {

// The binding of every platform; handlers append their context.
inline auto NewOpBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // input
      .Ret<xla::ffi::AnyBuffer>()  // out
      .Attr<float>("scale");
}

// Reads no buffer. No elements is success: the handler has nothing to do.
xla::ffi::Error MakeNewOpParams(xla::ffi::AnyBuffer input,
                                xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                float scale, NewOpParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_NEW_OP_NEW_OP_CHECKS_H_
