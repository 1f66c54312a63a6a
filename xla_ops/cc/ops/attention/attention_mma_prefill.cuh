// Prefill on tensor cores by mma.sync, for fp16 and bf16 from compute
// capability 8.0 on. Online softmax as in FlashAttention-2 (Dao, 2023,
// https://arxiv.org/abs/2307.08691), query heads packed by KV head, KV tokens
// gathered through the block table by 16-byte asynchronous copies.
//
// A block of four warps works on one query tile, one KV head and one split of
// the KV tokens, a tile of 48 or 64 tokens at a time. Two shapes (MmaTileRows
// in attention_choice.h says which):
//   128 rows  32 a warp, two products' worth: a piece of K or V that a warp
//             reads from shared memory serves both. Not for head_dim 256, where
//             the results of so many rows do not fit in registers.
//   64 rows   16 a warp, for short sequences and calls of few tiles
// With one stage, V of a tile arrives while K is multiplied, K of the next
// while V is; with two, a whole tile ahead of its use, and a barrier less: the
// compiler then moves a part of the softmax among the products with V.
//
// Alignment: query, key, value and strides to 16 bytes, checked by the
// launcher.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_PREFILL_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_PREFILL_CUH_

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/ops/attention/attention_mma_prefill_tile.cuh"
#include "xla_ops/cc/ops/attention/attention_mma_tile.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_MMA

// Each warp holds complete rows: write them from registers.
template <typename T, bool kFp8, int kHeadDim>
__device__ __forceinline__ void StoreRows(const AttentionArgs& args,
                                          const QueryTile& tile, int first_row,
                                          int kv_head, int64_t split_start,
                                          float value_scale,
                                          const MmaAccumulator<kHeadDim>& acc) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    if (row >= tile.num_rows) continue;
    const QueryRow query_row = tile.Row(args, kv_head, row);
    const int64_t out_row = query_row.Index(args);
    const int64_t partial_row = split_start + out_row;
    const float factor =
        value_scale * EndOrSplitRow(args, query_row, partial_row, acc.max[i],
                                    acc.sum[i], lane % 4 == 0);
#pragma unroll
    for (int pair = 0; pair < kHeadDim / 8; ++pair) {
      const int column = OutColumn<kFp8>(pair);
      if (column >= args.head_dim) break;
      const float2 out = OutPair<kFp8>(acc.out, pair, i);
      StorePair<T, kFp8>(args, args.partial_out != nullptr, out_row,
                         partial_row, column, out.x * factor, out.y * factor);
    }
  }
}

#endif  // XLA_OPS_HAS_MMA

// T is the tensor cores' operand type: query's, or __half with 8-bit keys
// and values (kFp8). Grid: x query tiles of a section of KV heads, the heads of
// a tile side by side, y sections, z splits.
template <typename T, bool kFp8, int kHeadDim, int kRows>
__global__ void __launch_bounds__(
    MmaPrefillShape<kFp8, kHeadDim, kRows>::kThreads,
    MmaPrefillShape<kFp8, kHeadDim, kRows>::kMinBlocks)
    AttentionMmaPrefillKernel(const __grid_constant__ AttentionArgs args) {
#if XLA_OPS_HAS_MMA
  using Shape = MmaPrefillShape<kFp8, kHeadDim, kRows>;
  constexpr int kTileTokens = Shape::kTileTokens;
  constexpr int kLoadTokens = Shape::kLoadTokens;
  constexpr int kRowTiles = Shape::kRowTiles;
  constexpr int kKvSize = kFp8 ? 1 : 2;
  constexpr bool kTwoStages = Shape::kStages == 2;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ TileSearch search;
  __shared__ TileRow rows[Shape::kTileRows];
  __shared__ float row_scale[kFp8 ? Shape::kTileRows : 1];
  __shared__ TokenBits<Shape::kWarps, kLoadTokens> exist_bits[Shape::kStages];

  // Sections of heads (LaunchSections); the first one may not be full. Last
  // tiles first: under a causal mask they have the most to do.
  const unsigned section = args.section_heads;
  const int kv_head = static_cast<int>((gridDim.y - 1 - blockIdx.y) * section +
                                       blockIdx.x % section);
  if (kv_head >= args.num_kv_heads) return;
  QueryTile tile;
  if (!FindQueryTile<Shape::kTileRows, Shape::kWarps>(
          args, static_cast<int>((gridDim.x - 1 - blockIdx.x) / section),
          search, &tile)) {
    return;
  }
  const int64_t split_start =
      int64_t{blockIdx.z} * args.num_tokens * args.num_heads;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const TokenRange visible =
      VisibleTokens(args, tile.kv_len, tile.Position(args, 0),
                    tile.Position(args, tile.num_rows - 1));
  const TokenRange tiles = TilesOf<kTileTokens>(visible);
  const TokenRange split =
      SplitRange(tiles.end - tiles.begin, args.num_splits, blockIdx.z);
  if (args.num_splits > 1 && split.begin == split.end) {
    StoreEmptySplit(args, tile, kv_head, split_start);
    return;
  }
  int t = tiles.begin + split.begin;
  const int t_end = tiles.begin + split.end;

  const int32_t* table = args.block_table + max(tile.seq, 0) * args.max_blocks;
  // Aligned to a row, as TileStep wants it.
  const uint32_t query_tile = (SharedAddress(shared) + Shape::kAlign - 1) /
                              Shape::kAlign * Shape::kAlign;
  const uint32_t key_tile = query_tile + Shape::kQueryBytes;
  const uint32_t value_tile = key_tile + Shape::kTileBytes;
  // This lane's token in a tile, as CopyTokenLines wants it.
  const int load_row = kLoadTokens * warp;
  const int load_token = load_row + lane % kLoadTokens;
  // Tiles behind the last one are asked for too, and found to be empty.
  const auto find = [&](uint32_t index) {
    return FindToken(args, tile, table, visible,
                     index * kTileTokens + load_token);
  };

  int64_t offset = -1;  // in bytes, of what was copied last
  const auto copy = [&](const void* cache, uint32_t target, int stage) {
    CopyTokenLines<Shape::kKvColumns, kLoadTokens>(
        static_cast<const uint8_t*>(cache), target + stage * Shape::kStageBytes,
        load_row, offset, args.head_dim * kKvSize);
  };
  const auto copy_keys = [&](const TokenPlace& place, int stage) {
    offset = TokenOffset(args, place, kv_head) * kKvSize;
    exist_bits[stage].Set(warp, __ballot_sync(kFullWarp, offset >= 0));
    copy(args.key, key_tile, stage);
  };
  const auto copy_values = [&](int stage) {
    copy(args.value, value_tile, stage);
  };

  // Started first, for the copies wait for the block ids.
  const TokenPlace first = find(t);
  TokenPlace place = find(t + 1);
  if constexpr (!kFp8) {
    CopyQuery<T, kHeadDim, Shape::kTileRows>(args, tile, kv_head, query_tile);
  }
  copy_keys(first, 0);
  if constexpr (kTwoStages) copy_values(0);
  CommitCopies();
  if constexpr (kFp8) {
    StoreQuery<kHeadDim, Shape::kTileRows>(
        args, tile, kv_head, shared + (query_tile - SharedAddress(shared)),
        row_scale);
  }
  for (int i = threadIdx.x; i < Shape::kTileRows; i += Shape::kThreads) {
    // Rows past the end see what the last one does.
    const int row = min(i, tile.num_rows - 1);
    const int position = tile.Position(args, row);
    rows[i] = {VisibleTokens(args, tile.kv_len, position, position), position,
               AlibiSlope(args, tile.seq, tile.Row(args, kv_head, row).head)};
  }
  WaitForCopies();
  __syncthreads();

  const int warp_row = 16 * kRowTiles * warp;
  const QueryRows<kHeadDim, Shape::kQueryInRegisters, kRowTiles> query(
      query_tile, warp_row);
  const TileRow* lane_rows = rows + warp_row + lane / 4;
  const TileRow& first_row = rows[warp_row];
  const TileRow& last_row = rows[warp_row + 16 * kRowTiles - 1];
  // A warp all of whose rows lie past the end only loads for the others.
  const bool has_rows = warp_row < tile.num_rows;
  // With logits that are scores times a positive factor, one factor serves
  // exp2 and the end, and tiles without a mask need nothing else.
  const bool transform = kFp8 || args.transform;
  const float factor = transform ? 1.0f : args.scale;

  MmaAccumulator<kHeadDim> acc[kRowTiles];
#pragma unroll
  for (auto& rows : acc) rows.Clear();
  int stage = 0;
  for (; t < t_end; ++t) {
    WaitForCopies();
    // K is here, with two stages V too; and the other tile or stage is free.
    __syncthreads();
    if constexpr (!kTwoStages) {
      copy_values(0);
    } else if (t + 1 < t_end) {
      copy_keys(place, stage ^ 1);
      copy_values(stage ^ 1);
      place = find(t + 2);  // a tile ahead of its use
    }
    CommitCopies();
    const TokenBits<Shape::kWarps, kLoadTokens>& exist = exist_bits[stage];
    const uint32_t keys = key_tile + stage * Shape::kStageBytes;
    const uint32_t values = value_tile + stage * Shape::kStageBytes;
    if constexpr (kTwoStages) stage ^= 1;
    const int token = t * kTileTokens;
    // Whether some row of the warp sees some token.
    const bool active = has_rows && token < last_row.visible.end &&
                        token > first_row.visible.begin - kTileTokens;
    uint32_t weights[kRowTiles][kTileTokens / 16][4];
    if (active) {
      float scores[kRowTiles][kTileTokens / 8][4];
#pragma unroll
      for (auto& rows : scores) {
#pragma unroll
        for (float& score : Flat(rows)) score = 0.0f;
      }
      if constexpr (!kFp8) {
        MultiplyKeyTile<T, kHeadDim, kTileTokens>(query, keys, scores);
      } else if (args.e5m2) {
        MultiplyKeyTileFp8<__NV_E5M2, kHeadDim, kTileTokens>(query, keys,
                                                             scores);
      } else {
        MultiplyKeyTileFp8<__NV_E4M3, kHeadDim, kTileTokens>(query, keys,
                                                             scores);
      }
      // Unless every row sees every token.
      const bool masked = !exist.All() || token < last_row.visible.begin ||
                          token > first_row.visible.end - kTileTokens;
      if (transform || masked) {
        const uint64_t bits = exist.Get();
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const TileRow* some_rows = lane_rows + 16 * m;
          if (transform) {
            float scale[2] = {args.scale, args.scale};
            if constexpr (kFp8) {
              const float key_scale = KvScale<0>(args, tile.seq, kv_head);
              const int row = warp_row + 16 * m + lane / 4;
              scale[0] *= key_scale * row_scale[row];
              scale[1] *= key_scale * row_scale[row + 8];
            }
            FinishScores(args, scale, some_rows, token, Flat(scores[m]));
          }
          if (masked) MaskTokens(some_rows, token, bits, Flat(scores[m]));
        }
      }
      float rescale[kRowTiles][2];
      bool rescales = false;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        rescales |= UpdateSoftmaxLazily(factor, Flat(scores[m]), acc[m].max,
                                        acc[m].sum, rescale[m]);
        PackAll<T>(scores[m], weights[m]);
      }
      if (rescales) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          Rescale(rescale[m], Flat(acc[m].out));
        }
      }
    }
    if constexpr (kTwoStages) {
      if (!active) continue;
    } else {
      WaitForCopies();
      __syncthreads();  // V is here, and K's tile is free
      if (t + 1 < t_end) {
        copy_keys(place, 0);
        CommitCopies();
        place = find(t + 2);
      }
    }
    if (active) {
      if constexpr (!kFp8) {
        MultiplyValueTile<T, kHeadDim, kTileTokens>(weights, values, acc);
      } else if (args.e5m2) {
        MultiplyValueTileFp8<__NV_E5M2, kHeadDim, kTileTokens>(weights, values,
                                                               acc);
      } else {
        MultiplyValueTileFp8<__NV_E4M3, kHeadDim, kTileTokens>(weights, values,
                                                               acc);
      }
    }
  }

  // The one that combines splits; sooner, it would take room from others.
  LetNextKernelStart();
  const float value_scale = kFp8 ? KvScale<1>(args, tile.seq, kv_head) : 1.0f;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      acc[m].max[i] *= factor;
      acc[m].sum[i] = QuadSum(acc[m].sum[i]);
    }
    StoreRows<T, kFp8>(args, tile, warp_row + 16 * m, kv_head, split_start,
                       value_scale, acc[m]);
  }
#endif  // XLA_OPS_HAS_MMA
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_PREFILL_CUH_
