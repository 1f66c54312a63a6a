// The kernels of grouped_matmul_backward_weight. A block has a tile of
// kTileRows columns of grad by kTileColumns columns of input of one group's
// matrix, and adds up the group's rows in order, so that no two blocks add to
// one element.
//
// Both operands have the rows that are summed over as their outer dimension:
// where grouped_matmul's kernels have the depth along a row of a tile, these
// have it from row to row.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_CUH_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_CUH_

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_mma.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_simt.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_tiles.cuh"

namespace xla_ops {

// What the kernels are given.
template <typename T>
struct GroupedWeightArgs {
  const T* grad;                 // [rows, num_columns]
  const T* input;                // [rows, depth]
  const int32_t* group_offsets;  // [num_groups + 1]
  T* dweight;                    // [num_groups, num_columns, depth]
  int num_rows;                  // those that an offset can name
  int num_columns;
  int depth;
  int64_t first_tile;  // of the first block
};

// A side of the plain kernel's tile.
constexpr int kGroupedWeightSimtTile = 64;

// A block's tile. The group's matrix has columns of grad as its rows.
struct GroupedWeightTile {
  GroupedTile place;  // in that matrix, whose last row is place.end_row - 1
  int first_row;      // of the group, in grad and input
  int num_rows;
};

// The block's tile; all lanes of a warp call it together. Tiles are numbered
// group by group, and within a group by columns of input first, so that blocks
// that run at one time share columns of grad.
template <int kTileRows, int kTileColumns, typename T>
__device__ __forceinline__ GroupedWeightTile
FindTile(const GroupedWeightArgs<T>& args) {
  const int64_t depth_tiles = (args.depth + kTileColumns - 1) / kTileColumns;
  const int64_t column_tiles = (args.num_columns + kTileRows - 1) / kTileRows;
  const int64_t index = args.first_tile + blockIdx.x;
  const int64_t row = index / depth_tiles;  // of tiles, through all groups
  GroupedWeightTile tile;
  tile.place.group = static_cast<int>(row / column_tiles);
  tile.place.first_row = static_cast<int>(row % column_tiles) * kTileRows;
  tile.place.end_row = args.num_columns;
  tile.place.first_column =
      static_cast<int>(index % depth_tiles) * kTileColumns;
  // As GroupedTiles has it: the highest offset up to the group's own.
  int begin = 0;
  for (int i = threadIdx.x % 32; i <= tile.place.group; i += 32) {
    begin = max(begin, args.group_offsets[i]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    begin = max(begin, __shfl_xor_sync(kFullWarp, begin, step));
  }
  const int end = max(begin, args.group_offsets[tile.place.group + 1]);
  tile.first_row = min(begin, args.num_rows);
  tile.num_rows = min(end, args.num_rows) - tile.first_row;
  return tile;
}

// How many steps of kDepth rows a group takes, of up to INT32_MAX rows.
template <int kDepth>
__device__ __forceinline__ int StepsOf(const GroupedWeightTile& tile) {
  return tile.num_rows / kDepth + (tile.num_rows % kDepth > 0);
}

// The group's matrix as the stores of grouped_matmul's kernels take it.
template <typename T>
__device__ __forceinline__ GroupedMatmulArgs<T> MatrixOf(
    const GroupedWeightArgs<T>& args, const GroupedWeightTile& tile) {
  GroupedMatmulArgs<T> matrix = {};
  matrix.out =
      args.dweight + int64_t{tile.place.group} * args.num_columns * args.depth;
  matrix.num_columns = args.depth;
  return matrix;
}

#if XLA_OPS_HAS_MMA

// sums += grad tile^T * input tile, of this warp's part.
template <typename T, typename Shape>
__device__ __forceinline__ void MultiplyColumnsStage(
    uint32_t stage, float (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const uint32_t input = stage + Shape::kInputBytes;
  // In chunks: of 16 columns of grad two, and of 8 of input one.
  const int grad_chunk = warp / Shape::kWarpsN * Shape::kRowTiles * 2;
  const int input_chunk = warp % Shape::kWarpsN * Shape::kColumnTiles;
  MultiplyFragments<T, Shape>(
      [&](int k, int m, uint32_t (&a)[4]) {
        // Matrices 0, 1: rows 0-7 of grad, its columns 0-7 and 8-15; 2, 3: rows
        // 8-15. Transposed they are the quarters of a's fragment.
        LoadMatricesTransposed(TileAddress<Shape::kTileRows>(
                                   stage, 16 * k + lane % 8 + lane / 16 * 8,
                                   grad_chunk + 2 * m + lane / 8 % 2),
                               a);
      },
      [&](int k, int n, uint32_t (&b)[4]) {
        // Matrices 0, 1: columns 0-7 of input, its rows 0-7 and 8-15; 2, 3:
        // columns 8-15.
        LoadMatricesTransposed(
            TileAddress<Shape::kTileColumns>(input, 16 * k + lane % 16,
                                             input_chunk + 2 * n + lane / 16),
            b);
      },
      sums);
}

#endif  // XLA_OPS_HAS_MMA

// Grad and input are aligned to 16 bytes, and so are their rows.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    GroupedWeightMmaKernel(const __grid_constant__ GroupedWeightArgs<T> args) {
#if XLA_OPS_HAS_MMA
  __shared__ __align__(128) uint8_t shared[Shape::kSharedBytes];
  const auto tile = FindTile<Shape::kTileRows, Shape::kTileColumns>(args);
  const T* grad = args.grad + int64_t{tile.first_row} * args.num_columns;
  const T* input = args.input + int64_t{tile.first_row} * args.depth;
  const int steps = StepsOf<Shape::kDepth>(tile);
  float sums[Shape::kRowTiles][Shape::kColumnTiles][4] = {};
  ForEachStage<Shape>(
      SharedAddress(shared), steps,
      [&](int step, uint32_t stage) {
        // Rows past the group's are zeros in both.
        const int row = step * Shape::kDepth;
        CopyRows<Shape::kDepth, Shape::kTileRows, Shape::kThreads>(
            grad + int64_t{row} * args.num_columns, tile.num_rows - row,
            args.num_columns, tile.place.first_row, stage);
        CopyRows<Shape::kDepth, Shape::kTileColumns, Shape::kThreads>(
            input + int64_t{row} * args.depth, tile.num_rows - row, args.depth,
            tile.place.first_column, stage + Shape::kInputBytes);
      },
      [&](uint32_t stage) { MultiplyColumnsStage<T, Shape>(stage, sums); });
  StoreTile<T, Shape>(MatrixOf(args, tile), tile.place, sums);
#endif
}

// Loads elements [column, column + kColumns) of kDepth rows of `row_size`
// elements, kColumns + 1 apart as MultiplyStep takes them; zeros past the ends.
template <int kColumns, int kDepth, typename T>
__device__ __forceinline__ void LoadRows(const T* rows, int num_rows,
                                         int row_size, int column,
                                         float* tile) {
  for (int i = threadIdx.x; i < kColumns * kDepth; i += kGroupedSimtThreads) {
    const int row = i / kColumns;
    const int c = i % kColumns;
    const bool valid = row < num_rows && c < row_size - column;
    tile[row * (kColumns + 1) + c] =
        valid ? ToFloat(rows[int64_t{row} * row_size + column + c]) : 0.0f;
  }
}

template <typename T>
__global__ void __launch_bounds__(kGroupedSimtThreads)
    GroupedWeightSimtKernel(const __grid_constant__ GroupedWeightArgs<T> args) {
  constexpr int kTile = kGroupedWeightSimtTile;
  constexpr int kDepth = 16;
  __shared__ float grad_tile[kDepth * (kTile + 1)];
  __shared__ float input_tile[kDepth * (kTile + 1)];
  const auto tile = FindTile<kTile, kTile>(args);
  float sums[kTile / 16][kTile / 16] = {};
  const int steps = StepsOf<kDepth>(tile);
  for (int step = 0; step < steps; ++step) {
    const int row = step * kDepth;
    const int64_t at = int64_t{tile.first_row} + row;
    __syncthreads();
    LoadRows<kTile, kDepth>(args.grad + at * args.num_columns,
                            tile.num_rows - row, args.num_columns,
                            tile.place.first_row, grad_tile);
    LoadRows<kTile, kDepth>(args.input + at * args.depth, tile.num_rows - row,
                            args.depth, tile.place.first_column, input_tile);
    __syncthreads();
    MultiplyStep<kDepth>(grad_tile, input_tile, sums);
  }
  StoreSums(MatrixOf(args, tile), tile.place, sums);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_BACKWARD_WEIGHT_CUH_
