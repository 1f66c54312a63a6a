// The work of the Hopper attention kernel (attention_sm90.cuh): the shape of
// its tiles, its arguments, and the items that its blocks take from a counter.
//
// An item is a tile of packed query rows of one segment and KV head, with the
// KV tiles that its rows see. Segments are those of attention_tiles.cuh: the
// rows before the first sequence, the sequences, the rows after the last.
//
// Order of items: sequence, KV head, tiles from the last to the first, so that
// blocks at work share K and V in the L2 cache, and the cheap tiles of a
// causal mask come last.
//
// CanLaunchAttentionSm90 keeps token and row numbers below 2^30, so that sums
// of two of them fit in 32 bits, and with them the number of items.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_ITEMS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_ITEMS_CUH_

#include <cstdint>

#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/wgmma.cuh"

namespace xla_ops {

// kHeadDim is the padded head_dim: 64, 128 or 256. kAllPanelsInBox: a box of K
// or V holds all panels of its tokens, else one.
template <int kHeadDim, bool kAllPanelsInBox>
struct Sm90Shape {
  static constexpr bool kAllPanels = kAllPanelsInBox;
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kTokens = kHeadDim == 256 ? 80 : 128;  // of a KV tile
  static constexpr int kStages = kHeadDim == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Of a thread: 64 K registers in all.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static constexpr int kPanels = kHeadDim / 64;
  // The bytes in shared memory from 8 tokens of a K or V tile to the 8 below,
  // and from a panel to the one beside it.
  static constexpr int kBelow = kAllPanels ? kPanels * kAtomBytes : kAtomBytes;
  static constexpr int kBeside =
      kAllPanels ? kAtomBytes : kTokens * kPanelRowBytes;
  // Consumers take turns at the tensor cores, but where the copies of small
  // boxes set the pace.
  static constexpr bool kTurns = !kAllPanels || kHeadDim == 256;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;
  // The dynamic part begins at the next multiple of 1024.
  static constexpr int kSharedBytes =
      1024 + kQueryBytes + 2 * kStages * kTileBytes;
};

// AttentionParams as this kernel wants them.
struct Sm90Args {
  const void* query;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;  // null: paged
  const int32_t* seqused_k;     // may be null where contiguous
  const int32_t* block_table;   // null: contiguous
  const int32_t* leftpad_k;     // may be null
  const int32_t* num_seqs;      // may be null
  const float* alibi_slopes;    // may be null
  const float* sinks;           // may be null
  void* out;
  float* lse;
  unsigned* next_item;
  int64_t max_blocks;
  int64_t alibi_seq_stride;
  FastDiv page_size;
  FastDiv group;
  int num_tokens;
  int num_kv_tokens;  // rows of contiguous K; paged: what a table can address
  int num_blocks;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int max_num_seqs;
  int box_tokens;
  // From a KV head to the next in the maps (MakeMap in attention_sm90.cu.cc).
  int head_step;
  int window_left;   // -1: unbounded
  int window_right;  // -1: unbounded
  float scale;       // times log2(e); with soft_cap, over soft_cap
  float soft_cap;    // times log2(e); 0: none
  // Logits need more than a positive factor: soft_cap, ALiBi or scale <= 0.
  bool transform;
};

#if XLA_OPS_HAS_WGMMA

struct Sm90Item {
  int seq;  // -1: rows of no sequence; -2: no more items
  int kv_head;
  int first_token;  // of the segment, a row of the query tensor
  int first_row;    // packed, in the segment
  int num_rows;     // of the tile
  int shift;        // KV position of the segment's token 0: L_k - L_q
  int context;      // L_k
  int kv_row;       // contiguous: the row of KV token 0
  int tile_begin;   // KV tiles [tile_begin, tile_end)
  int tile_end;
};

// Warp 0's walk over the segments (the rows before the first sequence, the
// sequences, the rows after the last), 32 at a time: what this lane's segment
// is, and how many items come before it.
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
  __device__ __forceinline__ bool Advance(const Sm90Args& args, int tile_rows) {
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
    if (args.cu_seqlens_k != nullptr && segment <= num_seqs) {
      key_end = min(max(args.cu_seqlens_k[segment], 0), args.num_kv_tokens);
    }
    // Starts and ends are running maxima, whatever the values.
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int query_other = __shfl_up_sync(kFullWarp, query_end, step);
      const int key_other = __shfl_up_sync(kFullWarp, key_end, step);
      if (lane >= step) {
        query_end = max(query_end, query_other);
        key_end = max(key_end, key_other);
      }
    }
    query_end = max(query_end, query_before);
    key_end = max(key_end, key_before);
    query_start = __shfl_up_sync(kFullWarp, query_end, 1);
    key_start = __shfl_up_sync(kFullWarp, key_end, 1);
    if (lane == 0) {
      query_start = query_before;
      key_start = key_before;
    }
    items_end =
        segment < num_seqs + 2
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

// Fills in what the KV tokens of sequence `item.seq` are; `keys` of them
// start at contiguous row `key_start`.
__device__ __forceinline__ void FindContext(const Sm90Args& args, int key_start,
                                            int keys, Sm90Item& item) {
  if (item.seq < 0) {
    item.context = item.kv_row = 0;
    return;
  }
  const int capacity = args.num_kv_tokens - key_start;
  int context = args.seqused_k == nullptr
                    ? keys
                    : min(max(args.seqused_k[item.seq], 0), capacity);
  int pad = 0;
  if (args.leftpad_k != nullptr) {
    pad = min(max(args.leftpad_k[item.seq], 0), context);
  }
  item.context = context - pad;
  item.kv_row = key_start + pad;
}

// Which KV tiles the item's rows see.
template <int kTokens>
__device__ __forceinline__ void FindTiles(const Sm90Args& args,
                                          Sm90Item& item) {
  const int first = item.shift + args.group.Divide(item.first_row);
  const int last =
      item.shift + args.group.Divide(item.first_row + item.num_rows - 1);
  int end = item.context;
  if (args.window_right >= 0) end = min(end, last + args.window_right + 1);
  int begin = 0;
  if (args.window_left >= 0) begin = max(0, first - args.window_left);
  item.tile_begin = begin / kTokens;
  item.tile_end = end > begin ? (end + kTokens - 1) / kTokens : item.tile_begin;
}

// Warp 0: takes the next item. All lanes return it.
template <typename Shape>
__device__ __forceinline__ Sm90Item NextItem(const Sm90Args& args,
                                             Sm90Segments& segments) {
  const int lane = threadIdx.x % 32;
  unsigned taken = 0;
  if (lane == 0) taken = atomicAdd(args.next_item, 1u);
  const int index = static_cast<int>(__shfl_sync(kFullWarp, taken, 0));
  Sm90Item item = {};
  while (true) {
    const int behind = __shfl_sync(kFullWarp, segments.items_end, 31);
    if (index - segments.items < behind) break;
    if (!segments.Advance(args, Shape::kRows)) {
      item.seq = -2;
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
  // Counted from the segment's end: the first item is its last tile.
  const int left = end - 1 - local;
  const int tile = left % tiles;
  item.seq = segment >= 1 && segment <= segments.num_seqs ? segment - 1 : -1;
  item.kv_head = args.num_kv_heads - 1 - left / tiles;
  item.first_token = query_start;
  item.first_row = tile * Shape::kRows;
  item.num_rows = min(rows - item.first_row, Shape::kRows);
  FindContext(args, key_start, key_end - key_start, item);
  item.shift = item.context - (query_end - query_start);
  FindTiles<Shape::kTokens>(args, item);
  return item;
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_ITEMS_CUH_
