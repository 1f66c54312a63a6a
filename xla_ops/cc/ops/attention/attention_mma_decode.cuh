// Decode on tensor cores by mma.sync, for fp16 and bf16 from compute
// capability 8.0 on: few query rows a sequence, so that time is that of the
// bytes of K and V. Online softmax as in FlashAttention-2 (Dao, 2023,
// https://arxiv.org/abs/2307.08691), query heads packed by KV head, KV tokens
// gathered through the block table by 16-byte asynchronous copies.
//
// A block of four warps works on one tile of 16 query rows, one KV head and one
// split of the KV tokens, 64 or 128 tokens at a time. Each warp takes a quarter
// of them and keeps its own softmax, merged at the end. A warp then reads only
// what it loaded itself: no block barrier. A ring of two or three tiles (K, V,
// K, V, ...) keeps 8 to 16 KB a warp on the way, which is what hides memory's
// latency where there are few blocks. A block in a cluster, of which a
// multiprocessor has three at most, has a longer one.
//
// Alignment: query, key, value and strides to 16 bytes, checked by the
// launcher.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_DECODE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_DECODE_CUH_

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/cluster.cuh"
#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/ops/attention/attention_mma_tile.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_share.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// What a kernel for decode is made for.
enum class DecodeForm {
  kPlain,
  kSlots,    // sequences may be long: they are shared out (attention_share.h)
  kCluster,  // the splits of a tile are a cluster
  kShort,    // the same of few 8-bit tokens: smaller tiles, for more blocks
};

// kFp8: 8-bit keys and values. kHeadDim is the padded head_dim: 64, 128 or
// 256.
template <bool kFp8, int kHeadDim, DecodeForm kForm>
struct MmaDecodeShape {
  static constexpr bool kInCluster =
      kForm == DecodeForm::kCluster || kForm == DecodeForm::kShort;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileRows = 16;
  static constexpr int kTileTokens = kForm == DecodeForm::kShort
                                         ? kShortTileTokens
                                         : DecodeTileTokens(kFp8, kHeadDim);
  static constexpr int kWarpTokens = kTileTokens / kWarps;
  // Shared memory: the query tile, then a ring of K and V tiles.
  static constexpr int kQueryBytes = kTileRows * kHeadDim * 2;
  static constexpr int kKvColumns = kFp8 ? kHeadDim / 2 : kHeadDim;
  static constexpr int kTileBytes = kTileTokens * kKvColumns * 2;
  // Of a cluster's blocks three have to find room on a multiprocessor.
  static constexpr int kSlots = kInCluster ? std::min(8, 64 * 1024 / kTileBytes)
                                           : (kHeadDim <= 128 ? 3 : 2);
  // Tiles ahead whose keys are asked for.
  static constexpr int kAhead = kSlots / 2;
  // The warps' accumulators, merged through the same memory; rows are padded
  // by 32 bytes to spread them over the banks.
  static constexpr int kMergeStride = kHeadDim + 8;
  static constexpr int kMergeBytes = kWarps * 16 * kMergeStride * 4;
  static constexpr int kCopyBytes = kQueryBytes + kSlots * kTileBytes;
  static constexpr int kSharedBytes =
      kCopyBytes > kMergeBytes ? kCopyBytes : kMergeBytes;
  // A block has 99 KB on the smaller GPUs of a generation (8.6, 8.9, 12.0).
  static_assert(kSharedBytes <= 97 * 1024);
  // Blocks that a multiprocessor should hold, which bounds registers; the
  // numbers are the largest that do not spill inside the loop. Query fragments
  // are read for every tile: decode waits for memory, and gains from blocks.
  static constexpr int kMinBlocks = kHeadDim <= 128 && !kInCluster ? 4 : 2;
};

#if XLA_OPS_HAS_CLUSTERS

// The blocks of a cluster have a split each of the same rows. Each ends its
// share of the columns of all rows, reading what the others hold.
template <typename T, bool kFp8, int kHeadDim, DecodeForm kForm>
__device__ __forceinline__ void StoreRowsOfCluster(
    const AttentionArgs& args, const QueryTile& tile, int kv_head,
    float value_scale, float* shared, const float (*warp_max)[16],
    const float (*warp_sum)[16]) {
  using Shape = MmaDecodeShape<kFp8, kHeadDim, kForm>;
  constexpr int kStride = Shape::kMergeStride;
  constexpr int kPairs = kHeadDim / 2;
  __shared__ float2 softmax[16];  // of this block's rows: maximum, sum
  __shared__ float weights[16][kMaxClusterSplits];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int row = warp; row < tile.num_rows; row += Shape::kWarps) {
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
    if (lane == 0) softmax[row] = make_float2(max, sum);
    float* const columns = shared + row * kStride;
    for (int column = 2 * lane; column < kHeadDim; column += 64) {
      float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        const float2 part = *reinterpret_cast<const float2*>(
            columns + w * 16 * kStride + column);
        total.x += part.x;
        total.y += part.y;
      }
      *reinterpret_cast<float2*>(columns + column) = total;
    }
  }
  SyncCluster();
  const int ranks = ClusterRanks();
  const int rank = ClusterRank();
  for (int row = warp; row < tile.num_rows; row += Shape::kWarps) {
    float2 part = make_float2(-CUDART_INF_F, 0.0f);
    if (lane < ranks) {
      part = LoadPairFromCluster(MapToRank(SharedAddress(softmax + row), lane));
    }
    const float max = WarpMax(part.x);
    const float weight = Exp2(part.x - FiniteMax(max));
    const float sum = WarpSum(part.y * weight);
    const QueryRow query_row = tile.Row(args, kv_head, row);
    const SoftmaxEnd end = EndRowSoftmax(args, query_row.head, max, sum);
    if (rank == 0 && lane == 0) StoreLse(args, query_row, end.lse);
    if (lane < ranks) weights[row][lane] = weight * end.factor * value_scale;
  }
  __syncthreads();
  // Four lanes a pair of columns, each of which takes every fourth block's.
  const int pairs = tile.num_rows * kPairs;
  const int share = (pairs + ranks - 1) / ranks;
  const int first = rank * share;
  const int end = min(first + share, pairs);
  const uint32_t address = SharedAddress(shared);
  for (int base = first; base < end; base += Shape::kThreads / 4) {
    const int pair = base + static_cast<int>(threadIdx.x) / 4;
    const int row = min(pair, pairs - 1) / kPairs;
    const int column = 2 * (pair % kPairs);
    const uint32_t source = address + (row * kStride + column) * 4;
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kMaxClusterSplits / 4; ++i) {
      const int other = 4 * i + lane % 4;
      if (other >= ranks) continue;
      const float2 part = LoadPairFromCluster(MapToRank(source, other));
      const float weight = weights[row][other];
      total.x += part.x * weight;
      total.y += part.y * weight;
    }
    total.x = QuadSum(total.x);
    total.y = QuadSum(total.y);
    if (lane % 4 == 0 && pair < end && column < args.head_dim) {
      StorePair<T, kFp8>(args, false, tile.Row(args, kv_head, row).Index(args),
                         0, column, total.x, total.y);
    }
  }
  SyncCluster();  // others read this block's shared memory until then
}

#endif  // XLA_OPS_HAS_CLUSTERS

#if XLA_OPS_HAS_MMA

// Adds up what the warps of a block hold of its rows, and writes it.
// `slot`: of the partial results, with slots; -1 for a tile that is not cut.
template <typename T, bool kFp8, int kHeadDim, DecodeForm kForm>
__device__ __forceinline__ void StoreRowsOfBlock(
    const AttentionArgs& args, const QueryTile& tile, int kv_head,
    int64_t split_start, int slot, float value_scale, const float* shared,
    const float (*warp_max)[16], const float (*warp_sum)[16]) {
  using Shape = MmaDecodeShape<kFp8, kHeadDim, kForm>;
  constexpr bool kSlots = kForm == DecodeForm::kSlots;
  constexpr int kStride = Shape::kMergeStride;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
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
    const QueryRow query_row = tile.Row(args, kv_head, row);
    const int64_t out_row = query_row.Index(args);
    const bool partial = kSlots ? slot >= 0 : args.partial_out != nullptr;
    const int64_t partial_row =
        kSlots ? SlotRow(args, slot, kv_head, row) : split_start + out_row;
    float factor = value_scale;
    if (partial) {
      StorePartial(args, partial_row, max, sum, lane == 0);
    } else {
      factor *= EndRow(args, query_row, max, sum);
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
      StorePair<T, kFp8>(args, partial, out_row, partial_row, column,
                         total.x * factor, total.y * factor);
    }
  }
}

// Each warp holds a part of the tokens of the same 16 rows: bring them to
// one maximum, add them up through shared memory, and write.
template <typename T, bool kFp8, int kHeadDim, DecodeForm kForm>
__device__ __forceinline__ void MergeAndStoreRows(
    const AttentionArgs& args, const QueryTile& tile, int kv_head,
    int64_t split_start, int slot, float value_scale, float* shared,
    const MmaAccumulator<kHeadDim>& acc) {
  using Shape = MmaDecodeShape<kFp8, kHeadDim, kForm>;
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
    for (int pair = 0; pair < kHeadDim / 8; ++pair) {
      const float2 out = OutPair<kFp8>(acc.out, pair, i);
      *reinterpret_cast<float2*>(shared + (warp * 16 + row) * kStride +
                                 OutColumn<kFp8>(pair)) =
          make_float2(out.x * rescale, out.y * rescale);
    }
  }
  __syncthreads();
  if constexpr (Shape::kInCluster) {
#if XLA_OPS_HAS_CLUSTERS
    StoreRowsOfCluster<T, kFp8, kHeadDim, kForm>(
        args, tile, kv_head, value_scale, shared, warp_max, warp_sum);
#endif
  } else {
    StoreRowsOfBlock<T, kFp8, kHeadDim, kForm>(args, tile, kv_head, split_start,
                                               slot, value_scale, shared,
                                               warp_max, warp_sum);
  }
}

// The ring of K and V tiles: where the next tile goes, or is.
template <typename Shape>
__device__ __forceinline__ uint32_t NextSlot(uint32_t slot) {
  const uint32_t next = slot + Shape::kTileBytes;
  return next == Shape::kSlots * Shape::kTileBytes ? 0 : next;
}

// For blocks with nothing to do. That a kernel has ended has to mean that those
// before it have, which one block sees to.
__device__ __forceinline__ void WaitForAll() {
  if ((blockIdx.x | blockIdx.y | blockIdx.z) == 0) WaitForPreviousKernel();
}

template <typename T, bool kFp8, int kHeadDim, DecodeForm kForm>
__device__ __forceinline__ void Decode(const AttentionArgs& args) {
  using Shape = MmaDecodeShape<kFp8, kHeadDim, kForm>;
  constexpr bool kSlots = kForm == DecodeForm::kSlots;
  constexpr int kTileTokens = Shape::kTileTokens;
  constexpr int kWarpTokens = Shape::kWarpTokens;
  constexpr int kKvSize = kFp8 ? 1 : 2;
  constexpr bool kOddSlots = Shape::kSlots % 2 == 1;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ TileSearch search;
  __shared__ TileRow rows[Shape::kTileRows];
  __shared__ float row_scale[kFp8 ? Shape::kTileRows : 1];

  // Last tiles first: under a causal mask they have the most to do.
  const int tile_index = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  QueryTile tile;
  int kv_head = blockIdx.y;
  int piece = blockIdx.z;
  int pieces = args.num_splits;
  int* slot_of_item = nullptr;
  if constexpr (kSlots) {
    static_assert(Shape::kTileRows == kDecodeRows);
    static_assert(Shape::kWarps == kShareWarps);
    __shared__ ShareSearch share;
    slot_of_item = &share.item.slot;
    if (threadIdx.x == 0) share.item.slot = -1;
    // Asked for before the tile is looked for, and looked at behind it.
    const int longest = LongestOfThread(args);
    bool found = false;
    if (kv_head < args.num_kv_heads) {
      found = FindQueryTile<Shape::kTileRows, Shape::kWarps>(args, tile_index,
                                                             search, &tile);
    }
    if (__builtin_expect(AnyLong(longest), 0)) {
      const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
      const unsigned item = block / args.num_kv_heads;
      kv_head = static_cast<int>(block - item * args.num_kv_heads);
      found = FindItem(args, static_cast<int>(item), false, share, search.tile);
      tile = search.tile;
      piece = share.item.piece;
      pieces = share.item.pieces;
    }
    if (!found) return WaitForAll();
  } else if (!FindQueryTile<Shape::kTileRows, Shape::kWarps>(args, tile_index,
                                                             search, &tile)) {
    return WaitForAll();
  }
  const int64_t split_start =
      int64_t{blockIdx.z} * args.num_tokens * args.num_heads;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const TokenRange visible =
      VisibleTokens(args, tile.kv_len, tile.Position(args, 0),
                    tile.Position(args, tile.num_rows - 1));
  const TokenRange tiles = TilesOf<kTileTokens>(visible);
  const TokenRange split = SplitRange(tiles.end - tiles.begin, pieces, piece);
  if (kForm == DecodeForm::kPlain && args.num_splits > 1 &&
      split.begin == split.end) {
    StoreEmptySplit(args, tile, kv_head, split_start);
    return WaitForAll();
  }
  int t = tiles.begin + split.begin;
  const int t_end = tiles.begin + split.end;

  const uint8_t* keys = static_cast<const uint8_t*>(args.key);
  const uint8_t* values = static_cast<const uint8_t*>(args.value);
  const int32_t* table = args.block_table + max(tile.seq, 0) * args.max_blocks;
  const uint32_t query_tile = SharedAddress(shared);
  const uint32_t ring = query_tile + Shape::kQueryBytes;
  // This lane's token in a tile, as CopyTokens wants it.
  const int load_row = kWarpTokens * warp;
  const int load_token = load_row + lane % kWarpTokens;
  // Tiles ahead of the last one are asked for too, and found to be empty.
  const auto find = [&](uint32_t index) {
    return FindToken(args, tile, table, visible,
                     index * kTileTokens + load_token);
  };

  // Copies are started in the order in which the tiles are used, each as one
  // group, which is empty past the end.
  int copy_tile = t;
  uint32_t copy_slot = 0;
  int64_t offset = -1;
  uint32_t copy_valid[Shape::kAhead] = {};  // of the last tiles, in order
  const auto copy_keys = [&](const TokenPlace& place) {
#pragma unroll
    for (int i = 0; i + 1 < Shape::kAhead; ++i) {
      copy_valid[i] = copy_valid[i + 1];
    }
    if (copy_tile < t_end) {
      offset = TokenOffset(args, place, kv_head) * kKvSize;
      copy_valid[Shape::kAhead - 1] = __ballot_sync(kFullWarp, offset >= 0);
      CopyTokens<Shape::kKvColumns, kWarpTokens>(
          keys, ring + copy_slot, load_row, offset, args.head_dim * kKvSize);
    }
    CommitCopies();
    ++copy_tile;
    copy_slot = NextSlot<Shape>(copy_slot);
  };
  const auto copy_values = [&] {
    if (copy_tile <= t_end) {
      CopyTokens<Shape::kKvColumns, kWarpTokens>(
          values, ring + copy_slot, load_row, offset, args.head_dim * kKvSize);
    }
    CommitCopies();
    copy_slot = NextSlot<Shape>(copy_slot);
  };
  constexpr int kPending = Shape::kSlots - 1;
  const auto copy_next_keys = [&](TokenPlace& place) {
    copy_keys(place);
    place = find(copy_tile);  // a tile ahead of its use
  };

  // Started first, for the copies wait for the block ids.
  const TokenPlace first = find(t);
  TokenPlace place = find(t + 1);
  // Not asked for sooner: what the kernel before it reads would wait behind.
  WaitForPreviousKernel();
  if constexpr (!kFp8) {
    CopyQuery<T, kHeadDim, Shape::kTileRows>(args, tile, kv_head, query_tile);
  }
  copy_keys(first);
  uint32_t own_valid = copy_valid[Shape::kAhead - 1];
  copy_values();
#pragma unroll
  for (int i = 2; i < Shape::kSlots; ++i) {
    if (i % 2 == 0) {
      copy_next_keys(place);
    } else {
      copy_values();
    }
  }
  if constexpr (kFp8) {
    StoreQuery<kHeadDim, Shape::kTileRows>(args, tile, kv_head, shared,
                                           row_scale);
  }
  for (int i = threadIdx.x; i < Shape::kTileRows; i += Shape::kThreads) {
    // Rows past the end see what the last one does.
    const int row = min(i, tile.num_rows - 1);
    const int position = tile.Position(args, row);
    rows[i] = {VisibleTokens(args, tile.kv_len, position, position), position,
               AlibiSlope(args, tile.seq, tile.Row(args, kv_head, row).head)};
  }
  float scale[2] = {args.scale, args.scale};
  float value_scale = 1.0f;
  if constexpr (kFp8) {
    scale[0] *= KvScale<0>(args, tile.seq, kv_head);
    scale[1] = scale[0];
    value_scale = KvScale<1>(args, tile.seq, kv_head);
  }
  WaitForCopies<kPending>();
  __syncthreads();

  const int warp_token = kWarpTokens * warp;
  const QueryOperand<kHeadDim> query(query_tile, 0);
  const TileRow* lane_rows = rows + lane / 4;
  if constexpr (kFp8) {
    scale[0] *= row_scale[lane / 4];
    scale[1] *= row_scale[lane / 4 + 8];
  }
  // Tokens that all rows see.
  const TokenRange common = {rows[15].visible.begin, rows[0].visible.end};

  // The one that combines slots, which most calls have nothing in.
  if constexpr (kSlots) LetNextKernelStart();
  MmaAccumulator<kHeadDim> acc;
  acc.Clear();
  uint32_t slot = 0;
  for (; t < t_end; ++t) {
    WaitForCopies<kPending>();
    __syncwarp();  // K is here
    float scores[kWarpTokens / 8][4] = {};
    const uint32_t key_tile = ring + slot;
    if constexpr (!kFp8) {
      MultiplyKeys<T, kHeadDim, kWarpTokens>(query, key_tile, warp_token,
                                             scores);
    } else if (args.e5m2) {
      MultiplyKeysFp8<__NV_E5M2, kHeadDim, kWarpTokens>(query, key_tile,
                                                        warp_token, scores);
    } else {
      MultiplyKeysFp8<__NV_E4M3, kHeadDim, kWarpTokens>(query, key_tile,
                                                        warp_token, scores);
    }
    slot = NextSlot<Shape>(slot);
    __syncwarp();  // the K tile is free
    if constexpr (kOddSlots) {
      copy_values();
    } else {
      copy_next_keys(place);
    }
    // The last tile of the longest sequence may begin or end past 2^31 for
    // this warp; then it has no token, and what follows masks them all.
    const int token =
        static_cast<int>(static_cast<uint32_t>(t) * kTileTokens + warp_token);
    FinishScores(args, scale, lane_rows, token, Flat(scores));
    constexpr uint64_t kAllValid = ~uint64_t{0} >> (64 - kWarpTokens);
    const uint64_t valid = own_valid & kAllValid;
    if (valid != kAllValid || token < common.begin ||
        token > common.end - kWarpTokens) {
      MaskTokens(lane_rows, token, valid, Flat(scores));
    }
    float rescale[2];
    UpdateSoftmax(1.0f, Flat(scores), acc.max, acc.sum, rescale);
    Rescale(rescale, Flat(acc.out));
    WaitForCopies<kPending>();
    __syncwarp();  // V is here
    const uint32_t value_tile = ring + slot;
    if constexpr (!kFp8) {
      MultiplyValues<T, kHeadDim, kWarpTokens>(scores, value_tile, warp_token,
                                               acc.out);
    } else if (args.e5m2) {
      MultiplyValuesFp8<__NV_E5M2, kHeadDim, kWarpTokens>(scores, value_tile,
                                                          warp_token, acc.out);
    } else {
      MultiplyValuesFp8<__NV_E4M3, kHeadDim, kWarpTokens>(scores, value_tile,
                                                          warp_token, acc.out);
    }
    slot = NextSlot<Shape>(slot);
    __syncwarp();  // the V tile is free
    own_valid = copy_valid[0];
    if constexpr (kOddSlots) {
      copy_next_keys(place);
    } else {
      copy_values();
    }
  }

  // The one that combines splits; sooner, it would take room from others.
  if constexpr (kForm == DecodeForm::kPlain) LetNextKernelStart();
#pragma unroll
  for (float& sum : acc.sum) sum = QuadSum(sum);
  // With slots from shared memory: the loop needs the registers.
  MergeAndStoreRows<T, kFp8, kHeadDim, kForm>(
      args, kSlots ? search.tile : tile, kv_head, split_start,
      kSlots ? *slot_of_item : -1, value_scale,
      reinterpret_cast<float*>(shared), acc);
}

#endif  // XLA_OPS_HAS_MMA

// T is the tensor cores' operand type: query's, or __half with 8-bit keys
// and values (kFp8). Grid: x query tiles, y KV heads, z splits. With slots
// there is one split, and behind all KV heads enough blocks for an item a slot
// (attention_share.h), which have nothing to do where no sequence is long.
template <typename T, bool kFp8, int kHeadDim, DecodeForm kForm>
__global__ void __launch_bounds__(
    MmaDecodeShape<kFp8, kHeadDim, kForm>::kThreads,
    MmaDecodeShape<kFp8, kHeadDim, kForm>::kMinBlocks)
    AttentionMmaDecodeKernel(const __grid_constant__ AttentionArgs args) {
#if XLA_OPS_HAS_MMA
  using Shape = MmaDecodeShape<kFp8, kHeadDim, kForm>;
  if constexpr (!Shape::kInCluster || XLA_OPS_HAS_CLUSTERS) {
    Decode<T, kFp8, kHeadDim, kForm>(args);
  }
#endif  // XLA_OPS_HAS_MMA
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_DECODE_CUH_
