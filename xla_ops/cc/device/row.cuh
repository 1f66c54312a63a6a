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
//
// row_dispatch.h chooses the plan and the grid.
//
// Held rows are read once. Rows that are too long for registers, not whole
// 16-byte vectors or not aligned are read again in every pass, element by
// element; a kernel asks Plan::kHeld whether to load anew.
//
// Tested through the kernels that use it.

#ifndef XLA_OPS_CC_DEVICE_ROW_CUH_
#define XLA_OPS_CC_DEVICE_ROW_CUH_

#include <cstdint>

#include "xla_ops/cc/device/occupancy.h"
#include "xla_ops/cc/device/reduce.cuh"

namespace xla_ops {

constexpr int kMaxRowThreads = 1024;

// kWidth: elements of a vector. kVectors: of a row, held by each thread; 0
// for rows that are not held. kThreads: at most, of a block. kWhole: every
// block is one row and has kThreads threads, each with kVectors vectors.
template <int kWidthValue, int kVectors, int kThreads = kMaxRowThreads,
          bool kWholeValue = false>
struct RowPlan {
  static constexpr int kMaxThreads = kThreads;
  // Blocks that a multiprocessor has room for, which bounds the registers: its
  // 65536 are 42 for each of 1536 threads, so that many rows are on their way,
  // or 64 for each of 1024 in kernels that hold more.
  static constexpr int kMinBlocks = MinBlocks(1536 / kThreads, kThreads);
  static constexpr int kMinLargeBlocks = MinBlocks(1024 / kThreads, kThreads);
  static constexpr int kWidth = kWidthValue;
  static constexpr bool kHeld = kVectors > 0;
  static constexpr bool kWhole = kWholeValue;
  static constexpr int kSlots = kHeld ? kVectors : 1;
  // Whether to load the weights, which only the map needs, before the
  // reduction, which then hides their latency: where there are registers.
  static constexpr bool kLoadWeightsFirst = kHeld && kVectors <= 2;
};

// One thread's part of a row. blockDim.x threads share a row, a block has
// blockDim.y rows; blockDim.x is a power of two up to 32, or a multiple of
// 32 with one row a block. Thread x has vectors x, x + blockDim.x, ... A
// thread past the last row has none, yet must take part in reductions.
template <typename Plan>
class RowThreads {
 public:
  __device__ __forceinline__ RowThreads(int64_t num_rows, int64_t row_vectors)
      : RowThreads(blockIdx.x, num_rows, row_vectors) {}
  // For a block that does the rows of several, such as this one.
  __device__ __forceinline__ RowThreads(int64_t block, int64_t num_rows,
                                        int64_t row_vectors)
      : index_(Plan::kWhole ? block : block * blockDim.y + threadIdx.y),
        in_range_(Plan::kWhole || index_ < num_rows),
        row_vectors_(in_range_ ? row_vectors : 0) {}

  __device__ __forceinline__ int64_t index() const { return index_; }
  // The first element in the matrix of the row of this block, and no other's.
  // `row_vectors`: of every row; those
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
  __device__ __forceinline__ float2 Sum(float2 x,
                                        WarpResults (&scratch)[2]) const {
    if (WithinWarp()) {
      return {WarpSum(x.x, blockDim.x), WarpSum(x.y, blockDim.x)};
    }
    return BlockSum<kMaxWarps, Plan::kWhole>(x, scratch);
  }
  // Of two sums a thread, in the order in which twice the threads, the first of
  // which have x[0], add up.
  __device__ __forceinline__ float Sum(const float (&x)[2],
                                       WarpResults& scratch) const {
    static_assert(Plan::kWhole && 2 * kMaxWarps <= 32);
    const float sums[] = {WarpSum(x[0]), WarpSum(x[1])};
    ShareWarps<kMaxWarps, true>(sums[0], 0.0f, scratch);
    if (threadIdx.x % 32 == 0) {
      scratch.value[kMaxWarps + threadIdx.x / 32] = sums[1];
    }
    __syncthreads();
    return CombineShared<2 * kMaxWarps>([](float a, float b) { return a + b; },
                                        scratch);
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

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_ROW_CUH_
