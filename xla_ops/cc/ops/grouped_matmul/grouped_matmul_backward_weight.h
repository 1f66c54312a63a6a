// The gradient of grouped_matmul's weight (grouped_matmul.h): for each group a
// product of columns, over the rows of the group,
//
//   dweight[e, n, k] = T(sum grad[m, n] input[m, k])
//   over group_offsets[e] <= m < group_offsets[e + 1],
//
// accumulated in fp32 and rounded once to the tensors' type T. A group without
// rows has zeros; rows of no group are not read. The order of additions depends
// on the group's size alone, so that the same call gives the same bits.
//
// Target `xla_ops.grouped_matmul_backward_weight`:
//   args     grad          [M, N]     fp32, fp16 or bf16: out's gradient
//            input         [M, K]     grad's type
//            group_offsets [E + 1]    s32, ascending, on the device
//   results  dweight       [E, N, K]  grad's type
// Offsets are taken as grouped_matmul takes them. Zero sizes are legal.
//
// Tested by grouped_matmul_backward_weight_test.cc and
// tests/ops/test_grouped_matmul_backward_weight.py.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct GroupedMatmulBackwardWeightParams {
  DType dtype;
  int64_t num_rows;              // M
  int64_t num_columns;           // N, of grad
  int64_t depth;                 // K, of input
  int64_t num_groups;            // E
  const void* grad;              // [M, N]
  const void* input;             // [M, K]
  const int32_t* group_offsets;  // [E + 1]
  void* dweight;                 // [E, N, K]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_H_
