// The CPU kernels of linear, one for each set of vector instructions; the
// handler (linear_cpu.cc) takes the best one that the processor has.
//
// Tested by linear_test.cc.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_TILE_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_TILE_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

// Columns of a tile: a multiple of all numbers of columns that kernels take at
// once.
constexpr int64_t kLinearTileColumns = 24;

// sums[row][column] = sum_k input[row, k] weight[column, k], whose order of
// additions depends on nothing but the depth and the kernel.
struct LinearTile {
  DType dtype;  // of weight
  int64_t rows;
  int64_t columns;  // up to kLinearTileColumns
  int64_t depth;
  const float* input;  // [rows, depth]
  const void* weight;  // [columns, depth]
  float* sums;         // [rows, kLinearTileColumns]
};

using LinearTileKernel = void (*)(const LinearTile& tile);

void MultiplyTileSse(const LinearTile& tile);
void MultiplyTileAvx2(const LinearTile& tile);    // with FMA and F16C
void MultiplyTileAvx512(const LinearTile& tile);  // F

// The fastest that this processor runs.
LinearTileKernel BestLinearTileKernel();

// Whether it runs that one.
bool CanRun(LinearTileKernel kernel);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_TILE_H_
