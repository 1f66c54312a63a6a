// Attention on Hopper's warpgroup products and bulk copies, for prefill in
// fp16 and bf16. The pipeline is FlashAttention-3's (Shah et al., 2024,
// https://arxiv.org/abs/2407.08608).
//
// A persistent block takes work items one by one from a counter in the
// workspace: a tile of kRows packed query rows (the query heads of one KV head
// folded into rows: packed row r is token r / group, head r % group) of one
// sequence and KV head. Roles of its warpgroups:
//   producer, warp 0      takes items, and copies K and V tiles by TMA
//   producer, warps 1-3   copy the query tile
//   consumers             64 query rows each
// KV tiles are taken from the last to the first, so that those that need a
// mask come first. While a consumer's softmax of one tile runs, its products
// P V of the tile before and, in turns with its neighbours (named barriers),
// theirs keep the tensor cores busy.
//
// Their work items are in attention_sm90_items.cuh, and what they do with a
// tile in attention_sm90_tile.cuh.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_

#include <cuda.h>
#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_items.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_tile.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

// The barriers of a stage of K or V, and of the other buffers.
template <int kStages>
struct Sm90Barriers {
  uint64_t item_full[2], item_empty[2];
  uint64_t query_full, query_empty;
  uint64_t key_full[kStages], key_empty[kStages];
  uint64_t value_full[kStages], value_empty[kStages];
  uint64_t tail;
};

// A ring's place: the stage, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Consumer i takes its turn at the tensor cores after consumer i - 1, the
// first one after the last. Barrier 1 + i is consumer i's.
template <typename Shape>
__device__ __forceinline__ void WaitForTurn(int consumer) {
  if constexpr (Shape::kTurns) SyncNamed(1 + consumer, 256);
}

template <typename Shape>
__device__ __forceinline__ void PassTurn(int consumer) {
  if constexpr (Shape::kTurns) {
    ArriveNamed(1 + (consumer + 1) % Shape::kConsumers, 256);
  }
}

// Producer, warp 0.
template <typename Shape>
__device__ __forceinline__ void ProduceTiles(
    const CUtensorMap* key_map, const CUtensorMap* value_map,
    const Sm90Args& args, Sm90Barriers<Shape::kStages>& barriers,
    Sm90Item* items, unsigned* masks, uint32_t keys, uint32_t values) {
  constexpr int kStages = Shape::kStages;
  const int lane = threadIdx.x % 32;
  Sm90Segments segments;
  segments.num_seqs = args.num_seqs == nullptr
                          ? args.max_num_seqs
                          : min(max(*args.num_seqs, 0), args.max_num_seqs);
  Ring<2> slot;
  Ring<kStages> key_ring;
  Ring<kStages> value_ring;
  int tail_parity = 0;
  while (true) {
    const Sm90Item item = NextItem<Shape>(args, segments);
    Wait(&barriers.item_empty[slot.stage], slot.parity ^ 1);
    if (lane == 0) {
      items[slot.stage] = item;
      Arrive(&barriers.item_full[slot.stage]);
    }
    slot.Advance();
    if (item.seq == -2) return;

    // K runs one tile ahead of V.
    Sm90Box before = {};
    for (int tile = item.tile_end; tile >= item.tile_begin; --tile) {
      // Tile `tile` - 1 of K, then tile `tile` of V.
      Sm90Box box = {};
      if (tile > item.tile_begin) {
        const int first = (tile - 1) * Shape::kTokens;
        box = FindBox(args, item, first + lane * args.box_tokens);
        // A bit for each 16 tokens.
        const int bits = args.box_tokens / 16;
        const unsigned masked = __reduce_or_sync(
            kFullWarp, lane * args.box_tokens < Shape::kTokens && box.masked
                           ? ((1u << bits) - 1) << lane * bits
                           : 0u);
        Wait(&barriers.key_empty[key_ring.stage], key_ring.parity ^ 1);
        if (lane == 0) {
          masks[key_ring.stage] = masked;
          Arrive(&barriers.key_full[key_ring.stage]);
        }
        CopyTile<Shape>(key_map, &barriers.key_full[key_ring.stage],
                        keys + key_ring.stage * Shape::kTileBytes, args, item,
                        box);
        key_ring.Advance();
      }
      if (tile < item.tile_end) {
        const uint32_t target = values + value_ring.stage * Shape::kTileBytes;
        uint64_t* full = &barriers.value_full[value_ring.stage];
        Wait(&barriers.value_empty[value_ring.stage], value_ring.parity ^ 1);
        const int left = item.context - tile * Shape::kTokens;
        if (left < Shape::kTokens) {
          CopyTile<Shape>(value_map, &barriers.tail, target, args, item,
                          before);
          Wait(&barriers.tail, tail_parity);
          tail_parity ^= 1;
          ClearRows<Shape>(args, target, left);
          if (lane == 0) Arrive(full);
        } else {
          CopyTile<Shape>(value_map, full, target, args, item, before);
        }
        value_ring.Advance();
      }
      before = box;
    }
  }
}

// Producer, warps 1 to 3.
template <typename T, typename Shape>
__device__ __forceinline__ void ProduceQueries(
    const Sm90Args& args, Sm90Barriers<Shape::kStages>& barriers,
    const Sm90Item* items, uint32_t query) {
  Ring<2> slot;
  int parity = 1;
  while (true) {
    Wait(&barriers.item_full[slot.stage], slot.parity);
    const Sm90Item item = items[slot.stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) Arrive(&barriers.item_empty[slot.stage]);
    slot.Advance();
    if (item.seq == -2) return;
    if (item.tile_begin == item.tile_end) continue;
    Wait(&barriers.query_empty, parity);
    parity ^= 1;
    CopyQuery<T, Shape>(args, item, query);
    Arrive(&barriers.query_full);
  }
}

// A consumer warpgroup.
template <typename T, int kHeadDim, typename Shape>
__device__ __forceinline__ void Consume(const Sm90Args& args,
                                        Sm90Barriers<Shape::kStages>& barriers,
                                        const Sm90Item* items,
                                        const unsigned* masks, uint32_t query,
                                        uint32_t keys, uint32_t values) {
  constexpr int kStages = Shape::kStages;
  constexpr int kTokens = Shape::kTokens;
  const int consumer = threadIdx.x / 128 - 1;
  const int lane = threadIdx.x % 32;
  const int warp_row = consumer * 64 + threadIdx.x % 128 / 32 * 16;
  const bool elected = lane == 0;
  query += consumer * 64 * kPanelRowBytes;
  const float factor = args.transform ? 1.0f : args.scale;

  Ring<2> slot;
  Ring<kStages> key_ring;
  Ring<kStages> value_ring;
  int query_parity = 0;
  // The last consumer gives the first one its first turn.
  if (consumer == Shape::kConsumers - 1) PassTurn<Shape>(consumer);

  while (true) {
    Wait(&barriers.item_full[slot.stage], slot.parity);
    const Sm90Item item = items[slot.stage];
    __syncwarp();
    if (elected) Arrive(&barriers.item_empty[slot.stage]);
    slot.Advance();
    if (item.seq == -2) return;

    if (item.tile_begin == item.tile_end) {
      StoreZeros<T>(args, item, warp_row);
      continue;
    }

    Sm90Rows rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int packed = item.first_row + warp_row + lane / 4 + 8 * i;
      const int step = args.group.Divide(packed);
      rows.position[i] = item.shift + step;
      rows.slope[i] = 0.0f;
      if (args.alibi_slopes != nullptr) {
        const int head = (item.kv_head - step) * args.group.value() + packed;
        rows.slope[i] =
            args.alibi_slopes[item.seq * args.alibi_seq_stride + head] * kLog2E;
      }
    }
    // Of the warpgroup's first and last row.
    const int first_position =
        item.shift + args.group.Divide(item.first_row + consumer * 64);
    const int last_position =
        item.shift + args.group.Divide(item.first_row + consumer * 64 + 63);

    float max[2] = {-CUDART_INF_F, -CUDART_INF_F};
    float sum[2] = {0.0f, 0.0f};
    float scores[kTokens / 2];
    float rescale[2];
    uint32_t weights[kTokens / 16][4];
    const auto to_weights = [&](int tile, unsigned masked) {
      const int token = tile * kTokens;
      if (args.transform) TransformScores(args, rows, token, scores);
      if (masked != 0 || token + kTokens > item.context ||
          (args.window_right >= 0 &&
           token + kTokens - 1 > first_position + args.window_right) ||
          (args.window_left >= 0 && token < last_position - args.window_left)) {
        MaskScores(args, rows, item.context, token, masked, scores);
      }
      UpdateWeights(factor, scores, max, sum, rescale);
    };
    // Starts the product of the K tile, which has arrived.
    const auto start_scores = [&] {
      StartScores<T, Shape>(query, keys + key_ring.stage * Shape::kTileBytes,
                            scores);
    };
    const auto release_key = [&]() -> unsigned {
      const unsigned masked = masks[key_ring.stage];
      __syncwarp();
      if (elected) Arrive(&barriers.key_empty[key_ring.stage]);
      key_ring.Advance();
      return masked;
    };

    Wait(&barriers.query_full, query_parity);
    query_parity ^= 1;
    float out[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
    Wait(&barriers.key_full[key_ring.stage], key_ring.parity);
    start_scores();
    WaitForProducts<0>();
    FenceRegisters(scores);
    to_weights(item.tile_end - 1, release_key());
    PackWeights<T>(scores, weights);

#pragma unroll 1
    for (int tile = item.tile_end - 2; tile >= item.tile_begin; --tile) {
      Wait(&barriers.key_full[key_ring.stage], key_ring.parity);
      WaitForTurn<Shape>(consumer);
      start_scores();
      Wait(&barriers.value_full[value_ring.stage], value_ring.parity);
      StartOutput<T, Shape>(weights,
                            values + value_ring.stage * Shape::kTileBytes, out);
      PassTurn<Shape>(consumer);
      WaitForProducts<1>();
      FenceRegisters(scores);
      to_weights(tile, release_key());
      WaitForProducts<0>();
      FenceRegisters(out);
      if (elected) Arrive(&barriers.value_empty[value_ring.stage]);
      value_ring.Advance();
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[4 * n + j] *= rescale[j / 2];
      }
      PackWeights<T>(scores, weights);
    }
    if (elected) Arrive(&barriers.query_empty);
    Wait(&barriers.value_full[value_ring.stage], value_ring.parity);
    StartOutput<T, Shape>(weights,
                          values + value_ring.stage * Shape::kTileBytes, out);
    WaitForProducts<0>();
    FenceRegisters(out);
    if (elected) Arrive(&barriers.value_empty[value_ring.stage]);
    value_ring.Advance();
    StoreOutput<T>(args, item, warp_row, factor, max, sum, out);
  }
}

#endif  // XLA_OPS_HAS_WGMMA

template <typename T, int kHeadDim, bool kAllPanels>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim, kAllPanels>::kThreads, 1)
    AttentionSm90Kernel(const __grid_constant__ CUtensorMap key_map,
                        const __grid_constant__ CUtensorMap value_map,
                        const __grid_constant__ Sm90Args args) {
#if XLA_OPS_HAS_WGMMA
  using Shape = Sm90Shape<kHeadDim, kAllPanels>;
  constexpr int kStages = Shape::kStages;
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ Sm90Barriers<kStages> barriers;
  __shared__ Sm90Item items[2];
  __shared__ unsigned masks[kStages];
  const uint32_t query = (SharedAddress(dynamic_shared) + 1023) & ~1023u;
  const uint32_t keys = query + Shape::kQueryBytes;
  const uint32_t values = keys + kStages * Shape::kTileBytes;

  if (threadIdx.x == 0) {
    // Warps arrive, by one lane, but for the query's copies.
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    for (int i = 0; i < 2; ++i) {
      InitBarrier(&barriers.item_full[i], 1);
      InitBarrier(&barriers.item_empty[i], 3 + kConsumerWarps);
    }
    InitBarrier(&barriers.query_full, 96);
    InitBarrier(&barriers.query_empty, kConsumerWarps);
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&barriers.key_full[i], 2);  // the mask's, and the copies'
      InitBarrier(&barriers.key_empty[i], kConsumerWarps);
      InitBarrier(&barriers.value_full[i], 1);
      InitBarrier(&barriers.value_empty[i], kConsumerWarps);
    }
    InitBarrier(&barriers.tail, 1);
    FenceBarrierInit();
    PrefetchMap(&key_map);
    PrefetchMap(&value_map);
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    GiveRegisters<Shape::kProducerRegisters>();
    if (threadIdx.x < 32) {
      ProduceTiles<Shape>(&key_map, &value_map, args, barriers, items, masks,
                          keys, values);
    } else {
      ProduceQueries<T, Shape>(args, barriers, items, query);
    }
  } else {
    TakeRegisters<Shape::kConsumerRegisters>();
    Consume<T, kHeadDim, Shape>(args, barriers, items, masks, query, keys,
                                values);
  }
#endif  // XLA_OPS_HAS_WGMMA
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_
