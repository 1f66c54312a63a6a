// linear: the product of a layer,
//
//   out[m, n] = T(sum_k input[m, k] weight[n, k] + bias[n])
//
// accumulated in fp32, in any order, and rounded once to the tensors' type T.
// Made for few rows (decode), whose time is that of reading the weight; any
// number is legal.
//
// Target `xla_ops.linear`:
//   args     input   [M, K]  fp32, fp16 or bf16
//            weight  [N, K]  input's type
//            bias    [N]     input's type; none where it has no element
//   results  out     [M, N]  input's type
//   attrs    plan    s64     0; else the tile of the Hopper kernel, for tests
//                            and measurements (linear_plan.h)
// Zero sizes are legal; with K = 0, out is bias, or zero.
//
// Tested by linear_test.cc and tests/ops/test_linear.py.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct LinearParams {
  DType dtype;
  int64_t num_rows;     // M
  int64_t num_columns;  // N, of out
  int64_t depth;        // K
  int64_t plan;
  const void* input;   // [M, K]
  const void* weight;  // [N, K]
  const void* bias;    // [N], or null
  void* out;           // [M, N]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_H_
