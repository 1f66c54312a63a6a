// What the paged-attention kernels share: arguments, the mapping of query
// tiles to sequences, the visible tokens of a row, the address of a token,
// and where results go.
//
// Query tiles. The query rows of the `group` query heads that read one KV
// head are packed together: packed row r of a sequence is token r / group,
// head r % group. A tile is kTileRows packed rows of one sequence. The host
// knows no sequence's length, so the grid has as many tiles as any lengths
// could need, and each block finds its own sequence from query_start_loc.
//
// Segments. The rows before the first sequence and after the last belong to
// none and must become zero; they are segments too, so that every row is
// some tile's: segment 0 ends at query_start_loc[0], segment i is sequence
// i - 1, segment num_seqs + 1 ends at num_tokens. With segments starting at
// row b_i, segment i's first tile is floor(b_i * group / kTileRows) + i:
// that leaves each segment at least the tiles that it needs, needs no prefix
// sum over tile counts, and bounds the grid by
// floor(num_tokens * group / kTileRows) + max_num_seqs + 2.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TILES_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TILES_CUH_

#include <cstdint>

#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/reduce.cuh"

namespace xla_ops {

// AttentionParams in the form that the kernels want: clamped to 32 bits
// where that loses nothing, and divisors prepared.
struct AttentionArgs {
  const void* query;
  const void* key_cache;
  const void* value_cache;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int32_t* query_start_loc;
  const int32_t* num_seqs;
  void* out;
  // Partial results when num_splits > 1, else null; the row index is
  // (split * num_tokens + token) * num_heads + head.
  float* partial_out;  // [num_splits, num_tokens, num_heads, head_dim]
  float* partial_max;  // [num_splits, num_tokens, num_heads], base 2
  float* partial_sum;  // [num_splits, num_tokens, num_heads]
  int64_t num_tokens;
  int64_t max_blocks;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  FastDiv page_size;
  FastDiv group;        // num_heads / num_kv_heads
  uint32_t num_blocks;  // at most 2^31, which no block id reaches
  int num_heads;
  int head_dim;
  int max_num_seqs;
  int max_context;  // what a block table row can address
  int num_splits;
  int sliding_window;  // 0: none
  float scale;         // times log2(e); with soft_cap, over soft_cap
  float soft_cap;      // times log2(e); 0: none
};

// A block's tile.
struct QueryTile {
  int64_t token;        // of the first row, in the query tensor
  int64_t tokens_left;  // from that one to the segment's end
  int seq;              // -1: the rows belong to no sequence
  int num_rows;         // of the tile; 0 if it lies past the segment's end
  int head;             // of the first row, in the group

  // Tokens from the first row's to that of packed row `row`.
  __device__ __forceinline__ int TokenStep(const AttentionArgs& args,
                                           int row) const {
    return args.group.Divide(head + row);
  }

  // Row of [num_tokens, num_heads] of packed row `row`.
  __device__ __forceinline__ int64_t OutRow(const AttentionArgs& args,
                                            int kv_head, int row) const {
    const int step = TokenStep(args, row);
    const int row_head = head + row - step * args.group.value();
    return (token + step) * args.num_heads + kv_head * args.group.value() +
           row_head;
  }

  // KV position of packed row `row`: the last token of the segment is the
  // last of its context.
  __device__ __forceinline__ int64_t Position(const AttentionArgs& args,
                                              int context, int row) const {
    return context - tokens_left + TokenStep(args, row);
  }
};

struct TileSearch {
  int64_t warp_end[32];
  int64_t carry;
  QueryTile tile;
  bool found;
};

// Finds tile `tile_index`; false if it has no rows. All threads of the block
// must call. The start of a segment is the running maximum of
// query_start_loc clamped to [0, num_tokens], as the contract defines it for
// values in any order, so this is a scan by the whole block and not a binary
// search; for up to blockDim.x - 2 sequences it costs one load a thread.
__device__ inline bool FindQueryTile(const AttentionArgs& args,
                                     int tile_rows, int64_t tile_index,
                                     TileSearch& shared, QueryTile* tile) {
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int group = args.group.value();
  const int num_seqs = min(max(*args.num_seqs, 0), args.max_num_seqs);
  if (thread == 0) {
    shared.carry = 0;
    shared.found = false;
    shared.tile.num_rows = 0;
  }
  __syncthreads();
  for (int base = 0; base < num_seqs + 2; base += blockDim.x) {
    const int segment = base + thread;
    // Where the segment ends; the last one ends at num_tokens.
    int64_t end = args.num_tokens;
    if (segment <= num_seqs) {
      end = min(max(int64_t{args.query_start_loc[segment]}, int64_t{0}),
                args.num_tokens);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, end, step);
      if (lane >= step) end = max(end, other);
    }
    if (lane == 31) shared.warp_end[warp] = end;
    __syncthreads();
    int64_t before = shared.carry;
    for (int w = 0; w < warp; ++w) before = max(before, shared.warp_end[w]);
    end = max(end, before);
    int64_t start = __shfl_up_sync(kFullWarp, end, 1);
    if (lane == 0) start = before;
    const int64_t first_tile = start * group / tile_rows + segment;
    const int64_t end_tile = end * group / tile_rows + segment + 1;
    if (segment < num_seqs + 2 && first_tile <= tile_index &&
        tile_index < end_tile) {
      const int64_t row = (tile_index - first_tile) * tile_rows;
      const int64_t rows = (end - start) * group;
      QueryTile& found = shared.tile;
      found.token = start + row / group;
      found.tokens_left = end - found.token;
      found.seq = segment >= 1 && segment <= num_seqs ? segment - 1 : -1;
      found.num_rows = static_cast<int>(
          max(int64_t{0}, min(rows - row, int64_t{tile_rows})));
      found.head = static_cast<int>(row % group);
      shared.found = true;
    }
    __syncthreads();
    if (shared.found) break;
    if (thread == blockDim.x - 1) shared.carry = end;
    __syncthreads();
  }
  *tile = shared.tile;
  return tile->num_rows > 0;
}

// KV tokens [begin, end).
struct TokenRange {
  int begin;
  int end;
};

// The length of a sequence's context, clamped; zero for rows of none.
__device__ __forceinline__ int ContextLength(const AttentionArgs& args,
                                             int seq) {
  if (seq < 0) return 0;
  return min(max(args.context_lens[seq], 0), args.max_context);
}

// First token that a query at KV position `position` sees.
__device__ __forceinline__ int64_t WindowBegin(const AttentionArgs& args,
                                               int64_t position) {
  return args.sliding_window > 0 ? position - args.sliding_window + 1
                                 : int64_t{0};
}

// What queries at positions [first, last] see, together.
__device__ __forceinline__ TokenRange VisibleTokens(
    const AttentionArgs& args, int context, int64_t first, int64_t last) {
  TokenRange range;
  const int64_t end = min(int64_t{context}, last + 1);
  const int64_t begin = max(int64_t{0}, WindowBegin(args, first));
  range.end = static_cast<int>(max(end, int64_t{0}));
  range.begin = static_cast<int>(min(begin, int64_t{range.end}));
  return range;
}

// A token's place before its block id has arrived from memory, so that the
// load can be started a tile ahead of its use.
struct TokenPlace {
  int block;  // -1: no token there
  int offset;
};

// The token range guards the table: `range` lies within max_context, so
// that the page exists. Compared unsigned, for `token` may have run past
// 2^31 at the end of the longest context.
__device__ __forceinline__ TokenPlace FindToken(const AttentionArgs& args,
                                                const int32_t* table,
                                                const TokenRange& range,
                                                int token) {
  TokenPlace place = {-1, 0};
  if (token >= range.begin &&
      static_cast<uint32_t>(token) < static_cast<uint32_t>(range.end)) {
    const int page = args.page_size.Divide(token);
    place.offset = token - page * args.page_size.value();
    place.block = table[page];
  }
  return place;
}

// Elements from the cache's start to the token's row of this KV head, or -1
// for a masked token: one outside the range or in an invalid block.
__device__ __forceinline__ int64_t TokenOffset(const AttentionArgs& args,
                                               const TokenPlace& place,
                                               int kv_head) {
  if (static_cast<uint32_t>(place.block) >= args.num_blocks) return -1;
  return place.block * args.block_stride + place.offset * args.page_stride +
         kv_head * args.head_stride;
}

// The part of `count` pieces that a split works on.
__device__ __forceinline__ TokenRange SplitRange(int count, int num_splits,
                                                 int split) {
  const int64_t each = (int64_t{count} + num_splits - 1) / num_splits;
  TokenRange range;
  range.begin = static_cast<int>(min(int64_t{count}, split * each));
  range.end = static_cast<int>(min(int64_t{count}, (split + 1) * each));
  return range;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TILES_CUH_
