// grouped_matmul: a product with another matrix for each group of rows,
//
//   out[m, :] = T(input[m, :] weight[e, :, :]^T)
//   for group_offsets[e] <= m < group_offsets[e + 1],
//
// accumulated in fp32, in any order, and rounded once to the tensors' type T.
// Rows of no group are zero. This is a mixture of experts whose rows are
// sorted by expert: M rows cost M products, whatever the number of experts.
//
// Target `xla_ops.grouped_matmul`:
//   args     input         [M, K]     fp32, fp16 or bf16
//            weight        [E, N, K]  input's type
//            group_offsets [E + 1]    s32, ascending, on the device
//   results  out           [M, N]     input's type
// Offsets are not trusted: one that is below the offset before it (below 0 for
// the first) or above M is taken for that bound. Zero sizes are legal.
//
// Tested by grouped_matmul_test.cc and tests/ops/test_grouped_matmul.py.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct GroupedMatmulParams {
  DType dtype;
  int64_t num_rows;              // M
  int64_t num_columns;           // N, of out
  int64_t depth;                 // K
  int64_t num_groups;            // E
  const void* input;             // [M, K]
  const void* weight;            // [E, N, K]
  const int32_t* group_offsets;  // [E + 1]; null: one group of all rows
  const void* bias;              // [N], added to every row; or null
  void* out;                     // [M, N]
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_H_
