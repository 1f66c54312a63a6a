// The consumers of the Hopper attention kernel (attention_sm90.cuh): the main
// loop over an item's KV tiles.
//
// Q K^T of a tile and P V of the one before are started together, as in
// FlashAttention-3, which has softmax run while P V does. Of a tile without a
// mask that is what stands before LaggingSoftmax's branch; ptxas 13.0 moves the
// rest behind the wait, and more of it, by force, loses
// (docs/adr/0008-attention.md). What overlaps in any case is one consumer's
// softmax with another's products.
//
// A consumer waits for its turn, and then starts sixteen products or more as
// fast as it can: so all that they need is in the warp's uniform registers, or
// ptxas computes it anew, by one move a product, when the turn has come.
//
// Accumulators are as in xla_ops/cc/device/wgmma.cuh: a thread has two rows of
// a warp's sixteen, which it shares with the other three lanes of its quad.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_MAINLOOP_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_MAINLOOP_CUH_

#include <math_constants.h>

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_epilogue.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_scheduler.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_shape.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

// Ping-pong: consumers take turns at the tensor cores, so that one's softmax
// runs under another's products. Consumer i starts its products after consumer
// i - 1, the first one after the last. Barrier 1 + i is consumer i's.
__device__ __forceinline__ void WaitForTurn(int consumer) {
  SyncNamed(1 + consumer, 256);
}

template <typename Shape>
__device__ __forceinline__ void PassTurn(int consumer) {
  ArriveNamed(1 + (consumer + 1) % Shape::kConsumers, 256);
}

// The tiles of which rows at positions `first` to `last` see all tokens.
template <int kTokens>
__device__ __forceinline__ TokenRange WholeTiles(const AttentionArgs& args,
                                                 const QueryTile& rows,
                                                 int first, int last) {
  int begin = 0;
  int end = rows.kv_len;
  if (args.window_left >= 0) begin = max(begin, last - args.window_left);
  if (args.window_right >= 0) end = min(end, first + args.window_right + 1);
  return {(begin + kTokens - 1) / kTokens, max(end, 0) / kTokens};
}

// Starts scores = Q K^T of the warpgroup's rows. `query` and `key` are
// descriptors.
template <typename T, typename Shape>
__device__ __forceinline__ void StartScores(
    uint64_t query, uint64_t key, float (&scores)[Shape::kTokens / 2]) {
  FenceRegisters(scores);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kPanels * 4; ++k) {
    const int panel = k / 4;
    const int step = k % 4 * 32;  // 16 columns within the panel
    WgmmaSS<T>(scores,
               Advance(query, panel * Shape::kRows * kPanelRowBytes + step),
               Advance(key, panel * Shape::kPanelStride + step), k > 0);
  }
  WgmmaCommit();
}

// Starts out += weights V. `value` is a descriptor.
template <typename T, typename Shape, int kOut>
__device__ __forceinline__ void StartOutput(
    uint32_t (&weights)[Shape::kTokens / 16][4], uint64_t value,
    float (&out)[kOut]) {
  FenceRegisters(out);
  FenceRegisters(weights);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kTokens / 16; ++k) {
    WgmmaRS<T>(out, weights[k], Advance(value, k * 2 * Shape::kAtomStride),
               true);
  }
  WgmmaCommit();
}

// A consumer warpgroup.
template <typename T, int kHeadDim, typename Shape>
__device__ __forceinline__ void Consume(
    const AttentionArgs& args, const Sm90Barriers<Shape::kStages>& barriers,
    const Sm90Item* items, const unsigned* masks, uint32_t query, uint32_t keys,
    uint32_t values) {
  constexpr int kStages = Shape::kStages;
  constexpr int kTokens = Shape::kTokens;
  // From one lane, so that the compiler knows it to be the warp's: descriptors
  // must be.
  const int consumer =
      __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 128), 0) - 1;
  const int lane = threadIdx.x % 32;
  const int warp_row = consumer * 64 + threadIdx.x % 128 / 32 * 16;
  const bool elected = lane == 0;
  const auto descriptor = [](uint32_t address, int atom_stride,
                             int panel_stride) {
    return DescriptorAt(DescriptorLayout(atom_stride, panel_stride),
                        __shfl_sync(kFullWarp, address, 0));
  };
  const uint64_t query_rows =
      descriptor(query + consumer * 64 * kPanelRowBytes, kAtomBytes, 16);
  const uint64_t first_keys = descriptor(keys, Shape::kAtomStride, 16);
  const uint64_t first_values =
      descriptor(values, Shape::kAtomStride, Shape::kPanelStride);
  const float factor = args.transform ? 1.0f : args.scale;

  Ring<2> slot;
  // Not one for both, values a stage behind: ptxas 13.0 then takes stages for
  // the threads' own, and moves every descriptor to uniform registers anew.
  Ring<kStages> key_ring;
  Ring<kStages> value_ring;
  int query_parity = 0;
  // The last consumer gives the first one its first turn.
  if (consumer == Shape::kConsumers - 1) PassTurn<Shape>(consumer);

  while (true) {
    Wait(barriers.item_full(slot.stage), slot.parity);
    Sm90Item item = items[slot.stage];
    __syncwarp();
    // From here on a row is that of its split's results, which saves a
    // register.
    item.rows.token += item.split * args.num_tokens;
    if (elected) Arrive(barriers.item_empty(slot.stage));
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
    const TokenRange whole = WholeTiles<kTokens>(
        args, item.rows, item.rows.Position(args, consumer * 64),
        item.rows.Position(args, consumer * 64 + 63));
    const int tile_begin = item.tile_begin;
    const bool any_plain = !args.transform && !item.masked;
    // Tiles [plain_begin, plain_end) are computed without masks.
    int plain_end =
        any_plain ? max(min(whole.end, item.tile_end), tile_begin) : tile_begin;
    const int plain_begin =
        any_plain ? max(whole.begin, tile_begin) : tile_begin;

    LaggingSoftmax softmax;
    float scores[kTokens / 2];
    float rescale[2];
    float out[kHeadDim / 2];
    uint32_t weights[kTokens / 16][4];
    int tile = item.tile_end - 1;
    const auto transform_and_mask = [&] {
      const int first =
          tile * kTokens + 2 * (lane % 4);  // this thread's column
      if (args.transform) {
        ScaleScores({args.scale, args.scale}, args.soft_cap, scores);
        if (args.alibi_slopes != nullptr) {
          AddAlibi(slope,
                   {static_cast<float>(position[0] - first),
                    static_cast<float>(position[1] - first)},
                   scores);
        }
      }
      // A bit for each 16 of the tile's tokens that lie in no block.
      const unsigned masked = item.masked ? masks[key_ring.stage] : 0;
      if (tile >= whole.begin && tile < whole.end && masked == 0) return;
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
    };
    bool rescales = true;
    const auto to_weights = [&] {
      rescales = softmax.Update(factor, scores, rescale);
    };
    const auto rescale_output = [&] {
      if (rescales) Rescale(rescale, out);
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        PackWeights<T>(scores, k, weights[k]);
      }
    };
    const auto wait_for_key = [&] {
      Wait(barriers.key_full(key_ring.stage), key_ring.parity);
    };
    const auto start_scores = [&] {
      // Zero, but not for the compiler, which else computes the descriptors of
      // all panels ahead of the loop, and at head_dim 256 spills them.
      const int zero = Shape::kPanels > 2 ? key_ring.stage >> 8 << 4 : 0;
      StartScores<T, Shape>(
          Advance(query_rows, zero),
          Advance(first_keys, key_ring.stage * Shape::kTileBytes), scores);
    };
    const auto release_key = [&] {
      __syncwarp();
      if (elected) Arrive(barriers.key_empty(key_ring.stage));
    };
    const auto next_tile = [&] {
      key_ring.Advance();
      --tile;
    };
    const auto start_output = [&] {
      StartOutput<T, Shape>(
          weights, Advance(first_values, value_ring.stage * Shape::kTileBytes),
          out);
    };
    const auto end_output = [&] {
      WgmmaWait<0>();
      FenceRegisters(out);
      if (elected) Arrive(barriers.value_empty(value_ring.stage));
      value_ring.Advance();
    };

    Wait(barriers.query_full(), query_parity);
    query_parity ^= 1;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
    wait_for_key();
    start_scores();
    WgmmaWait<0>();
    FenceRegisters(scores);
    transform_and_mask();
    release_key();
    to_weights();
    pack_weights();
    rescales = false;  // zeros
    next_tile();

    // Scores of `tile`, whose keys have arrived, and the output of the tile
    // before.
    const auto step = [&](auto is_plain) {
      wait_for_key();
      WaitForTurn(consumer);
      start_scores();
      rescale_output();
      Wait(barriers.value_full(value_ring.stage), value_ring.parity);
      start_output();
      PassTurn<Shape>(consumer);
      WgmmaWait<1>();
      FenceRegisters(scores);
      if constexpr (!decltype(is_plain)::value) transform_and_mask();
      release_key();
      to_weights();
      end_output();
      pack_weights();
      next_tile();
    };
    // Two loops, not one with a branch on masks, behind which ptxas moves all.
    while (true) {
#pragma unroll 1
      while (tile >= plain_end) step(std::false_type{});
#pragma unroll 1
      while (tile >= plain_begin) step(std::true_type{});
      if (tile < tile_begin) break;
      plain_end = tile_begin;
    }
    rescale_output();
    ArriveNamed(Shape::kQueryEmptyBarrier, Shape::kQueryEmptyThreads);
    Wait(barriers.value_full(value_ring.stage), value_ring.parity);
    start_output();
    end_output();
    StoreOutput<T>(args, item, warp_row, softmax, out);
  }
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_MAINLOOP_CUH_
