// linear on Hopper's warpgroup products and bulk copies, for fp16 and bf16 and
// up to 128 rows: a stream of the weight, which the products keep up with.
//
// out^T = weight input^T: rows of the weight are the m of wgmma, 64 a
// warpgroup, and kRows rows of the input (padded with zeros) its n. A block
// has `tile_columns` rows of the weight and one part of the depth; the blocks
// of a cluster have the parts, and add their sums up through each other's
// shared memory, in the order of their ranks. Warps of a block:
//   consumers, 4 for each 64 columns   products, then the sums
//   the last warp                      copies steps of weight and input
// A stage holds one step: [tile_columns][64] of the weight and [kRows][64] of
// the input, swizzled by 128 bytes. The last warpgroup may multiply rows
// beyond the tile: what lies there, in the block's memory. Such products are
// dropped.
//
// Plans: linear_plan.h. Tested by tests/gpu/check_linear.py.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_SM90_CUH_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_SM90_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/cluster.cuh"
#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/grouped_matmul/linear_plan.h"

namespace xla_ops {

constexpr int kLinearMaxThreads =
    LinearConsumers(kLinearMaxTileColumns) * 128 + 32;

struct LinearSm90Args {
  CUtensorMap weight;  // boxes of [tile_columns][64]
  CUtensorMap input;   // boxes of [kRows][64]
  const void* bias;    // [num_columns], or null
  void* out;           // [num_rows, num_columns]
  int num_rows;
  int num_columns;
  int steps;  // of the depth
  int tile_columns;
  int stages;
  bool keep_weight;
  bool wide;  // out's and bias's columns come in aligned pieces of 8
};

#if XLA_OPS_HAS_WGMMA

// A stage's barriers: X_full says that its tiles have arrived, X_empty that
// all consumer warps are done with them.
struct LinearBarriers {
  uint64_t full[kLinearMaxStages], empty[kLinearMaxStages];
};

// A ring's place: the stage, and the parity of its phase.
struct LinearRing {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The last warp's first lane.
template <int kRows>
__device__ __forceinline__ void LoadSteps(const LinearSm90Args& args,
                                          LinearBarriers& barriers,
                                          uint32_t stages, int first_column,
                                          int begin, int end) {
  const int weight_bytes = args.tile_columns * kPanelRowBytes;
  const int stage_bytes = weight_bytes + kRows * kPanelRowBytes;
  const uint64_t weight_policy = MakeCachePolicy(!args.keep_weight);
  const uint64_t input_policy = MakeCachePolicy(false);
  LinearRing ring;
  for (int step = begin; step < end; ++step) {
    uint64_t* const full = &barriers.full[ring.stage];
    Wait(&barriers.empty[ring.stage], ring.parity ^ 1);
    ArriveExpecting(full, stage_bytes);
    const uint32_t stage = stages + ring.stage * stage_bytes;
    CopyBox(&args.weight, full, stage, step * kLinearStepDepth, first_column,
            weight_policy);
    CopyBox(&args.input, full, stage + weight_bytes, step * kLinearStepDepth, 0,
            input_policy);
    ring.Advance(args.stages);
  }
}

// A consumer warpgroup: sums[] = its 64 rows of the weight times the input.
template <typename T, int kRows>
__device__ __forceinline__ void MultiplySteps(const LinearSm90Args& args,
                                              LinearBarriers& barriers,
                                              uint32_t stages, int begin,
                                              int end,
                                              float (&sums)[kRows / 2]) {
  const int weight_bytes = args.tile_columns * kPanelRowBytes;
  const int stage_bytes = weight_bytes + kRows * kPanelRowBytes;
  const int first_row = threadIdx.x / 128 * 64;
  const bool elected = threadIdx.x % 32 == 0;
  const uint64_t layout = DescriptorLayout(kAtomBytes, 16);
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  LinearRing ring;
  int before = 0;  // the stage of the step before
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const uint32_t stage = stages + ring.stage * stage_bytes;
    const uint64_t weight =
        DescriptorAt(layout, stage + first_row * kPanelRowBytes);
    const uint64_t input = DescriptorAt(layout, stage + weight_bytes);
    Wait(&barriers.full[ring.stage], ring.parity);
    FenceRegisters(sums);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kLinearStepDepth / 16; ++k) {
      // 32 bytes on, in the descriptor's units of 16.
      WgmmaSS<T>(sums, weight + 2 * k, input + 2 * k, true);
    }
    WgmmaCommit();
    WgmmaWait<1>();
    if (elected && step > begin) Arrive(&barriers.empty[before]);
    before = ring.stage;
    ring.Advance(args.stages);
  }
  WgmmaWait<0>();
  FenceRegisters(sums);
}

// Writes a consumer warpgroup's sums as fp32 [kRows][tile_columns], rows
// LinearSumStride apart.
template <int kRows>
__device__ __forceinline__ void StoreSums(int tile_columns, float* partial,
                                          const float (&sums)[kRows / 2]) {
  const int lane = threadIdx.x % 32;
  const int stride = LinearSumStride(tile_columns);
  const int first_column = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = first_column + 8 * half;
    if (column >= tile_columns) continue;
    float* out = partial + lane % 4 * 2 * stride + column;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      out[8 * j * stride] = sums[4 * j + 2 * half];
      out[8 * j * stride + stride] = sums[4 * j + 2 * half + 1];
    }
  }
}

// Adds up this block's share of the cluster's sums and writes it to out.
template <typename T>
__device__ __forceinline__ void ReduceAndStore(const LinearSm90Args& args,
                                               const float* partial,
                                               int first_column, int rank,
                                               int ranks) {
  const uint32_t address = SharedAddress(partial);
  const int stride = LinearSumStride(args.tile_columns);
  const int pieces = args.tile_columns / 8;
  const T* bias = static_cast<const T*>(args.bias);
  for (int i = rank * blockDim.x + threadIdx.x; i < args.num_rows * pieces;
       i += ranks * blockDim.x) {
    const int row = i / pieces;
    const int piece = i % pieces;
    const int column = first_column + 8 * piece;
    if (column >= args.num_columns) continue;
    const uint32_t source = address + (row * stride + 8 * piece) * 4;
    float sums[8] = {};
#pragma unroll 4
    for (int other = 0; other < ranks; ++other) {
      const uint32_t there = MapToRank(source, other);
      float values[8];
      LoadFromCluster(there, &values[0]);
      LoadFromCluster(there + 16, &values[4]);
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[c] += values[c];
    }
    T* out = static_cast<T*>(args.out) + int64_t{row} * args.num_columns;
    if (args.wide) {
      Vector<T, 8> result;
      if (bias != nullptr) {
        const Vector<T, 8> added = LoadVector<8>(bias + column);
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[c] += ToFloat(added[c]);
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) result[c] = FromFloat<T>(sums[c]);
      StoreGlobal(out + column, result);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (column + c >= args.num_columns) continue;
        if (bias != nullptr) sums[c] += ToFloat(bias[column + c]);
        out[column + c] = FromFloat<T>(sums[c]);
      }
    }
  }
}

#endif  // XLA_OPS_HAS_WGMMA

template <typename T, int kRows>
__global__ void __launch_bounds__(kLinearMaxThreads, 1)
    LinearSm90Kernel(const __grid_constant__ LinearSm90Args args) {
#if XLA_OPS_HAS_WGMMA
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ LinearBarriers barriers;
  uint8_t* const memory =
      dynamic_shared + (-SharedAddress(dynamic_shared) & 1023);
  const uint32_t stages = SharedAddress(memory);
  float* const partial = reinterpret_cast<float*>(memory);

  const int consumers = blockDim.x / 128;
  const int warp = threadIdx.x / 32;
  const int rank = ClusterRank();
  const int ranks = ClusterRanks();
  const int first_column = blockIdx.x / ranks * args.tile_columns;
  const int begin = static_cast<int>(int64_t{args.steps} * rank / ranks);
  const int end = static_cast<int>(int64_t{args.steps} * (rank + 1) / ranks);

  if (threadIdx.x == 0) {
    for (int i = 0; i < args.stages; ++i) {
      InitBarrier(&barriers.full[i], 1);
      InitBarrier(&barriers.empty[i], 4 * consumers);
    }
    FenceBarrierInit();
    PrefetchMap(&args.weight);
    PrefetchMap(&args.input);
  }
  __syncthreads();

  if (warp == 4 * consumers) {
    if (threadIdx.x % 32 == 0) {
      LoadSteps<kRows>(args, barriers, stages, first_column, begin, end);
    }
    __syncwarp();
  } else {
    float sums[kRows / 2];
    MultiplySteps<T, kRows>(args, barriers, stages, begin, end, sums);
    // All copies have arrived, and all products are done: the sums take the
    // ring's place.
    SyncNamed(1, 128 * consumers);
    StoreSums<kRows>(args.tile_columns, partial, sums);
  }
  SyncCluster();
  ReduceAndStore<T>(args, partial, first_column, rank, ranks);
  // No block leaves while another reads its sums.
  SyncCluster();
#endif  // XLA_OPS_HAS_WGMMA
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_SM90_CUH_
