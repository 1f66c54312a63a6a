// grouped_matmul without tensor cores: fp32, GPUs before compute capability
// 8.0, and operands that are not aligned. A thread has kRows rows and four
// columns of a tile of out; input and weight go through shared memory as fp32.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_SIMT_CUH_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_SIMT_CUH_

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_tiles.cuh"

namespace xla_ops {

constexpr int kGroupedSimtThreads = 256;  // 16 x 16

// Loads elements [column, column + kDepth) of kRows rows of `depth` elements,
// depth-major, so that a thread's rows are neighbours; zeros past the ends.
template <int kRows, int kDepth, int kStride, typename T>
__device__ __forceinline__ void LoadTransposed(const T* rows, int num_rows,
                                               int depth, int column,
                                               float* tile) {
  for (int i = threadIdx.x; i < kRows * kDepth; i += kGroupedSimtThreads) {
    const int row = i / kDepth;
    const int k = i % kDepth;
    const bool valid = row < num_rows && column + k < depth;
    tile[k * kStride + row] =
        valid ? ToFloat(rows[int64_t{row} * depth + column + k]) : 0.0f;
  }
}

// sums += the products of kDepth elements of depth-major tiles of 16 kRows rows
// and 16 kColumns columns; each depth has one element more than that.
template <int kDepth, int kRows, int kColumns>
__device__ __forceinline__ void MultiplyStep(const float* rows,
                                             const float* columns,
                                             float (&sums)[kRows][kColumns]) {
  const int row = threadIdx.x / 16;
  const int column = threadIdx.x % 16;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    float b[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      b[c] = columns[k * (16 * kColumns + 1) + column + 16 * c];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float a = rows[k * (16 * kRows + 1) + row + 16 * r];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] += a * b[c];
    }
  }
}

// Writes a tile, as far as it is in the group and in out.
template <typename T, int kRows, int kColumns>
__device__ __forceinline__ void StoreSums(
    const GroupedMatmulArgs<T>& args, const GroupedTile& tile,
    const float (&sums)[kRows][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = tile.first_row + threadIdx.x / 16 + 16 * r;
    if (row >= tile.end_row) continue;
    T* out = args.out + int64_t{row} * args.num_columns;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = tile.first_column + threadIdx.x % 16 + 16 * c;
      if (column < args.num_columns) {
        out[column] = FromFloat<T>(sums[r][c] + BiasAt(args, column));
      }
    }
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kGroupedSimtThreads)
    GroupedMatmulSimtKernel(const __grid_constant__ GroupedMatmulArgs<T> args) {
  constexpr int kTileRows = 16 * kRows;
  constexpr int kTileColumns = 64;
  constexpr int kColumns = kTileColumns / 16;
  constexpr int kDepth = 16;
  // One more than the rows, to spread a row's elements over the banks.
  __shared__ float input_tile[kDepth * (kTileRows + 1)];
  __shared__ float weight_tile[kDepth * (kTileColumns + 1)];
  GroupedTiles<kTileRows, kTileColumns> tiles(args);
  GroupedTile tile;
  for (int64_t i = blockIdx.x; tiles.Find(i, &tile); i += gridDim.x) {
    const T* input = args.input + int64_t{tile.first_row} * args.depth;
    const T* weight = args.weight + (int64_t{tile.group} * args.num_columns +
                                     tile.first_column) *
                                        args.depth;
    float sums[kRows][kColumns] = {};
    for (int at = 0; at < args.depth; at += kDepth) {
      __syncthreads();
      LoadTransposed<kTileRows, kDepth, kTileRows + 1>(
          input, tile.end_row - tile.first_row, args.depth, at, input_tile);
      LoadTransposed<kTileColumns, kDepth, kTileColumns + 1>(
          weight, args.num_columns - tile.first_column, args.depth, at,
          weight_tile);
      __syncthreads();
      MultiplyStep<kDepth>(input_tile, weight_tile, sums);
    }
    StoreSums(args, tile, sums);
  }
  WriteZeroRows(args, tiles.FirstRow(), tiles.EndRow());
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_SIMT_CUH_
