// The Hopper kernel's tiles: what is a plan, what fits in shared memory, and
// what is chosen for the layers of a model on 132 multiprocessors.

#include "xla_ops/cc/ops/grouped_matmul/linear_plan.h"

#include <cstdint>

#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

constexpr LinearDevice kH200 = {{132, 132, 128, 120}};

int64_t Blocks(const LinearPlan& plan, int64_t num_columns) {
  return (num_columns + plan.tile_columns - 1) / plan.tile_columns *
         plan.splits;
}

XLA_OPS_TEST(Decode) {
  const auto plan = DecodeLinearPlan(136 + (4 << 12) + (3 << 16) + (1 << 24));
  EXPECT_TRUE(plan.has_value());
  if (!plan.has_value()) return;
  EXPECT_EQ(plan->tile_columns, 136);
  EXPECT_EQ(plan->splits, 4);
  EXPECT_EQ(plan->stages, 3);
  EXPECT_TRUE(plan->keep_weight);
  for (const int64_t wrong :
       {int64_t{0}, int64_t{-1}, int64_t{128}, int64_t{100 + (1 << 12)},
        int64_t{264 + (1 << 12)}, int64_t{128 + (3 << 12)},
        int64_t{128 + (1 << 12) + (1 << 16)},
        int64_t{128 + (1 << 12) + (25 << 16)},
        int64_t{128 + (1 << 12) + (2 << 24)},
        int64_t{128 + (1 << 12)} + (int64_t{1} << 40)}) {
    EXPECT_TRUE(!DecodeLinearPlan(wrong).has_value());
  }
}

XLA_OPS_TEST(PaddedRows) {
  EXPECT_EQ(LinearPaddedRows(1), 8);
  EXPECT_EQ(LinearPaddedRows(8), 8);
  EXPECT_EQ(LinearPaddedRows(9), 16);
  EXPECT_EQ(LinearPaddedRows(33), 64);
  EXPECT_EQ(LinearPaddedRows(128), 128);
}

// Every tile has a ring of two stages at least, which fits and reaches over
// all rows that the last warpgroup reads.
XLA_OPS_TEST(SharedMemory) {
  for (const int rows : {8, 16, 32, 64, 128}) {
    for (int tile = 8; tile <= kLinearMaxTileColumns; tile += 8) {
      LinearPlan plan = {tile, 1, 0, false};
      plan.stages = LinearMaxStages(plan, rows);
      EXPECT_TRUE(plan.stages >= 2);
      EXPECT_TRUE(plan.stages <= kLinearMaxStages);
      const int bytes = LinearSharedBytes(plan, rows);
      EXPECT_TRUE(bytes <= kLinearMaxSharedBytes);
      const int stage = (tile + rows) * 128;
      const int read = LinearConsumers(tile) * 64 * 128;
      EXPECT_TRUE(bytes - 1024 >= (plan.stages - 1) * stage + read);
      EXPECT_TRUE(bytes - 1024 >= rows * LinearSumStride(tile) * 4);
    }
  }
}

// All multiprocessors have work, in whole waves.
XLA_OPS_TEST(FillsTheDevice) {
  struct Layer {
    int64_t columns, depth;
  };
  for (const Layer& layer : {Layer{28672, 4096}, Layer{6144, 4096},
                             Layer{4096, 4096}, Layer{4096, 14336}}) {
    for (const int rows : {1, 16, 64}) {
      const LinearPlan plan =
          ChooseLinearPlan(rows, layer.columns, layer.depth, kH200);
      EXPECT_EQ(plan.tile_columns % 8, 0);
      const int64_t blocks = Blocks(plan, layer.columns);
      EXPECT_TRUE(blocks >= 110);
      EXPECT_TRUE(blocks <= 132);
    }
  }
  const LinearPlan head = ChooseLinearPlan(64, 128256, 4096, kH200);
  EXPECT_EQ(head.splits, 1);
  EXPECT_TRUE(Blocks(head, 128256) >= 132 * 3 + 100);
}

XLA_OPS_TEST(FewColumnsAndStepsAndDevicesWithoutClusters) {
  const LinearPlan one = ChooseLinearPlan(1, 1, 8, kH200);
  EXPECT_EQ(one.splits, 1);
  const LinearPlan alone =
      ChooseLinearPlan(64, 4096, 14336, LinearDevice{{132, 0, 0, 0}});
  EXPECT_EQ(alone.splits, 1);
  EXPECT_TRUE(alone.stages >= 2);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
