// scale_rows: out[i, j] = T(x[i, j] * scale[i]), the product in fp32, then
// rounded to the tensor's type T.
//
// Target `mine.scale_rows`:
//   args     input [rows, columns]  fp32, fp16 or bf16
//            scale [rows]           fp32
//   results  out   [rows, columns]  like input
// A tensor without elements is legal.

#ifndef MINE_SCALE_ROWS_H_
#define MINE_SCALE_ROWS_H_

// What targets begin with; before any header of xla_ops.
#define XLA_OPS_TARGET_PREFIX "mine."

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace mine {

struct ScaleRowsParams {
  xla_ops::DType dtype;
  int64_t num_rows;
  int64_t num_columns;
  const void* input;   // [num_rows, num_columns]
  const float* scale;  // [num_rows]
  void* out;           // [num_rows, num_columns]; may be `input`
};

}  // namespace mine

#endif  // MINE_SCALE_ROWS_H_
