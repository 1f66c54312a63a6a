// Finds a block's item of the shares in attention_share.h.
//
// Tested by tests/gpu/check_decode.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SHARE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SHARE_CUH_

#include <cstdint>

#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_share.h"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// Warps of a block that searches.
constexpr int kShareWarps = 4;

struct ShareSearch {
  int end[kShareWarps];
  int kv_end[kShareWarps];
  int64_t load[kShareWarps];
  int64_t cut_load[kShareWarps];
  int64_t others[kShareWarps];
  ShareSums sums[kShareWarps];
  ShareItem item;
  bool found;
};

// A bound of the KV tokens of the sequences that this thread looks at, each one
// of the block's: no sequence has more once its length is clamped.
__device__ __forceinline__ int LongestOfThread(const AttentionArgs& args) {
  int longest = 0;
  for (int seq = threadIdx.x; seq < args.max_num_seqs; seq += blockDim.x) {
    int64_t length;
    if (args.seqused_k != nullptr) {
      length = args.seqused_k[seq];
    } else {
      length = int64_t{args.cu_seqlens_k[seq + 1]} - args.cu_seqlens_k[seq];
    }
    longest =
        max(longest,
            static_cast<int>(min(max(length, int64_t{0}), int64_t{INT32_MAX})));
  }
  return longest;
}

// Whether a sequence may be cut. All threads of the block must call, with their
// LongestOfThread.
__device__ __forceinline__ bool AnyLong(int longest) {
  return __syncthreads_or(longest > kShareLongTokens) != 0;
}

// A segment (attention_tiles.cuh) with its rows, and where its keys may be.
struct ShareSegment {
  int index;
  int start;
  int end;
  int used;
  int kv_start;
  int kv_end;

  __device__ __forceinline__ int Seq(int num_seqs) const {
    return index <= num_seqs ? index - 1 : -1;
  }
};

// What a segment asks for. Rows of no sequence are tiles that see nothing.
__device__ __forceinline__ ShareNeed NeedOf(const AttentionArgs& args,
                                            const ShareSegment& segment,
                                            int num_seqs) {
  const int tokens = segment.end - segment.start;
  ShareNeed need = {
      (tokens * args.group.value() + kDecodeRows - 1) / kDecodeRows, 0};
  QueryTile keys;
  keys.seq = segment.Seq(num_seqs);
  if (need.tiles == 0 || keys.seq < 0) return need;
  SetKeys(args, segment.used, segment.kv_start, segment.kv_end, keys);
  const TokenRange visible =
      VisibleTokens(args, keys.kv_len, keys.kv_len - tokens, keys.kv_len - 1);
  if (visible.begin < visible.end) {
    need.kv_tiles = ((visible.end - 1) >> args.share_tile_shift) -
                    (visible.begin >> args.share_tile_shift) + 1;
  }
  return need;
}

// Sums over the threads before this one, and over all in `all`.
__device__ __forceinline__ ShareSums AddBefore(ShareSums x, ShareSums* warps,
                                               ShareSums* all) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  ShareSums sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int cut = __shfl_up_sync(kFullWarp, sum.cut, step);
    const int whole = __shfl_up_sync(kFullWarp, sum.whole, step);
    if (lane >= step) {
      sum.cut += cut;
      sum.whole += whole;
    }
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  ShareSums before = {sum.cut - x.cut, sum.whole - x.whole};
  *all = {0, 0};
#pragma unroll
  for (int w = 0; w < kShareWarps; ++w) {
    if (w < warp) {
      before.cut += warps[w].cut;
      before.whole += warps[w].whole;
    }
    all->cut += warps[w].cut;
    all->whole += warps[w].whole;
  }
  return before;
}

__device__ __forceinline__ int64_t AddAll(int64_t x, int64_t* warps) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, step);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < kShareWarps; ++w) x += warps[w];
  return x;
}

// The largest `x` of the threads before this one, and 0.
__device__ __forceinline__ int MaxBefore(int x, int* warps) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  x = WarpRunningMax(x);
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  int before = __shfl_up_sync(kFullWarp, x, 1);
  if (lane == 0) before = 0;
#pragma unroll
  for (int w = 0; w < kShareWarps; ++w) {
    if (w < warp) before = max(before, warps[w]);
  }
  return before;
}

// Sets `tile` to a segment's query tile.
__device__ __forceinline__ void SetTile(const AttentionArgs& args,
                                        const ShareSegment& segment,
                                        int num_seqs, int index,
                                        QueryTile& tile) {
  tile.kv_len = 0;
  tile.kv_start = 0;
  SetRows<kDecodeRows>(args, segment.start, segment.end, index * kDecodeRows,
                       segment.Seq(num_seqs), tile);
  if (tile.seq >= 0) {
    SetKeys(args, segment.used, segment.kv_start, segment.kv_end, tile);
  }
}

// Finds an item, in search.item and `tile`, which is shared memory too; false
// if there are not so many. Where a slot is wanted it is the item of that slot,
// else `index` of all. All threads must call, 32 * kShareWarps of them, each of
// which has a run of neighbouring segments.
__device__ __forceinline__ bool FindItem(const AttentionArgs& args, int index,
                                         bool of_slot, ShareSearch& search,
                                         QueryTile& tile) {
  const int num_seqs = NumSeqs(args);
  const int count = args.max_num_seqs + 2;
  constexpr int kThreads = 32 * kShareWarps;
  const int run = (count + kThreads - 1) / kThreads;
  const int first = min(static_cast<int>(threadIdx.x) * run, count);
  const int last = min(first + run, count);
  // The ends of a segment as the contract bounds them, before running maxima.
  struct Ends {
    int end;
    int kv_end;
    int used;
  };
  const auto load = [&](int segment) {
    // The last one ends at num_tokens.
    Ends ends = {args.num_tokens, 0, 0};
    if (segment > args.max_num_seqs) return ends;
    if (segment <= num_seqs) {
      ends.end = min(max(args.cu_seqlens_q[segment], 0), args.num_tokens);
    }
    if (!args.paged) {
      ends.kv_end = min(max(args.cu_seqlens_k[segment], 0), args.max_kv_len);
    }
    if (segment > 0 && args.seqused_k != nullptr) {
      ends.used = args.seqused_k[segment - 1];
    }
    return ends;
  };
  if (threadIdx.x == 0) search.found = false;
  int end = 0;
  int kv_end = 0;
#pragma unroll 1
  for (int segment = first; segment < last; ++segment) {
    const Ends ends = load(segment);
    end = max(end, ends.end);
    kv_end = max(kv_end, ends.kv_end);
  }
  const int start = MaxBefore(end, search.end);
  const int kv_start = args.paged ? 0 : MaxBefore(kv_end, search.kv_end);
  const auto visit = [&](auto&& f) {
    ShareSegment segment = {first, start, start, 0, kv_start, kv_start};
#pragma unroll 1
    for (; segment.index < last; ++segment.index) {
      const Ends ends = load(segment.index);
      segment.start = segment.end;
      segment.kv_start = segment.kv_end;
      segment.end = max(segment.start, ends.end);
      segment.kv_end = max(segment.kv_start, ends.kv_end);
      segment.used = ends.used;
      f(segment, NeedOf(args, segment, num_seqs));
    }
  };

  ShareLoads loads = {0, 0};
  visit([&](const ShareSegment&, const ShareNeed& need) {
    loads.all += LoadOf(need);
  });
  loads.all = AddAll(loads.all, search.load);
  ShareRules rules;
  rules.tile_tokens = 1 << args.share_tile_shift;
  rules.long_tiles = LongTiles(loads.all, args.num_slots, rules.tile_tokens);
  int64_t others = 0;
  visit([&](const ShareSegment&, const ShareNeed& need) {
    if (need.kv_tiles > rules.long_tiles) {
      loads.cut += LoadOf(need);
    } else {
      others += need.tiles;
    }
  });
  loads.cut = AddAll(loads.cut, search.cut_load);
  others = AddAll(others, search.others);
  rules.chunk = ShareChunk(loads, static_cast<int>(others), args.num_slots);
  ShareSums sums = {0, 0};
  visit([&](const ShareSegment&, const ShareNeed& need) {
    const ShareSums items = ItemsOf(need, rules.Pieces(need.kv_tiles));
    sums.cut += items.cut;
    sums.whole += items.whole;
  });
  ShareSums all;
  ShareSums before = AddBefore(sums, search.sums, &all);
  const bool pieces_first = PiecesFirst(loads, rules.chunk, all.whole);
  if (of_slot) {
    if (index >= all.cut) return false;
    if (!pieces_first) index += all.whole;
  }
  visit([&](const ShareSegment& segment, const ShareNeed& need) {
    const int pieces = rules.Pieces(need.kv_tiles);
    if (TakeItem(index, pieces_first, all, before, need, pieces,
                 &search.item)) {
      SetTile(args, segment, num_seqs, search.item.tile, tile);
      search.found = true;
    }
    const ShareSums items = ItemsOf(need, pieces);
    before.cut += items.cut;
    before.whole += items.whole;
  });
  __syncthreads();
  return search.found;
}

// The row of the partial results that holds a slot's row `row`.
__device__ __forceinline__ int64_t SlotRow(const AttentionArgs& args, int slot,
                                           int kv_head, int row) {
  return (int64_t{slot} * args.num_kv_heads + kv_head) * kDecodeRows + row;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SHARE_CUH_
