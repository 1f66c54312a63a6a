// What the attention kernels share: arguments, the mapping of query tiles to
// sequences, the visible tokens of a row, and the address of a token.
//
// Query tiles. The query rows of the `group` query heads that read one KV
// head are packed together: packed row r of a sequence is token r / group,
// head r % group. A tile is kTileRows packed rows of one sequence. The host
// knows no sequence's length, so the grid has as many tiles as any lengths
// could need, and each block finds its own sequence from cu_seqlens_q.
//
// Segments. The rows before the first sequence and after the last belong to
// none and must become zero; they are segments too, so that every row is
// some tile's: segment 0 ends at cu_seqlens_q[0], segment i is sequence
// i - 1, segment num_seqs + 1 ends at num_tokens. With segments starting at
// row b_i, segment i's first tile is floor(b_i * group / kTileRows) + i:
// that leaves each segment at least the tiles that it needs, needs no prefix
// sum over tile counts, and bounds the grid by
// floor(num_tokens * group / kTileRows) + max_num_seqs + 2.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TILES_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TILES_CUH_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {

// AttentionParams in the form that all kernels want: clamped to 32 bits
// where that loses nothing, and divisors prepared. The launcher refuses calls
// beyond kAttentionMaxRows and its like (attention.h).
struct AttentionArgs {
  const void* query;
  const void* key;
  const void* value;
  const int32_t* cu_seqlens_q;
  // Null where the operand is absent:
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_k;
  const int32_t* block_table;
  const int32_t* leftpad_k;
  const int32_t* num_seqs;
  const float* alibi_slopes;
  const float* sinks;
  const float* k_scale;
  const float* v_scale;
  void* out;
  float* lse;  // [num_heads, num_tokens]
  // Partial results when num_splits > 1, else null; the row index is
  // (split * num_tokens + token) * num_heads + head. With num_slots,
  // [num_slots, num_kv_heads, 16 packed rows] instead.
  float* partial_out;   // [num_splits, num_tokens, num_heads, head_dim]
  float* partial_max;   // [num_splits, num_tokens, num_heads], base 2
  float* partial_sum;   // [num_splits, num_tokens, num_heads]
  unsigned* next_item;  // the Hopper kernel's counter of work items
  int64_t max_blocks;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t alibi_seq_stride;
  int64_t kv_scale_seq_stride[2];
  int64_t kv_scale_head_stride[2];
  FastDiv page_size;
  FastDiv group;        // num_heads / num_kv_heads
  uint32_t num_blocks;  // at most 2^31, which no block id reaches
  int num_tokens;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int max_num_seqs;
  int max_kv_len;  // paged: what a block table's row can address;
                   // contiguous: the buffer's rows
  int num_splits;
  // Of a call that two kernels share: the one for decode takes the sequences of
  // at most this many packed rows, the one for prefill all other rows. 0: one
  // kernel takes all.
  int few_rows;
  int window_left;   // -1: hides nothing; else below max_kv_len
  int window_right;  // -1: hides nothing; else below num_tokens
  float scale;       // times log2(e); with soft_cap, over soft_cap
  float soft_cap;    // times log2(e); 0: none
  // Logits need more than a positive factor: soft_cap, ALiBi or scale <= 0.
  bool transform;
  AttentionOp op;  // for reports
  DType dtype;     // of query and out
  bool paged;
  bool e5m2;     // 8-bit keys and values are e5m2, else e4m3
  bool aligned;  // every row of query, key, value and out to 16 bytes
  // Prefill by mma.sync: KV heads of a section (LaunchSections).
  int section_heads;
  // Of the kernel for decode, where it may cut long sequences: one split, and
  // this many pieces. Its KV tiles have 1 << share_tile_shift tokens.
  int num_slots;
  int share_tile_shift;
  // The kernel for decode: the splits of a tile are a cluster, which combines
  // them.
  bool clustered;
  // The kernel for decode: it starts while the kernel before it, which gives it
  // queries and writes keys and values, may still run (device/overlap.cuh).
  bool overlaps;
};

// A row of query and out.
struct QueryRow {
  int token;
  int head;

  // Of [num_tokens, num_heads].
  __device__ __forceinline__ int64_t Index(const AttentionArgs& args) const {
    return int64_t{token} * args.num_heads + head;
  }
};

// A block's tile.
struct QueryTile {
  int token;        // of the first row, in the query tensor
  int tokens_left;  // from that one to the segment's end
  int seq;          // -1: the rows belong to no sequence
  int num_rows;     // of the tile; 0 if it lies past the segment's end
  int head;         // of the first row, in the group
  int kv_len;       // L_k of the sequence; 0 for rows of none
  int kv_start;     // contiguous: the buffer's row of KV token 0

  // Tokens from the first row's to that of packed row `row`.
  __device__ __forceinline__ int TokenStep(const AttentionArgs& args,
                                           int row) const {
    return args.group.Divide(head + row);
  }

  // Token and query head of packed row `row`.
  __device__ __forceinline__ QueryRow Row(const AttentionArgs& args,
                                          int kv_head, int row) const {
    const int step = TokenStep(args, row);
    const int group = args.group.value();
    return {token + step, kv_head * group + head + row - step * group};
  }

  // KV position of packed row `row`: the last token of the segment is the
  // last of its keys.
  __device__ __forceinline__ int Position(const AttentionArgs& args,
                                          int row) const {
    return kv_len - tokens_left + TokenStep(args, row);
  }
};

struct TileSearch {
  int warp_end[4];  // of at most four warps
  int warp_kv_end[4];
  QueryTile tile;
  bool found;
};

// The number of sequences, for code that has nothing to load meanwhile.
__device__ __forceinline__ int NumSeqs(const AttentionArgs& args) {
  return args.num_seqs == nullptr
             ? args.max_num_seqs
             : min(max(*args.num_seqs, 0), args.max_num_seqs);
}

// The running maximum over the lanes of a warp.
__device__ __forceinline__ int WarpRunningMax(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x = max(x, other);
  }
  return x;
}

// Makes a warp's running maximum `end` the block's, from the last ones of
// all warps and `carry`, which becomes the maximum of all. Returns that of
// the thread before.
template <int kWarps>
__device__ __forceinline__ int AddWarps(const int* warp_end, int& carry,
                                        int& end) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int before = carry;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before = max(before, warp_end[w]);
    carry = max(carry, warp_end[w]);
  }
  end = max(end, before);
  const int start = __shfl_up_sync(kFullWarp, end, 1);
  return lane == 0 ? before : start;
}

// Sets what of `tile` says where its sequence's keys are. `used` is
// seqused_k's value where there is one; contiguous: the sequence's rows are
// [start, end) of the buffer.
__device__ __forceinline__ void SetKeys(const AttentionArgs& args, int used,
                                        int start, int end, QueryTile& tile) {
  if (args.paged) {
    tile.kv_start = 0;
    tile.kv_len = min(max(used, 0), args.max_kv_len);
    return;
  }
  int length = end - start;
  if (args.seqused_k != nullptr) {
    length = min(max(used, 0), args.max_kv_len - start);
  }
  const int pad = args.leftpad_k == nullptr
                      ? 0
                      : min(max(args.leftpad_k[tile.seq], 0), length);
  tile.kv_start = start + pad;
  tile.kv_len = length - pad;
}

// Sets what of `tile` says where its rows are, for rows [start, end) of the
// query: its tile begins with packed row `row`, and has none if that lies past
// the last.
template <int kTileRows>
__device__ __forceinline__ void SetRows(const AttentionArgs& args, int start,
                                        int end, int row, int seq,
                                        QueryTile& tile) {
  const int group = args.group.value();
  const int step = args.group.Divide(row);
  tile.token = start + step;
  tile.tokens_left = end - tile.token;
  tile.num_rows = max(0, min((end - start) * group - row, kTileRows));
  tile.head = row - step * group;
  tile.seq = seq;
}

// Whether a segment of `tokens` query tokens is one for the kernel for decode,
// in a call that two kernels share.
__device__ __forceinline__ bool IsFew(const AttentionArgs& args, int segment,
                                      int num_seqs, int tokens) {
  return segment >= 1 && segment <= num_seqs &&
         tokens * args.group.value() <= args.few_rows;
}

// Finds tile `tile_index`; false if it has no rows. All threads of the block
// must call. The start of a segment is the running maximum of cu_seqlens_q
// clamped to [0, num_tokens], as the contract defines it for values in any
// order, so this is a scan by the whole block and not a binary search; for
// up to 32 * kWarps - 2 sequences it costs one load a thread. Every load that
// might be wanted is started at once, before num_seqs is known: a decode
// step waits for them.
template <int kTileRows, int kWarps>
__device__ __forceinline__ bool FindQueryTile(const AttentionArgs& args,
                                              int tile_index,
                                              TileSearch& shared,
                                              QueryTile* tile) {
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int group = args.group.value();
  int num_seqs = args.num_seqs != nullptr ? *args.num_seqs : args.max_num_seqs;
  if (thread == 0) {
    shared.found = false;
    shared.tile.num_rows = 0;
  }
  int carry = 0;
  int kv_carry = 0;
  int base = 0;
  do {
    const int segment = base + thread;
    const int seq = segment - 1;
    int end = 0;
    int kv_end = 0;
    int used = 0;
    if (segment <= args.max_num_seqs) {
      end = args.cu_seqlens_q[segment];
      if (!args.paged) kv_end = args.cu_seqlens_k[segment];
      if (seq >= 0 && args.seqused_k != nullptr) used = args.seqused_k[seq];
    }
    num_seqs = min(max(num_seqs, 0), args.max_num_seqs);
    // The last segment ends at num_tokens.
    end = segment > num_seqs ? args.num_tokens
                             : min(max(end, 0), args.num_tokens);
    end = WarpRunningMax(end);
    if (lane == 31) shared.warp_end[warp] = end;
    if (!args.paged) {
      kv_end = WarpRunningMax(min(max(kv_end, 0), args.max_kv_len));
      if (lane == 31) shared.warp_kv_end[warp] = kv_end;
    }
    __syncthreads();
    const int start = AddWarps<kWarps>(shared.warp_end, carry, end);
    int kv_start = 0;
    if (!args.paged)
      kv_start = AddWarps<kWarps>(shared.warp_kv_end, kv_carry, kv_end);
    int first_tile = start * group / kTileRows + segment;
    int end_tile = end * group / kTileRows + segment + 1;
    if (args.few_rows > 0) {
      // A sequence is a tile, or not this kernel's.
      first_tile = segment;
      end_tile = segment + IsFew(args, segment, num_seqs, end - start);
    }
    if (segment < num_seqs + 2 && first_tile <= tile_index &&
        tile_index < end_tile) {
      QueryTile& found = shared.tile;
      found.kv_len = 0;
      found.kv_start = 0;
      SetRows<kTileRows>(args, start, end,
                         (tile_index - first_tile) * kTileRows,
                         seq < num_seqs ? seq : -1, found);
      if (found.seq >= 0) SetKeys(args, used, kv_start, kv_end, found);
      shared.found = true;
    }
    __syncthreads();
    if (shared.found) break;
    base += 32 * kWarps;
  } while (base < num_seqs + 2);
  *tile = shared.tile;
  return tile->num_rows > 0;
}

// KV tokens [begin, end).
struct TokenRange {
  int begin;
  int end;
};

// What queries at positions [first, last] see, together: it begins where the
// first one's window does and ends where the last one's does.
__device__ __forceinline__ TokenRange VisibleTokens(const AttentionArgs& args,
                                                    int kv_len, int first,
                                                    int last) {
  TokenRange range = {0, kv_len};
  if (args.window_left >= 0) {
    const int64_t begin = int64_t{first} - args.window_left;
    range.begin =
        static_cast<int>(min(max(begin, int64_t{0}), int64_t{kv_len}));
  }
  if (args.window_right >= 0) {
    const int64_t end = int64_t{last} + args.window_right + 1;
    range.end = static_cast<int>(min(max(end, int64_t{0}), int64_t{kv_len}));
  }
  return range;
}

// The tiles of kTokens tokens that hold a range: [begin, end) of them.
template <int kTokens>
__device__ __forceinline__ TokenRange TilesOf(const TokenRange& range) {
  TokenRange tiles;
  tiles.begin = range.begin / kTokens;
  tiles.end =
      range.begin < range.end ? (range.end - 1) / kTokens + 1 : tiles.begin;
  return tiles;
}

// A token's place before its block id has arrived from memory, so that the
// load can be started ahead of its use.
struct TokenPlace {
  int block;  // -1: no token there
  int offset;
};

// The token range guards the table: `range` lies within max_kv_len, so that
// the page exists. `token` is unsigned, for it may run past 2^31 at the end of
// the longest sequence.
__device__ __forceinline__ TokenPlace FindToken(const AttentionArgs& args,
                                                const QueryTile& tile,
                                                const int32_t* table,
                                                const TokenRange& range,
                                                uint32_t token) {
  TokenPlace place = {-1, 0};
  if (token >= static_cast<uint32_t>(range.begin) &&
      token < static_cast<uint32_t>(range.end)) {
    const int in_range = static_cast<int>(token);
    if (args.paged) {
      const int page = args.page_size.Divide(in_range);
      place.offset = in_range - page * args.page_size.value();
      place.block = table[page];
    } else {
      place.offset = tile.kv_start + in_range;
      place.block = 0;
    }
  }
  return place;
}

// Elements from the buffer's start to the token's row of this KV head, or -1
// for a masked token: one outside the range or in an invalid block.
__device__ __forceinline__ int64_t TokenOffset(const AttentionArgs& args,
                                               const TokenPlace& place,
                                               int kv_head) {
  if (static_cast<uint32_t>(place.block) >= args.num_blocks) return -1;
  return place.block * args.block_stride + place.offset * args.page_stride +
         kv_head * args.head_stride;
}

// The part of `count` pieces that a split works on. Unsigned, so that nothing
// overflows: (split + 1) * each <= count + num_splits - 1 + each.
__device__ __forceinline__ TokenRange SplitRange(int count, int num_splits,
                                                 unsigned split) {
  const unsigned pieces = static_cast<unsigned>(count);
  const unsigned each =
      (pieces + num_splits - 1) / static_cast<unsigned>(num_splits);
  TokenRange range;
  range.begin = static_cast<int>(min(pieces, split * each));
  range.end = static_cast<int>(min(pieces, (split + 1) * each));
  return range;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TILES_CUH_
