// The choice of linear's tile on Hopper; see linear_plan.h.

#include <algorithm>
#include <cstdint>
#include <optional>

#include "xla_ops/cc/ops/grouped_matmul/linear_plan.h"

namespace xla_ops {
namespace {

constexpr int kSplits[] = {1, 2, 4, 8};

// Of the model, in bytes a nanosecond and nanoseconds.
constexpr float kDeviceBytes = 4400;  // all blocks, from memory
constexpr float kBlockBytes = 40;     // one block, from the L2 cache
constexpr float kWaveTime = 1000;     // until a block's pipeline is full
constexpr float kReduceTime = 700;    // two barriers of a cluster
constexpr float kReduceBytes = 60;    // a block's, from others' shared memory

// A row of a stage's tile of the weight or the input.
constexpr int kRowBytes = kLinearStepDepth * 2;

// Products read whole warpgroups' columns, also those that the tile has not:
// past the last stage, that must be memory of the block.
int OverhangBytes(int tile_columns, int padded_rows) {
  const int read = LinearConsumers(tile_columns) * 64;
  return std::max(0, read - tile_columns - padded_rows) * kRowBytes;
}

int StageBytes(int tile_columns, int padded_rows) {
  return (tile_columns + padded_rows) * kRowBytes;
}

// The ring begins at a multiple of 1024.
constexpr int kAlignBytes = 1024;

}  // namespace

std::optional<LinearPlan> DecodeLinearPlan(int64_t plan) {
  LinearPlan found = {};
  found.tile_columns = static_cast<int>(plan & 0xfff);
  found.splits = static_cast<int>(plan >> 12 & 0xf);
  found.stages = static_cast<int>(plan >> 16 & 0xff);
  found.keep_weight = (plan >> 24) == 1;
  const bool valid = found.tile_columns >= 8 && found.tile_columns % 8 == 0 &&
                     found.tile_columns <= kLinearMaxTileColumns &&
                     std::count(kSplits, kSplits + 4, found.splits) == 1 &&
                     found.stages != 1 && found.stages <= kLinearMaxStages &&
                     plan >> 25 == 0;
  if (!valid) return std::nullopt;
  return found;
}

int LinearPaddedRows(int64_t num_rows) {
  int padded = 8;
  while (padded < num_rows && padded < kLinearMaxRows) padded *= 2;
  return padded;
}

int LinearSharedBytes(const LinearPlan& plan, int padded_rows) {
  const int ring = plan.stages * StageBytes(plan.tile_columns, padded_rows) +
                   OverhangBytes(plan.tile_columns, padded_rows);
  const int sums = padded_rows * LinearSumStride(plan.tile_columns) * 4;
  return kAlignBytes + std::max(ring, sums);
}

int LinearMaxStages(const LinearPlan& plan, int padded_rows) {
  const int ring = kLinearMaxSharedBytes - kAlignBytes -
                   OverhangBytes(plan.tile_columns, padded_rows);
  return std::min(kLinearMaxStages,
                  ring / StageBytes(plan.tile_columns, padded_rows));
}

LinearPlan ChooseLinearPlan(int64_t num_rows, int64_t num_columns,
                            int64_t depth, const LinearDevice& device) {
  const int rows = LinearPaddedRows(num_rows);
  const int steps =
      static_cast<int>((depth + kLinearStepDepth - 1) / kLinearStepDepth);
  const int columns = static_cast<int>(num_columns);
  const float least = static_cast<float>(num_columns) *
                      static_cast<float>(depth) * 2 / kDeviceBytes;
  LinearPlan best = {};
  float best_time = 0;
  for (int i = 0; i < 4; ++i) {
    const int at_once = device.blocks[i];
    const int splits = kSplits[i];
    if (at_once < splits || (splits > 1 && steps < splits)) continue;
    const int split_steps = (steps + splits - 1) / splits;
    // Of equal times, the one with the largest tile and the fewest splits.
    for (int tile = kLinearMaxTileColumns; tile >= 8; tile -= 8) {
      const int64_t blocks = int64_t{(columns + tile - 1) / tile} * splits;
      const int64_t waves = (blocks + at_once - 1) / at_once;
      const float block_time = static_cast<float>(StageBytes(tile, rows)) *
                               static_cast<float>(split_steps) / kBlockBytes;
      float time = std::max(least, static_cast<float>(waves) * block_time) +
                   static_cast<float>(waves) * kWaveTime;
      if (splits > 1) {
        time +=
            static_cast<float>(waves) *
            (kReduceTime + static_cast<float>(tile * rows * 4) / kReduceBytes);
      }
      if (best.splits == 0 || time < best_time) {
        best = {tile, splits, 0, false};
        best_time = time;
      }
    }
  }
  best.stages = LinearMaxStages(best, rows);
  return best;
}

}  // namespace xla_ops
