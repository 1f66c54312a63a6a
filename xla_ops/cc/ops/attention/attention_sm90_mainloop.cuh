// The consumers of the Hopper attention kernel (attention_sm90.cuh): the main
// loop over an item's KV tiles.
//
// Q K^T of a tile and P V of the one before are started together, as in
// FlashAttention-3, which has softmax run while P V does. Not here: ptxas 13.0
// moves the softmax behind the wait for P V. What overlaps is one consumer's
// softmax with another's products (kPingPong). A branch that is never taken
// keeps softmax in its place; every head_dim was 6 to 10% slower so, on an H200
// (docs/adr/0008-attention.md).
//
// Accumulators are as in xla_ops/cc/device/wgmma.cuh: a thread has two rows of
// a warp's sixteen, which it shares with the other three lanes of its quad.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_MAINLOOP_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_MAINLOOP_CUH_

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_epilogue.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_scheduler.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_shape.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

// Ping-pong: consumer i starts its products after consumer i - 1, the first one
// after the last. Barrier 1 + i is consumer i's.
template <typename Shape>
__device__ __forceinline__ void PingPongWait(int consumer) {
  if constexpr (Shape::kPingPong) SyncNamed(1 + consumer, 256);
}

template <typename Shape>
__device__ __forceinline__ void PingPongPass(int consumer) {
  if constexpr (Shape::kPingPong) {
    ArriveNamed(1 + (consumer + 1) % Shape::kConsumers, 256);
  }
}

// Starts scores = Q K^T of the warpgroup's rows.
template <typename T, typename Shape>
__device__ __forceinline__ void StartScores(
    uint32_t query, uint32_t key, float (&scores)[Shape::kTokens / 2]) {
  const uint64_t query_layout = DescriptorLayout(kAtomBytes, 16);
  const uint64_t key_layout = DescriptorLayout(Shape::kAtomStride, 16);
  FenceRegisters(scores);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kPanels * 4; ++k) {
    const int panel = k / 4;
    const int step = k % 4 * 32;  // 16 columns within the panel
    WgmmaSS<T>(
        scores,
        DescriptorAt(query_layout,
                     query + panel * Shape::kRows * kPanelRowBytes + step),
        DescriptorAt(key_layout, key + panel * Shape::kPanelStride + step),
        k > 0);
  }
  WgmmaCommit();
}

// Starts out += weights V.
template <typename T, typename Shape, int kOut>
__device__ __forceinline__ void StartOutput(
    uint32_t (&weights)[Shape::kTokens / 16][4], uint32_t value,
    float (&out)[kOut]) {
  const uint64_t layout =
      DescriptorLayout(Shape::kAtomStride, Shape::kPanelStride);
  FenceRegisters(out);
  FenceRegisters(weights);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kTokens / 16; ++k) {
    WgmmaRS<T>(out, weights[k],
               DescriptorAt(layout, value + k * 2 * Shape::kAtomStride), true);
  }
  WgmmaCommit();
}

// A consumer warpgroup.
template <typename T, int kHeadDim, typename Shape>
__device__ __forceinline__ void Consume(const AttentionArgs& args,
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
  if (consumer == Shape::kConsumers - 1) PingPongPass<Shape>(consumer);

  while (true) {
    Wait(&barriers.item_full[slot.stage], slot.parity);
    Sm90Item item = items[slot.stage];
    __syncwarp();
    // From here on a row is that of its split's results, which saves a
    // register.
    item.rows.token += item.split * args.num_tokens;
    if (elected) Arrive(&barriers.item_empty[slot.stage]);
    slot.Advance();
    if (item.rows.seq == Sm90Item::kNoMore) return;

    if (item.tile_begin == item.tile_end) {
      StoreZeros<T>(args, item, warp_row);
      continue;
    }

    int position[2];
    float slope[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + lane / 4 + 8 * i;
      position[i] = item.rows.Position(args, row);
      slope[i] = AlibiSlope(args, item.rows.seq,
                            item.rows.Row(args, item.kv_head, row).head);
    }
    // Of the warpgroup's first and last row.
    const int first_position = item.rows.Position(args, consumer * 64);
    const int last_position = item.rows.Position(args, consumer * 64 + 63);

    float max[2] = {-CUDART_INF_F, -CUDART_INF_F};
    float sum[2] = {0.0f, 0.0f};
    float scores[kTokens / 2];
    float rescale[2];
    uint32_t weights[kTokens / 16][4];
    const auto to_weights = [&](int tile, unsigned masked) {
      const int token = tile * kTokens;
      const int first = token + 2 * (lane % 4);  // of this thread's columns
      if (args.transform) {
        ScaleScores({args.scale, args.scale}, args.soft_cap, scores);
        if (args.alibi_slopes != nullptr) {
          AddAlibi(slope,
                   {static_cast<float>(position[0] - first),
                    static_cast<float>(position[1] - first)},
                   scores);
        }
      }
      if (masked != 0 || token + kTokens > item.rows.kv_len ||
          (args.window_right >= 0 &&
           token + kTokens - 1 > first_position + args.window_right) ||
          (args.window_left >= 0 && token < last_position - args.window_left)) {
        int begin[2];
        int end[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          begin[i] = -first;
          if (args.window_left >= 0) begin[i] += position[i] - args.window_left;
          end[i] = item.rows.kv_len;
          if (args.window_right >= 0) {
            end[i] = min(end[i], position[i] + args.window_right + 1);
          }
          end[i] -= first;
        }
        MaskScores(
            begin, end, [&](int c) { return (masked >> (c / 16) & 1) == 0; },
            scores);
      }
      UpdateSoftmax(factor, scores, max, sum, rescale);
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        PackWeights<T>(scores, k, weights[k]);
      }
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
    WgmmaWait<0>();
    FenceRegisters(scores);
    to_weights(item.tile_end - 1, release_key());
    pack_weights();

#pragma unroll 1
    for (int tile = item.tile_end - 2; tile >= item.tile_begin; --tile) {
      Wait(&barriers.key_full[key_ring.stage], key_ring.parity);
      PingPongWait<Shape>(consumer);
      start_scores();
      Wait(&barriers.value_full[value_ring.stage], value_ring.parity);
      StartOutput<T, Shape>(weights,
                            values + value_ring.stage * Shape::kTileBytes, out);
      PingPongPass<Shape>(consumer);
      WgmmaWait<1>();
      FenceRegisters(scores);
      to_weights(tile, release_key());
      WgmmaWait<0>();
      FenceRegisters(out);
      if (elected) Arrive(&barriers.value_empty[value_ring.stage]);
      value_ring.Advance();
      Rescale(rescale, out);
      pack_weights();
    }
    if (elected) Arrive(&barriers.query_empty);
    Wait(&barriers.value_full[value_ring.stage], value_ring.parity);
    StartOutput<T, Shape>(weights,
                          values + value_ring.stage * Shape::kTileBytes, out);
    WgmmaWait<0>();
    FenceRegisters(out);
    if (elected) Arrive(&barriers.value_empty[value_ring.stage]);
    value_ring.Advance();
    StoreOutput<T>(args, item, warp_row, factor, max, sum, out);
  }
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_MAINLOOP_CUH_
