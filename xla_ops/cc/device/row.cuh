// Kernels that reduce each row of a matrix and then map it: how a row is
// shared by threads and kept in registers between its passes.
//
//   template <typename T, typename Plan>
//   __global__ void __launch_bounds__(Plan::kMaxThreads, Plan::kMinBlocks)
//       Kernel(...) {
//     RowThreads<Plan> row(num_rows, row_vectors);
//     Vector<T, Plan::kWidth> x[Plan::kSlots];
//     row.ForEach([&](int i, int64_t v) { x[i] = <vector v of the row>; });
//     ... = row.Sum(..., scratch);
//   }
//   DispatchRow<T>(num_rows, hidden_size, aligned,
//                  [&](auto plan, const RowGrid& grid) {...});
//
// Held rows are read once. Rows that are too long for registers, not whole
// 16-byte vectors or not aligned are read again in every pass, element by
// element; a kernel asks Plan::kHeld whether to load anew.
//
// Tested through the kernels that use it.

#ifndef XLA_OPS_CC_DEVICE_ROW_CUH_
#define XLA_OPS_CC_DEVICE_ROW_CUH_

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/occupancy.h"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/vector.cuh"

namespace xla_ops {

constexpr int kMaxRowThreads = 1024;

// kWidth: elements of a vector. kVectors: of a row, held by each thread; 0
// for rows that are not held. kThreads: at most, of a block. kWhole: every
// block is one row and has kThreads threads, each with kVectors vectors.
template <int kWidthValue, int kVectors, int kThreads = kMaxRowThreads,
          bool kWholeValue = false>
struct RowPlan {
  static constexpr int kMaxThreads = kThreads;
  // Bounds the registers a thread, mostly to 40, so that many rows are on
  // their way; kernels that hold more may have 64.
  static constexpr int kMinBlocks = MinBlocks(1536 / kThreads, kThreads);
  static constexpr int kMinLargeBlocks = MinBlocks(1024 / kThreads, kThreads);
  static constexpr int kWidth = kWidthValue;
  static constexpr bool kHeld = kVectors > 0;
  static constexpr bool kWhole = kWholeValue;
  static constexpr int kSlots = kHeld ? kVectors : 1;
  // Whether to load what the map needs beside the row, such as weights,
  // before the reduction, which then hides the latency: where there are
  // registers for it.
  static constexpr bool kMapEarly = kHeld && kVectors <= 2;
};

// One thread's part of a row. blockDim.x threads share a row, a block has
// blockDim.y rows; blockDim.x is a power of two up to 32, or a multiple of
// 32 with one row a block. Thread x has vectors x, x + blockDim.x, ... A
// thread past the last row has none, yet must take part in reductions.
template <typename Plan>
class RowThreads {
 public:
  __device__ __forceinline__ RowThreads(int64_t num_rows, int64_t row_vectors)
      : index_(Plan::kWhole ? int64_t{blockIdx.x}
                            : int64_t{blockIdx.x} * blockDim.y + threadIdx.y),
        in_range_(Plan::kWhole || index_ < num_rows),
        row_vectors_(in_range_ ? row_vectors : 0) {}

  __device__ __forceinline__ int64_t index() const { return index_; }
  // The row's first element in the matrix. `row_vectors`: of every row; those
  // of rows that are held fit in 32 bits, and a multiplication less is seen
  // before the first load.
  __device__ __forceinline__ int64_t Start(int64_t row_vectors) const {
    if constexpr (Plan::kWhole) {
      return static_cast<int64_t>(uint64_t{blockIdx.x} *
                                  static_cast<uint32_t>(row_vectors)) *
             Plan::kWidth;
    } else {
      return index_ * row_vectors * Plan::kWidth;
    }
  }
  // The thread that writes what a row has once.
  __device__ __forceinline__ bool IsFirst() const {
    return in_range_ && threadIdx.x == 0;
  }

  // Calls f(slot, vector) for each vector of this thread.
  template <typename F>
  __device__ __forceinline__ void ForEach(F&& f) const {
    if constexpr (Plan::kHeld) {
#pragma unroll
      for (int i = 0; i < Plan::kSlots; ++i) {
        const int v =
            threadIdx.x + i * (Plan::kWhole ? Plan::kMaxThreads : blockDim.x);
        if (Plan::kWhole || v < static_cast<int>(row_vectors_)) {
          f(i, int64_t{v});
        }
      }
    } else {
      for (int64_t v = threadIdx.x; v < row_vectors_; v += blockDim.x) f(0, v);
    }
  }

  // Reductions over the row. `scratch`: used by one reduction of the kernel
  // only.
  __device__ __forceinline__ float Sum(float x, WarpResults& scratch) const {
    return WithinWarp() ? WarpSum(x, blockDim.x)
                        : BlockSum<kMaxWarps, Plan::kWhole>(x, scratch);
  }
  __device__ __forceinline__ float Max(float x, WarpResults& scratch) const {
    return WithinWarp() ? WarpMax(x, blockDim.x)
                        : BlockMax<kMaxWarps, Plan::kWhole>(x, scratch);
  }

 private:
  static constexpr int kMaxWarps = Plan::kMaxThreads / 32;

  __device__ __forceinline__ static bool WithinWarp() {
    return !Plan::kWhole && blockDim.x <= 32;
  }

  int64_t index_;
  bool in_range_;
  int64_t row_vectors_;
};

template <typename T, int kSize>
__device__ __forceinline__ float SumOfSquares(const Vector<T, kSize>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum += ToFloat(x[j]) * ToFloat(x[j]);
  return sum;
}

// 1 / sqrt(sum / hidden_size + eps), the mean within a unit of its last
// place: every thread waits here, so exact division would show.
__device__ __forceinline__ float RootMeanSquareScale(
    float sum, const ExactDiv& hidden_size, float eps) {
  const float sums[1] = {sum};
  float mean[1];
  hidden_size.Divide(sums, mean);
  return rsqrtf(mean[0] + eps);
}

struct RowGrid {
  dim3 blocks;
  dim3 threads;
  int64_t row_vectors;
};

// Calls f(RowPlan, RowGrid) with the plan for rows of `hidden_size` elements
// of T. `aligned`: all pointers are aligned to a vector. num_rows fits in a
// grid; see ForEachRowGrid.
template <typename T, typename F>
cudaError_t DispatchRow(int64_t num_rows, int64_t hidden_size, bool aligned,
                        F&& f) {
  constexpr int kWidth = kWideSize<T>;
  // Held by a thread, of rows that kLongThreads threads then hold, and of
  // longer ones. Blocks of more threads leave a multiprocessor nothing to do
  // while they wait for each other.
  constexpr int kVectors = 2;
  constexpr int kMaxVectors = 4;
  constexpr int kLongThreads = 512;
  // Of a block that holds several rows, or a row of usual length.
  constexpr int kUsualThreads = 256;
  RowGrid grid;
  if (!aligned || hidden_size % kWidth != 0 ||
      hidden_size / kWidth > kMaxVectors * kMaxRowThreads) {
    grid.blocks = static_cast<unsigned>(num_rows);
    grid.threads = static_cast<unsigned>(
        std::clamp<int64_t>((hidden_size + 31) / 32 * 32, 32, kMaxRowThreads));
    grid.row_vectors = hidden_size;
    return f(RowPlan<1, 0>{}, grid);
  }
  grid.row_vectors = hidden_size / kWidth;
  const int64_t vectors =
      grid.row_vectors <= kVectors * kLongThreads ? kVectors : kMaxVectors;
  const int64_t needed = (grid.row_vectors + vectors - 1) / vectors;
  if (needed <= 32) {
    unsigned threads = 1;
    while (threads < needed) threads *= 2;
    grid.threads = dim3(threads, kUsualThreads / threads);
  } else {
    grid.threads = static_cast<unsigned>((needed + 31) / 32 * 32);
  }
  grid.blocks =
      static_cast<unsigned>((num_rows + grid.threads.y - 1) / grid.threads.y);
  if (vectors != kVectors) return f(RowPlan<kWidth, kMaxVectors>{}, grid);
  // The usual hidden sizes, 4096 and 8192 for 16-bit elements.
  if (grid.row_vectors == kVectors * kUsualThreads) {
    return f(RowPlan<kWidth, kVectors, kUsualThreads, true>{}, grid);
  }
  if (grid.row_vectors == kVectors * kLongThreads) {
    return f(RowPlan<kWidth, kVectors, kLongThreads, true>{}, grid);
  }
  return f(RowPlan<kWidth, kVectors, kLongThreads>{}, grid);
}

// Calls f(first_row, rows) until all rows are launched: a grid has at most
// 2^31 - 1 blocks.
template <typename F>
cudaError_t ForEachRowGrid(int64_t num_rows, F&& f) {
  constexpr int64_t kMaxRows = INT32_MAX;
  for (int64_t row = 0; row < num_rows; row += kMaxRows) {
    const cudaError_t error = f(row, std::min(kMaxRows, num_rows - row));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_ROW_CUH_
