// What a block of the Hopper kernels of attention's gradient works on, and
// their producer (attention_backward_sm90.cuh).
//
// Rows of a tile past the end of its sequence are another sequence's: they are
// cleared, lest their NaN come into a product with zero.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_LOAD_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_LOAD_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_shape.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_shape.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

template <int kStages>
struct BackwardSm90Barriers {
  uint64_t key_full;
  uint64_t query_full[kStages], query_empty[kStages];
  uint64_t grad_full[kStages], grad_empty[kStages];
  uint64_t tail;  // a copy that then is cleared in part
};

// Addresses in shared memory.
template <typename Shape>
struct BackwardSm90Shared {
  uint32_t keys, values, queries, grads, weights, sums, lses, deltas;

  __device__ __forceinline__ explicit BackwardSm90Shared(uint32_t start) {
    keys = (start + 1023) & ~1023u;
    values = keys + Shape::kKeyBytes;
    queries = values + Shape::kKeyBytes;
    grads = queries + Shape::kStages * Shape::kRowBytes;
    weights = grads + Shape::kStages * Shape::kRowBytes;
    sums = weights + Shape::kWeightBuffers * Shape::kWeightBytes;
    lses = sums + Shape::kConsumers * Shape::kSumBytes;
    deltas = lses + Shape::kStages * Shape::kRowFloatBytes;
  }
};

// What a block works on.
struct BackwardSm90Work {
  BackwardTile tile;
  int kv_head;
  int tile_begin, tile_end;  // tiles of query rows
  int first_place;           // of the sequence's first query tile
};

template <typename Shape>
__device__ __forceinline__ BackwardSm90Work
FindWork(const AttentionBackwardArgs& args) {
  BackwardSm90Work work;
  work.kv_head = blockIdx.x / args.max_key_tiles;
  work.tile = FindBackwardTile<Shape::kKeys, true>(
      args, blockIdx.x % args.max_key_tiles);
  if (work.tile.rows == 0) return work;
  const TokenRange tiles =
      TilesOf<Shape::kRows>(RowsThatSee(args.batch, work.tile, work.tile.first,
                                        work.tile.first + work.tile.rows - 1));
  work.tile_begin = tiles.begin;
  work.tile_end = tiles.end;
  work.first_place = args.query_tiles[work.tile.segment];
  return work;
}

// The producer warp: zeros the rows from `row` on of a tile.
template <int kRows, int kPanels>
__device__ __forceinline__ void ClearTail(uint32_t tile, int row) {
  constexpr int kPieces = kPanelRowBytes / 16;
  for (int i = row * kPieces + threadIdx.x % 32; i < kRows * kPieces; i += 32) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(
                       tile + panel * kRows * kPanelRowBytes + i * 16),
                   "r"(0)
                   : "memory");
    }
  }
  FenceSharedForAsync();
  __syncwarp();
}

// The producer warp: copies a tile of rows.
template <int kRows, int kPanels>
__device__ __forceinline__ void CopyTileRows(const CUtensorMap* map,
                                             uint64_t* full, uint64_t* tail,
                                             int& tail_parity, uint32_t target,
                                             int head, int row, int rows) {
  const bool elected = threadIdx.x % 32 == 0;
  uint64_t* barrier = rows < kRows ? tail : full;
  if (elected) {
    ArriveExpecting(barrier, kRows * kPanels * kPanelRowBytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      CopyBox(map, barrier, target + panel * kRows * kPanelRowBytes,
              panel * kPanelColumns, row, head, 0, 0);
    }
  }
  __syncwarp();
  if (rows >= kRows) return;
  Wait(tail, tail_parity);
  tail_parity ^= 1;
  ClearTail<kRows, kPanels>(target, rows);
  if (elected) Arrive(full);
}

// A float of each row of a tile, on its way through the producer warp's
// registers to shared memory.
template <int kRows>
struct RowFloats {
  static constexpr int kEach = kRows / 32;
  Vector<float, kEach> values;

  __device__ __forceinline__ explicit RowFloats(const float* source)
      : values(LoadVector<kEach>(source + threadIdx.x % 32 * kEach)) {}

  __device__ __forceinline__ void Store(uint32_t target, uint64_t* full) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(
                       target + (threadIdx.x % 32 * kEach + i) * 4),
                   "f"(values.data[i])
                   : "memory");
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) Arrive(full);
  }
};

template <typename Shape>
__device__ __forceinline__ void BackwardProduce(
    const BackwardSm90Maps& maps, const AttentionBackwardArgs& args,
    BackwardSm90Barriers<Shape::kStages>& barriers,
    const BackwardSm90Shared<Shape>& shared, const BackwardSm90Work& work) {
  constexpr int kRows = Shape::kRows;
  int tail_parity = 0;
  const auto copy_keys = [&](const CUtensorMap* map, uint32_t target) {
    CopyTileRows<Shape::kKeys, Shape::kPanels>(
        map, &barriers.key_full, &barriers.tail, tail_parity, target,
        work.kv_head, work.tile.range.key_start + work.tile.first,
        work.tile.rows);
  };
  copy_keys(&maps.key, shared.keys);
  copy_keys(&maps.value, shared.values);
  const int group = args.batch.group.value();
  Ring<Shape::kStages> ring;
  for (int head = work.kv_head * group; head < (work.kv_head + 1) * group;
       ++head) {
    const int64_t head_place =
        int64_t{head} * args.max_query_tiles + work.first_place;
    for (int tile = work.tile_begin; tile < work.tile_end; ++tile) {
      const int row = work.tile.range.query_start + tile * kRows;
      const int rows = work.tile.range.query_rows - tile * kRows;
      const int64_t place = (head_place + tile) * kRows;
      const int stage = ring.stage;
      const RowFloats<kRows> lses(args.row_lse + place);
      Wait(&barriers.query_empty[stage], ring.parity ^ 1);
      CopyTileRows<kRows, Shape::kPanels>(
          &maps.query, &barriers.query_full[stage], &barriers.tail, tail_parity,
          shared.queries + stage * Shape::kRowBytes, head, row, rows);
      lses.Store(shared.lses + stage * Shape::kRowFloatBytes,
                 &barriers.query_full[stage]);
      const RowFloats<kRows> deltas(args.row_delta + place);
      Wait(&barriers.grad_empty[stage], ring.parity ^ 1);
      CopyTileRows<kRows, Shape::kPanels>(
          &maps.grad, &barriers.grad_full[stage], &barriers.tail, tail_parity,
          shared.grads + stage * Shape::kRowBytes, head, row, rows);
      deltas.Store(shared.deltas + stage * Shape::kRowFloatBytes,
                   &barriers.grad_full[stage]);
      ring.Advance();
    }
  }
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_LOAD_CUH_
