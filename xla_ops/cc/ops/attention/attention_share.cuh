// Finds a block's item of the shares in attention_share.h.
//
// Tested by tests/gpu/check_kernels.py.

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
  ShareSums sums[kShareWarps];
  QueryTile tile;
  ShareItem item;
  bool found;
};

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
  if (args.few_rows > 0) {
    need.tiles = tokens > 0 && IsFew(args, segment.index, num_seqs, tokens);
  }
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
__device__ __forceinline__ ShareSums AddBefore(ShareSums x, bool alone,
                                               ShareSums* warps,
                                               ShareSums* all) {
  const int lane = threadIdx.x % 32;
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
  ShareSums before = {sum.cut - x.cut, sum.whole - x.whole};
  if (alone) {
    *all = {__shfl_sync(kFullWarp, sum.cut, 31),
            __shfl_sync(kFullWarp, sum.whole, 31)};
    return before;
  }
  const int warp = threadIdx.x / 32;
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
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

__device__ __forceinline__ int64_t AddAll(int64_t x, bool alone,
                                          int64_t* warps) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, step);
  }
  if (alone) return x;
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < kShareWarps; ++w) x += warps[w];
  return x;
}

// The largest `x` of the threads before this one, and 0.
__device__ __forceinline__ int MaxBefore(int x, bool alone, int* warps) {
  x = WarpRunningMax(x);
  const int lane = threadIdx.x % 32;
  int before = __shfl_up_sync(kFullWarp, x, 1);
  if (lane == 0) before = 0;
  if (alone) return before;
  const int warp = threadIdx.x / 32;
  if (lane == 31) warps[warp] = x;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kShareWarps; ++w) {
    if (w < warp) before = max(before, warps[w]);
  }
  return before;
}

// Shares the work out, and calls take(segment, num_seqs, need, pieces, before,
// all) for every segment that asks for some, each by one thread; what it
// answers says whether it wrote search.tile and search.item. All threads must
// call, 32 * kShareWarps of them; all learn whether one did.
//
// A thread has a run of neighbouring segments. Few enough for a warp are shared
// out by each warp for itself, without a barrier: a decode step waits for this.
// Every load that might be wanted is started at once, before num_seqs is known.
template <typename Take>
__device__ __forceinline__ bool ShareOut(const AttentionArgs& args,
                                         ShareSearch& search, Take&& take) {
  int num_seqs = args.num_seqs != nullptr ? *args.num_seqs : args.max_num_seqs;
  const int count = args.max_num_seqs + 2;
  const bool alone = count <= 32;
  const int thread = alone ? threadIdx.x % 32 : threadIdx.x;
  const int threads = alone ? 32 : 32 * kShareWarps;
  const int run = (count + threads - 1) / threads;
  const int first = min(thread * run, count);
  const int last = min(first + run, count);
  struct Loaded {
    int end;
    int kv_end;
    int used;
  };
  const auto load = [&](int index) {
    Loaded loaded = {0, 0, 0};
    if (index <= args.max_num_seqs) {
      loaded.end = args.cu_seqlens_q[index];
      if (!args.paged) loaded.kv_end = args.cu_seqlens_k[index];
      if (index > 0 && args.seqused_k != nullptr) {
        loaded.used = args.seqused_k[index - 1];
      }
    }
    return loaded;
  };
  const Loaded held = load(first);
  if (threadIdx.x == 0) search.found = false;
  num_seqs = min(max(num_seqs, 0), args.max_num_seqs);

  // Segments as the contract bounds them: by running maxima.
  const auto clamp = [&](int index, Loaded loaded) {
    // The last one ends at num_tokens.
    loaded.end = index > num_seqs ? args.num_tokens
                                  : min(max(loaded.end, 0), args.num_tokens);
    loaded.kv_end = min(max(loaded.kv_end, 0), args.max_kv_len);
    return loaded;
  };
  Loaded most = {0, 0, 0};
  for (int index = first; index < last; ++index) {
    const Loaded loaded = clamp(index, index == first ? held : load(index));
    most.end = max(most.end, loaded.end);
    most.kv_end = max(most.kv_end, loaded.kv_end);
  }
  const int start = MaxBefore(most.end, alone, search.end);
  const int kv_start =
      args.paged ? 0 : MaxBefore(most.kv_end, alone, search.kv_end);
  ShareNeed first_need = {0, 0};
  const auto visit = [&](bool again, auto&& f) {
    ShareSegment segment = {first, start, start, 0, kv_start, kv_start};
    for (; segment.index < last; ++segment.index) {
      const bool is_first = segment.index == first;
      const Loaded loaded =
          clamp(segment.index, is_first ? held : load(segment.index));
      segment.start = segment.end;
      segment.kv_start = segment.kv_end;
      segment.end = max(segment.start, loaded.end);
      segment.kv_end = max(segment.kv_start, loaded.kv_end);
      segment.used = loaded.used;
      const ShareNeed need =
          is_first && again ? first_need : NeedOf(args, segment, num_seqs);
      if (is_first) first_need = need;
      f(segment, need);
    }
  };

  int64_t total = 0;
  visit(false, [&](const ShareSegment&, const ShareNeed& need) {
    total += int64_t{need.tiles} * need.kv_tiles;
  });
  int chunk = INT32_MAX;
  if (args.num_slots > 1) {
    chunk = ShareChunk(AddAll(total, alone, search.load), args.num_slots);
  }
  const auto pieces_of = [&](const ShareNeed& need) {
    return PiecesOf(need.kv_tiles, 1 << args.share_tile_shift, chunk);
  };
  ShareSums sums = {0, 0};
  visit(true, [&](const ShareSegment&, const ShareNeed& need) {
    const ShareSums items = ItemsOf(need, pieces_of(need));
    sums.cut += items.cut;
    sums.whole += items.whole;
  });
  ShareSums all;
  ShareSums before = AddBefore(sums, alone, search.sums, &all);
  if (alone) __syncthreads();  // `found` is false
  visit(true, [&](const ShareSegment& segment, const ShareNeed& need) {
    const int pieces = pieces_of(need);
    if (threadIdx.x < static_cast<unsigned>(threads) && need.tiles > 0 &&
        take(segment, num_seqs, need, pieces, before, all)) {
      search.found = true;
    }
    const ShareSums items = ItemsOf(need, pieces);
    before.cut += items.cut;
    before.whole += items.whole;
  });
  __syncthreads();
  return search.found;
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

// Finds item `index`; false if there are not so many.
__device__ __forceinline__ bool FindItem(const AttentionArgs& args, int index,
                                         ShareSearch& search) {
  return ShareOut(
      args, search,
      [&](const ShareSegment& segment, int num_seqs, const ShareNeed& need,
          int pieces, const ShareSums& before, const ShareSums& all) {
        if (!TakeItem(index, all, before, need, pieces, &search.item)) {
          return false;
        }
        SetTile(args, segment, num_seqs, search.item.tile, search.tile);
        return true;
      });
}

// Whether `token` is of a sequence that the kernel for decode takes.
__device__ __forceinline__ bool TakenByDecode(const AttentionArgs& args,
                                              int token, ShareSearch& search) {
  return ShareOut(args, search,
                  [&](const ShareSegment& segment, int, const ShareNeed&, int,
                      const ShareSums&, const ShareSums&) {
                    return segment.start <= token && token < segment.end;
                  });
}

// The row of the partial results that holds a slot's row `row`.
__device__ __forceinline__ int64_t SlotRow(const AttentionArgs& args, int slot,
                                           int kv_head, int row) {
  return (int64_t{slot} * args.num_kv_heads + kv_head) * kDecodeRows + row;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SHARE_CUH_
