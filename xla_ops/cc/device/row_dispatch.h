// How many threads a row gets, and which kernel: the host's side of row.cuh.
//
//   ForEachGrid(params.num_tokens, 1, [&](int64_t first, int64_t num_rows) {
//     return DispatchRow<T>(num_rows, hidden_size, aligned,
//                           [&](auto plan, const RowGrid& grid) {...});
//   });
//
// Tested through the kernels that use it.

#ifndef XLA_OPS_CC_DEVICE_ROW_DISPATCH_H_
#define XLA_OPS_CC_DEVICE_ROW_DISPATCH_H_

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/row.cuh"
#include "xla_ops/cc/device/vector.cuh"

namespace xla_ops {

struct RowGrid {
  dim3 blocks;
  dim3 threads;
  int64_t row_vectors;
};

// Calls f(RowPlan, RowGrid) with the plan for rows of `hidden_size` elements
// of T. `aligned`: all pointers are aligned to a vector. num_rows fits in a
// grid; see ForEachGrid. kUsualThreads and kLongThreads: of a row of the usual
// hidden sizes, 4096 and 8192 for 16-bit elements; what an op holds and
// computes decides which are fastest.
template <typename T, int kUsualThreads = 256, int kLongThreads = 512,
          typename F>
cudaError_t DispatchRow(int64_t num_rows, int64_t hidden_size, bool aligned,
                        F&& f) {
  constexpr int kWidth = kWideSize<T>;
  // Held by a thread, of rows that kHeldThreads threads then hold, and of
  // longer ones. Blocks of more threads leave a multiprocessor nothing to do
  // while they wait for each other.
  constexpr int kVectors = 2;
  constexpr int kMaxVectors = 4;
  constexpr int kHeldThreads = 512;
  // Of a block that holds several rows.
  constexpr int kSharedThreads = 256;
  RowGrid grid;
  if (!aligned || hidden_size % kWidth != 0 ||
      hidden_size / kWidth > kMaxVectors * kMaxRowThreads) {
    grid.blocks = static_cast<unsigned>(num_rows);
    grid.threads = static_cast<unsigned>(std::clamp<int64_t>(
        CeilDivide(hidden_size, 32) * 32, 32, kMaxRowThreads));
    grid.row_vectors = hidden_size;
    return f(RowPlan<1, 0>{}, grid);
  }
  grid.row_vectors = hidden_size / kWidth;
  const int64_t vectors =
      grid.row_vectors <= kVectors * kHeldThreads ? kVectors : kMaxVectors;
  const int64_t needed = CeilDivide(grid.row_vectors, vectors);
  // A row that takes more than a warp has a block of its own.
  grid.threads =
      RowBlock(needed, kMaxRowThreads, needed <= 32 ? kSharedThreads : 1);
  grid.blocks = static_cast<unsigned>(CeilDivide(num_rows, grid.threads.y));
  if (vectors != kVectors) return f(RowPlan<kWidth, kMaxVectors>{}, grid);
  constexpr int kUsualVectors = 512;
  if (grid.row_vectors == kUsualVectors) {
    grid.threads = kUsualThreads;
    return f(
        RowPlan<kWidth, kUsualVectors / kUsualThreads, kUsualThreads, true>{},
        grid);
  }
  constexpr int kLongVectors = 1024;
  if (grid.row_vectors == kLongVectors) {
    grid.threads = kLongThreads;
    return f(RowPlan<kWidth, kLongVectors / kLongThreads, kLongThreads, true>{},
             grid);
  }
  return f(RowPlan<kWidth, kVectors, kHeldThreads>{}, grid);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_ROW_DISPATCH_H_
