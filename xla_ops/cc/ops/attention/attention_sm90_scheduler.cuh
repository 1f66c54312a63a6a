// The scheduler of the Hopper attention kernel (attention_sm90.cuh): the items
// of work that its blocks take from a counter.
//
// An item is a tile of packed query rows of one segment and KV head, with one
// split of the KV tiles that its rows see. Segments are those of
// attention_tiles.cuh: the rows before the first sequence, the sequences, the
// rows after the last.
//
// Order of items: sequence, KV head, tiles from the last to the first, so that
// blocks at work share K and V in the L2 cache. Where the last tiles of a
// sequence see the most, heads whose K and V fit in a part of that cache
// together are a section, whose items go tile by tile: the cheap tiles of all
// its heads come last, and so the blocks end at about the same time.
//
// The choice of this kernel keeps token and row numbers below kSm90MaxTokens,
// so that sums of two of them fit in 32 bits, and with them the number of
// items and of their splits.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_SCHEDULER_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_SCHEDULER_CUH_

#include <cstdint>

#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

struct Sm90Item {
  static constexpr int kNoSequence = -1;
  static constexpr int kNoMore = -2;

  QueryTile rows;  // rows.seq may be kNoMore
  int kv_head;
  int tile_begin;  // KV tiles [tile_begin, tile_end)
  int tile_end;
  int split;
  bool masked;  // some of its tokens lie in no block: masks says which
};

// Warp 0's walk over the segments, 32 at a time: what this lane's segment is,
// and how many items come before it.
struct Sm90Segments {
  int base = -32;  // segment of lane 0
  int items = 0;   // before lane 0's segment
  int num_seqs = 0;
  int query_start = 0, query_end = 0;  // rows
  int key_start = 0, key_end = 0;      // contiguous K rows
  int items_end = 0;  // up to and with this lane's, in the chunk

  __device__ __forceinline__ static int Tiles(int rows, int tile_rows) {
    return (rows + tile_rows - 1) / tile_rows;
  }

  // The next 32 segments; false past the last.
  __device__ __forceinline__ bool Advance(const AttentionArgs& args,
                                          int tile_rows) {
    const int lane = threadIdx.x % 32;
    items += __shfl_sync(kFullWarp, items_end, 31);
    const int query_before = __shfl_sync(kFullWarp, query_end, 31);
    const int key_before = __shfl_sync(kFullWarp, key_end, 31);
    base += 32;
    if (base >= num_seqs + 2) return false;
    const int segment = base + lane;
    query_end = args.num_tokens;
    if (segment <= num_seqs) {
      query_end = min(max(args.cu_seqlens_q[segment], 0), args.num_tokens);
    }
    key_end = 0;
    if (!args.paged && segment <= num_seqs) {
      key_end = min(max(args.cu_seqlens_k[segment], 0), args.max_kv_len);
    }
    // Starts and ends are running maxima, whatever the values.
    query_end = max(WarpRunningMax(query_end), query_before);
    key_end = max(WarpRunningMax(key_end), key_before);
    query_start = __shfl_up_sync(kFullWarp, query_end, 1);
    key_start = __shfl_up_sync(kFullWarp, key_end, 1);
    if (lane == 0) {
      query_start = query_before;
      key_start = key_before;
    }
    items_end =
        segment < num_seqs + 2 &&
                !IsFew(args, segment, num_seqs, query_end - query_start)
            ? Tiles((query_end - query_start) * args.group.value(), tile_rows) *
                  args.num_kv_heads
            : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, items_end, step);
      if (lane >= step) items_end += other;
    }
    return true;
  }
};

// How many KV heads of a sequence make up a section. K and V of a section are
// read again and again by the blocks at work on it.
__device__ __forceinline__ int SectionHeads(const AttentionArgs& args,
                                            int kv_len) {
  constexpr int64_t kSectionBytes = 8 << 20;
  const int64_t head_bytes = int64_t{kv_len} * args.head_dim * 4;
  int heads = 1;
  if (args.window_right < 0) return heads;
  while (2 * heads <= args.num_kv_heads &&
         2 * heads * head_bytes <= kSectionBytes) {
    heads *= 2;
  }
  return heads;
}

// Warp 0: takes the next item. All lanes return it.
template <typename Shape>
__device__ __forceinline__ Sm90Item NextItem(const AttentionArgs& args,
                                             Sm90Segments& segments) {
  const int lane = threadIdx.x % 32;
  unsigned taken = 0;
  if (lane == 0) taken = atomicAdd(args.next_item, 1u);
  taken = __shfl_sync(kFullWarp, taken, 0);
  Sm90Item item = {};
  // The splits of a tile are neighbours, so that they end at about the same
  // time.
  const int index = static_cast<int>(taken / args.num_splits);
  item.split = static_cast<int>(taken % args.num_splits);
  while (true) {
    const int behind = __shfl_sync(kFullWarp, segments.items_end, 31);
    if (index - segments.items < behind) break;
    if (!segments.Advance(args, Shape::kRows)) {
      item.rows.seq = Sm90Item::kNoMore;
      return item;
    }
  }
  const int local = index - segments.items;
  const unsigned later = __ballot_sync(kFullWarp, local < segments.items_end);
  const int owner = __ffs(later) - 1;
  const int end = __shfl_sync(kFullWarp, segments.items_end, owner);
  const int query_start = __shfl_sync(kFullWarp, segments.query_start, owner);
  const int query_end = __shfl_sync(kFullWarp, segments.query_end, owner);
  const int key_start = __shfl_sync(kFullWarp, segments.key_start, owner);
  const int key_end = __shfl_sync(kFullWarp, segments.key_end, owner);
  const int segment = segments.base + owner;
  const int rows = (query_end - query_start) * args.group.value();
  const int tiles = Sm90Segments::Tiles(rows, Shape::kRows);
  const int seq = segment >= 1 && segment <= segments.num_seqs
                      ? segment - 1
                      : Sm90Item::kNoSequence;
  if (seq >= 0) {
    item.rows.seq = seq;
    const int used = args.seqused_k == nullptr ? 0 : args.seqused_k[seq];
    SetKeys(args, used, key_start, key_end, item.rows);
  }
  // Counted from the segment's end: the first item is its last tile.
  const int left = end - 1 - local;
  const int section_heads = SectionHeads(args, item.rows.kv_len);
  const int section = left / (tiles * section_heads);
  const int in_section = left - section * tiles * section_heads;
  // The last section may hold fewer.
  const int heads =
      min(section_heads, args.num_kv_heads - section * section_heads);
  const int tile = in_section / heads;
  item.kv_head = args.num_kv_heads - 1 - section * section_heads -
                 (in_section - tile * heads);
  SetRows<Shape::kRows>(args, query_start, query_end, tile * Shape::kRows, seq,
                        item.rows);
  const TokenRange visible =
      VisibleTokens(args, item.rows.kv_len, item.rows.Position(args, 0),
                    item.rows.Position(args, item.rows.num_rows - 1));
  const TokenRange kv_tiles = TilesOf<Shape::kTokens>(visible);
  const TokenRange split =
      SplitRange(kv_tiles.end - kv_tiles.begin, args.num_splits, item.split);
  item.tile_begin = kv_tiles.begin + split.begin;
  item.tile_end = kv_tiles.begin + split.end;
  return item;
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_SCHEDULER_CUH_
