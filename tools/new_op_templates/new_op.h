// new_op: out[i] = T(x[i] * scale), the product in fp32, then rounded to
// the tensor's type T.
//
// Target `xla_ops.new_op`:
//   args     input [...]  fp32, fp16 or bf16, any rank
//   results  out   [...]  same shape and dtype
//   attrs    scale f32, finite
// A tensor without elements is legal.
//
// Tested by new_op_test.cc and tests/ops/test_new_op.py.

#ifndef XLA_OPS_CC_OPS_NEW_OP_NEW_OP_H_
#define XLA_OPS_CC_OPS_NEW_OP_NEW_OP_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct NewOpParams {
  DType dtype;
  int64_t num_elements;
  float scale;
  const void* input;  // [num_elements]
  void* out;          // [num_elements]; may be `input`
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_NEW_OP_NEW_OP_H_
