// grouped_matmul on tensor cores, fp16 and bf16 from compute capability 8.0 on:
// mma.m16n8k16 over a ring of tiles of input and weight in shared memory, which
// cp.async fills kStages - 1 steps ahead.
//
// Input and weight have the depth as their inner dimension both, so fragments
// of either come by ldmatrix without a transpose.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_MMA_CUH_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_MMA_CUH_

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_tiles.cuh"

namespace xla_ops {

// A block's tile of out is kWarpsM by kWarpsN warps' tiles of 16 kRowTiles rows
// and 8 kColumnTiles columns; a step of the ring is kDepth elements deep.
template <int kWarpsM_, int kWarpsN_, int kRowTiles_, int kColumnTiles_,
          int kDepth_, int kStages_>
struct GroupedMmaShape {
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kDepth = kDepth_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kTileRows = kWarpsM * kRowTiles * 16;
  static constexpr int kTileColumns = kWarpsN * kColumnTiles * 8;
  static constexpr int kInputBytes = kTileRows * kDepth * 2;
  static constexpr int kStageBytes = kInputBytes + kTileColumns * kDepth * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kColumnTiles % 2 == 0);
  static_assert(kSharedBytes <= 48 * 1024, "what needs no opt-in");
};

// Few rows a group: bound by reading the weights, so small tiles, deep steps
// and several blocks a multiprocessor.
using GroupedMmaDecode = GroupedMmaShape<1, 4, 1, 2, 64, 4>;  // 16 x 64
using GroupedMmaMedium = GroupedMmaShape<2, 2, 2, 8, 32, 4>;  // 64 x 128
using GroupedMmaLarge = GroupedMmaShape<2, 4, 4, 4, 32, 3>;   // 128 x 128

#if XLA_OPS_HAS_MMA

// Starts the copy of elements [column, column + kDepth) of kRows rows of
// `depth` elements to a shared tile; zeros past `num_rows` and past the depth.
template <int kRows, int kDepth, int kThreads, typename T>
__device__ __forceinline__ void CopyRows(const T* rows, int num_rows, int depth,
                                         int column, uint32_t tile) {
  constexpr int kChunks = kDepth / kChunk;  // of a row
  static_assert(kThreads % kChunks == 0);
  const int chunk = threadIdx.x % kChunks;
  const int from = column + chunk * kChunk;
#pragma unroll
  for (int i = threadIdx.x / kChunks; i < kRows; i += kThreads / kChunks) {
    const bool valid = i < num_rows && from < depth;
    CopyAsync(TileAddress<kDepth>(tile, i, chunk),
              valid ? rows + int64_t{i} * depth + from : rows, valid);
  }
}

// sums += a b of the kDepth elements of a stage, where load_a(k, m, fragment)
// and load_b(k, n, fragment) give step k's rows [16 m, 16 m + 16) of a and
// columns [16 n, 16 n + 16) of b, of this warp's.
template <typename T, typename Shape, typename LoadA, typename LoadB>
__device__ __forceinline__ void MultiplyFragments(
    LoadA&& load_a, LoadB&& load_b,
    float (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4]) {
#pragma unroll
  for (int k = 0; k < Shape::kDepth / 16; ++k) {
    uint32_t a[Shape::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) load_a(k, m, a[m]);
#pragma unroll
    for (int n = 0; n < Shape::kColumnTiles / 2; ++n) {
      uint32_t b[4];
      load_b(k, n, b);
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        Mma<T>(a[m], b[0], b[1], sums[m][2 * n]);
        Mma<T>(a[m], b[2], b[3], sums[m][2 * n + 1]);
      }
    }
  }
}

// sums += input tile * weight tile^T, of this warp's rows and columns.
template <typename T, typename Shape>
__device__ __forceinline__ void MultiplyStage(
    uint32_t stage, float (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const uint32_t weight = stage + Shape::kInputBytes;
  const int row = warp / Shape::kWarpsN * Shape::kRowTiles * 16 + lane % 16;
  // Matrices 0, 1: columns 0-7, lower and upper half of the depth; 2, 3:
  // columns 8-15.
  const int column = warp % Shape::kWarpsN * Shape::kColumnTiles * 8 +
                     lane % 8 + lane / 16 * 8;
  MultiplyFragments<T, Shape>(
      [&](int k, int m, uint32_t (&a)[4]) {
        LoadMatrices(
            TileAddress<Shape::kDepth>(stage, row + 16 * m, 2 * k + lane / 16),
            a);
      },
      [&](int k, int n, uint32_t (&b)[4]) {
        LoadMatrices(TileAddress<Shape::kDepth>(weight, column + 16 * n,
                                                2 * k + lane / 8 % 2),
                     b);
      },
      sums);
}

// Calls multiply(stage) for each of `steps` steps, in order, with the shared
// address that copy(step, stage) has filled by then: it starts copies
// kStages - 1 steps ahead.
template <typename Shape, typename Copy, typename Multiply>
__device__ __forceinline__ void ForEachStage(uint32_t ring, int steps,
                                             Copy&& copy, Multiply&& multiply) {
  const auto start = [&](int step) {
    if (step < steps) {
      copy(step, ring + step % Shape::kStages * Shape::kStageBytes);
    }
    // An empty group of copies, too, so that their number tells the step.
    CommitCopies();
  };
  // The last tile's stages have been read by all warps.
  __syncthreads();
#pragma unroll
  for (int step = 0; step < Shape::kStages - 1; ++step) start(step);
  for (int step = 0; step < steps; ++step) {
    WaitForCopies<Shape::kStages - 2>();
    // All of the stage has arrived, and the one before it has been read.
    __syncthreads();
    start(step + Shape::kStages - 1);
    multiply(ring + step % Shape::kStages * Shape::kStageBytes);
  }
}

// Writes this warp's part of a tile, as far as it is in the group and in out.
template <typename T, typename Shape>
__device__ __forceinline__ void StoreTile(
    const GroupedMatmulArgs<T>& args, const GroupedTile& tile,
    const float (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int first_row =
      tile.first_row + lane / 4 + warp / Shape::kWarpsN * Shape::kRowTiles * 16;
  const int first_column = tile.first_column + lane % 4 * 2 +
                           warp % Shape::kWarpsN * Shape::kColumnTiles * 8;
  // A pair of columns is one store where all pairs are aligned.
  const bool pairs = args.num_columns % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(args.out) % 4 == 0;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + 8 * half;
      if (row >= tile.end_row) continue;
      T* out = args.out + int64_t{row} * args.num_columns;
#pragma unroll
      for (int n = 0; n < Shape::kColumnTiles; ++n) {
        const int column = first_column + 8 * n;
        const float low = sums[m][n][2 * half] + BiasAt(args, column);
        const float high = sums[m][n][2 * half + 1] + BiasAt(args, column + 1);
        if (pairs) {
          if (column < args.num_columns) {
            *reinterpret_cast<uint32_t*>(out + column) = PackPair<T>(low, high);
          }
        } else {
          if (column < args.num_columns) out[column] = FromFloat<T>(low);
          if (column + 1 < args.num_columns) {
            out[column + 1] = FromFloat<T>(high);
          }
        }
      }
    }
  }
}

#endif  // XLA_OPS_HAS_MMA

// Input and weight are aligned to 16 bytes, and so are their rows.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    GroupedMatmulMmaKernel(const __grid_constant__ GroupedMatmulArgs<T> args) {
#if XLA_OPS_HAS_MMA
  __shared__ __align__(128) uint8_t shared[Shape::kSharedBytes];
  const uint32_t ring = SharedAddress(shared);
  const int steps = (args.depth + Shape::kDepth - 1) / Shape::kDepth;
  GroupedTiles<Shape::kTileRows, Shape::kTileColumns> tiles(args);
  GroupedTile tile;
  for (int64_t i = blockIdx.x; tiles.Find(i, &tile); i += gridDim.x) {
    const T* input = args.input + int64_t{tile.first_row} * args.depth;
    const T* weight = args.weight + (int64_t{tile.group} * args.num_columns +
                                     tile.first_column) *
                                        args.depth;
    float sums[Shape::kRowTiles][Shape::kColumnTiles][4] = {};
    ForEachStage<Shape>(
        ring, steps,
        [&](int step, uint32_t stage) {
          CopyRows<Shape::kTileRows, Shape::kDepth, Shape::kThreads>(
              input, tile.end_row - tile.first_row, args.depth,
              step * Shape::kDepth, stage);
          CopyRows<Shape::kTileColumns, Shape::kDepth, Shape::kThreads>(
              weight, args.num_columns - tile.first_column, args.depth,
              step * Shape::kDepth, stage + Shape::kInputBytes);
        },
        [&](uint32_t stage) { MultiplyStage<T, Shape>(stage, sums); });
    StoreTile<T, Shape>(args, tile, sums);
  }
  WriteZeroRows(args, tiles.FirstRow(), tiles.EndRow());
#endif
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_MMA_CUH_
