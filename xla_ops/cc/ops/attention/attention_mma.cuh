// Paged attention on tensor cores (mma.sync), for fp16 and bf16 from compute
// capability 8.0 on. Online softmax as in FlashAttention-2 (Dao, 2023,
// https://arxiv.org/abs/2307.08691), query heads packed by KV head, KV
// tokens gathered through the block table by 16-byte asynchronous copies.
//
// A block of four warps works on one query tile, one KV head and one split
// of the KV tokens, 64 tokens at a time. Two shapes:
//   kWarpsM = 4  64 query rows, 16 a warp; the warps share K and V tiles.
//   kWarpsM = 1  16 query rows (decode); each warp takes 16 of the 64 tokens
//                and keeps its own softmax, merged at the end. A warp then
//                reads only what it loaded itself: no block barrier.
// Shared memory: the query tile, one K tile and one V tile. V of a tile
// arrives while K is multiplied, K of the next while V is.
// Alignment: query, caches and strides to 16 bytes, checked by the launcher.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_CUH_

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/ops/attention/attention_mma_tile.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_MMA

// Writes two neighbouring elements of a finished row: to `out`, normalised,
// or to the split's partial result as they are.
template <typename T>
__device__ __forceinline__ void StorePair(const AttentionArgs& args,
                                          int64_t out_row, int64_t partial_row,
                                          int column, float x, float y,
                                          float sum) {
  if (args.partial_out != nullptr) {
    *reinterpret_cast<float2*>(args.partial_out + partial_row * args.head_dim +
                               column) = make_float2(x, y);
    return;
  }
  // Compared with zero exactly: a NaN sum has to reach the output.
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  *reinterpret_cast<uint32_t*>(static_cast<T*>(args.out) +
                               out_row * args.head_dim + column) =
      PackPair<T>(x * inverse, y * inverse);
}

// Each warp holds complete rows: write them from registers.
template <typename T, int kHeadDim>
__device__ __forceinline__ void StoreRows(const AttentionArgs& args,
                                          const QueryTile& tile, int first_row,
                                          int kv_head, int64_t split_start,
                                          const MmaAccumulator<kHeadDim>& acc) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    if (row >= tile.num_rows) continue;
    const int64_t out_row = tile.OutRow(args, kv_head, row);
    const int64_t partial_row = split_start + out_row;
    if (args.partial_out != nullptr && lane % 4 == 0) {
      args.partial_max[partial_row] = acc.max[i];
      args.partial_sum[partial_row] = acc.sum[i];
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      if (8 * n >= args.head_dim) break;
      StorePair<T>(args, out_row, partial_row, 8 * n + 2 * (lane % 4),
                   acc.out[n][2 * i], acc.out[n][2 * i + 1], acc.sum[i]);
    }
  }
}

// Each warp holds a part of the tokens of the same 16 rows: bring them to
// one maximum, add them up through shared memory, and write.
template <typename T, int kHeadDim>
__device__ __forceinline__ void MergeAndStoreRows(
    const AttentionArgs& args, const QueryTile& tile, int kv_head,
    int64_t split_start, float* shared, MmaAccumulator<kHeadDim>& acc) {
  using Shape = MmaShape<kHeadDim, 1>;
  constexpr int kStride = Shape::kMergeStride;
  __shared__ float warp_max[Shape::kWarps][16];
  __shared__ float warp_sum[Shape::kWarps][16];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (lane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      warp_max[warp][lane / 4 + 8 * i] = acc.max[i];
      warp_sum[warp][lane / 4 + 8 * i] = acc.sum[i];
    }
  }
  __syncthreads();  // also: every warp is done with the tiles
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    float max = warp_max[0][row];
#pragma unroll
    for (int w = 1; w < Shape::kWarps; ++w) {
      max = fmaxf(max, warp_max[w][row]);
    }
    const float rescale = Exp2(acc.max[i] - FiniteMax(max));
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(shared + (warp * 16 + row) * kStride + 8 * n +
                                 2 * (lane % 4)) =
          make_float2(acc.out[n][2 * i] * rescale,
                      acc.out[n][2 * i + 1] * rescale);
    }
  }
  __syncthreads();
  for (int row = warp; row < 16; row += Shape::kWarps) {
    if (row >= tile.num_rows) break;
    float max = warp_max[0][row];
#pragma unroll
    for (int w = 1; w < Shape::kWarps; ++w) {
      max = fmaxf(max, warp_max[w][row]);
    }
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      sum += warp_sum[w][row] * Exp2(warp_max[w][row] - FiniteMax(max));
    }
    const int64_t out_row = tile.OutRow(args, kv_head, row);
    const int64_t partial_row = split_start + out_row;
    if (args.partial_out != nullptr && lane == 0) {
      args.partial_max[partial_row] = max;
      args.partial_sum[partial_row] = sum;
    }
    for (int column = 2 * lane; column < args.head_dim; column += 64) {
      float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        const float2 part = *reinterpret_cast<const float2*>(
            shared + (w * 16 + row) * kStride + column);
        total.x += part.x;
        total.y += part.y;
      }
      StorePair<T>(args, out_row, partial_row, column, total.x, total.y, sum);
    }
  }
}

#endif  // XLA_OPS_HAS_MMA

// Grid: x query tiles, y KV heads, z splits.
template <typename T, int kHeadDim, int kWarpsM>
__global__ void __launch_bounds__(MmaShape<kHeadDim, kWarpsM>::kThreads,
                                  MmaShape<kHeadDim, kWarpsM>::kMinBlocks)
    AttentionMmaKernel(const __grid_constant__ AttentionArgs args) {
#if XLA_OPS_HAS_MMA
  using Shape = MmaShape<kHeadDim, kWarpsM>;
  constexpr int kTileTokens = Shape::kTileTokens;
  constexpr int kWarpTokens = Shape::kWarpTokens;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ TileSearch search;
  // Which of a tile's tokens exist, 16 bits from each warp that loads.
  __shared__ __align__(8) uint16_t shared_valid[Shape::kWarps];

  // Last tiles first: under a causal mask they have the most to do.
  const int64_t tile_index = int64_t{gridDim.x} - 1 - blockIdx.x;
  QueryTile tile;
  if (!FindQueryTile(args, Shape::kTileRows, tile_index, search, &tile)) {
    return;
  }
  const int kv_head = blockIdx.y;
  const int64_t split_start =
      int64_t{blockIdx.z} * args.num_tokens * args.num_heads;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warp_row = kWarpsM > 1 ? 16 * warp : 0;
  const int warp_token = kWarpsM > 1 ? 0 : kWarpTokens * warp;
  const uint32_t query_tile = SharedAddress(shared);
  const uint32_t key_tile = query_tile + Shape::kQueryBytes;
  const uint32_t value_tile = key_tile + Shape::kTileBytes;

  const int context = ContextLength(args, tile.seq);
  const TokenRange visible =
      VisibleTokens(args, context, tile.Position(args, context, 0),
                    tile.Position(args, context, tile.num_rows - 1));
  const int first_tile = visible.begin / kTileTokens;
  const int end_tile =
      visible.begin < visible.end
          ? static_cast<int>((int64_t{visible.end} + kTileTokens - 1) /
                             kTileTokens)
          : first_tile;
  const TokenRange split =
      SplitRange(end_tile - first_tile, args.num_splits, blockIdx.z);

  // The query tile; rows past the end and columns past head_dim are zero.
  const T* query = static_cast<const T*>(args.query);
  constexpr int kChunks = kHeadDim / kChunk;
  for (int i = threadIdx.x; i < Shape::kTileRows * kChunks;
       i += Shape::kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const bool valid = row < tile.num_rows && chunk * kChunk < args.head_dim;
    const T* source =
        valid ? query + tile.OutRow(args, kv_head, row) * args.head_dim +
                    chunk * kChunk
              : query;
    CopyAsync(TileAddress<kHeadDim>(query_tile, row, chunk), source, valid);
  }

  const T* keys = static_cast<const T*>(args.key_cache);
  const T* values = static_cast<const T*>(args.value_cache);
  const int32_t* table = args.block_tables + max(tile.seq, 0) * args.max_blocks;
  // This lane's token in a tile, as CopyTokens wants it.
  const int load_row = Shape::kLoadTokens * warp;
  const int load_token = load_row + lane % 16;
  int64_t offset = -1;
  uint32_t own_valid = 0;
  const auto copy_keys = [&](const TokenPlace& place) {
    offset = TokenOffset(args, place, kv_head);
    own_valid = __ballot_sync(kFullWarp, offset >= 0) & 0xffff;
    if (kWarpsM > 1 && lane == 0) shared_valid[warp] = own_valid;
    CopyTokens<T, kHeadDim>(keys, key_tile, load_row, offset, args.head_dim);
    CommitCopies();
  };
  // In the decode shape a warp reads only its own tokens.
  const auto sync = [] {
    if constexpr (kWarpsM > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  };

  MmaAccumulator<kHeadDim> acc;
  acc.Clear();
  int t = first_tile + split.begin;
  const int t_end = first_tile + split.end;
  if (t < t_end) {
    copy_keys(FindToken(args, table, visible, t * kTileTokens + load_token));
  }
  CommitCopies();
  WaitForCopies();
  __syncthreads();
  constexpr int kFragments = Shape::kQueryInRegisters ? kHeadDim / 16 : 1;
  uint32_t query_fragments[kFragments][4];
  if constexpr (Shape::kQueryInRegisters) {
#pragma unroll
    for (int k = 0; k < kFragments; ++k) {
      LoadQueryFragment<kHeadDim>(query_tile, warp_row, k, query_fragments[k]);
    }
  }

  // A warp all of whose rows lie past the end still loads for the others.
  const bool active = warp_row < tile.num_rows;
  const int position[2] = {
      static_cast<int>(tile.Position(args, context, warp_row + lane / 4)),
      static_cast<int>(tile.Position(args, context, warp_row + lane / 4 + 8))};
  // Of the warp's first and last row, for tiles that need no mask.
  const int first_position = __shfl_sync(kFullWarp, position[0], 0);
  const int last_position = __shfl_sync(kFullWarp, position[1], 31);

  for (; t < t_end; ++t) {
    TokenPlace next = {-1, 0};
    if (t + 1 < t_end) {
      next =
          FindToken(args, table, visible, (t + 1) * kTileTokens + load_token);
    }
    WaitForCopies();
    sync();  // K is here, and the V tile is free
    CopyTokens<T, kHeadDim>(values, value_tile, load_row, offset,
                            args.head_dim);
    CommitCopies();

    float scores[kWarpTokens / 8][4];
    if (active) {
      MultiplyKeys<T, kHeadDim, kWarpTokens>(
          query_fragments, query_tile, warp_row, key_tile, warp_token, scores);
      ScaleScores(args, scores);
      constexpr uint64_t kAllValid = ~uint64_t{0} >> (64 - kWarpTokens);
      const uint64_t valid =
          kWarpsM > 1 ? *reinterpret_cast<const uint64_t*>(shared_valid)
                      : uint64_t{own_valid};
      const int token = t * kTileTokens + warp_token;
      if (valid != kAllValid || token + kWarpTokens - 1 > first_position ||
          (args.sliding_window > 0 &&
           token <= last_position - args.sliding_window)) {
        MaskScores(args, token, valid, position, scores);
      }
      UpdateSoftmax(scores, acc);
    }
    WaitForCopies();
    sync();  // V is here, and the K tile is free
    if (t + 1 < t_end) copy_keys(next);
    if (active) {
      MultiplyValues<T, kHeadDim, kWarpTokens>(scores, value_tile, warp_token,
                                               acc.out);
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    acc.sum[i] += __shfl_xor_sync(kFullWarp, acc.sum[i], 1);
    acc.sum[i] += __shfl_xor_sync(kFullWarp, acc.sum[i], 2);
  }
  if constexpr (kWarpsM > 1) {
    StoreRows<T, kHeadDim>(args, tile, warp_row, kv_head, split_start, acc);
  } else {
    MergeAndStoreRows<T, kHeadDim>(args, tile, kv_head, split_start,
                                   reinterpret_cast<float*>(shared), acc);
  }
#endif  // XLA_OPS_HAS_MMA
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_CUH_
