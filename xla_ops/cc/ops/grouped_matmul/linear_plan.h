// How the Hopper kernel of linear (linear_sm90.cuh) cuts a product into
// blocks: a question of shapes and of the device. No CUDA header, so that it
// can be tested without one.
//
// Tested by linear_plan_test.cc.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_PLAN_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_PLAN_H_

#include <cstdint>
#include <optional>

namespace xla_ops {

// A block's tile is `tile_columns` columns of out (rows of the weight), all
// rows of out, and one of `splits` parts of the depth, which the blocks of a
// cluster add up.
struct LinearPlan {
  int tile_columns;  // a multiple of 8 up to 256
  int splits;        // 1, 2, 4 or 8
  int stages;        // 2 or more: of the ring of tiles in shared memory
  bool keep_weight;  // in the L2 cache; else it is the first to leave it
};

// The number that the attribute `plan` carries:
//   tile_columns + 2^12 splits + 2^16 stages + 2^24 keep_weight,
// where 0 stages are as many as fit. Nothing for what is no plan.
std::optional<LinearPlan> DecodeLinearPlan(int64_t plan);

// What the kernel computes on: 64 elements of the depth are a step, and a
// stage holds one step of a tile's weight and input.
constexpr int kLinearStepDepth = 64;
constexpr int kLinearMaxRows = 128;
constexpr int kLinearMaxTileColumns = 256;
constexpr int kLinearMaxStages = 24;
// Of a multiprocessor's 227 KB; the kernel's barriers take some of the rest.
constexpr int kLinearMaxSharedBytes = 222 * 1024;

// Rows of out as the kernel computes them: 8, 16, 32, 64 or 128.
int LinearPaddedRows(int64_t num_rows);

// Consumer warpgroups of a block, 64 columns each.
constexpr int LinearConsumers(int tile_columns) {
  return (tile_columns + 63) / 64;
}

// From a row to the next of the partial sums in shared memory, in floats: 4 or
// 12 modulo 16, so that a warp's writes meet no bank twice.
constexpr int LinearSumStride(int tile_columns) { return tile_columns + 4; }

// Dynamic shared memory of a block.
int LinearSharedBytes(const LinearPlan& plan, int padded_rows);

// As many stages as fit, for a plan whose other fields are set.
int LinearMaxStages(const LinearPlan& plan, int padded_rows);

// Blocks that a device runs at once, of clusters of 1, 2, 4 and 8; 0 where it
// runs none.
struct LinearDevice {
  uint16_t blocks[4];
};

// The plan of the least time, as a model has it whose constants were chosen
// for an H200; the device runs blocks without clusters at least.
LinearPlan ChooseLinearPlan(int64_t num_rows, int64_t num_columns,
                            int64_t depth, const LinearDevice& device);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_PLAN_H_
