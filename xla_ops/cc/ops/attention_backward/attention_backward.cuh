// What the kernels of attention's gradient share: arguments, segments and
// their tiles, and a row's part in its logits' gradient.
//
// Segments are those of attention/attention_tiles.cuh: segment 0 is the rows
// before the first sequence, segment i sequence i - 1, the last one the rows
// after the last sequence. Of queries and, where sequences' keys lie side by
// side, of keys too: rows of no sequence become zero like any row that sees
// nothing. A first kernel puts them into a table, with how many tiles of
// queries and of keys come before each, so that a block finds its own.
//
// lse and delta are copied to [num_heads, query tile, row of the tile], in
// base 2, with an lse of +inf where a tile has no row: its weights are zero.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_CUH_

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

struct BackwardSegment {
  int query_start;  // rows of query
  int query_rows;
  int key_start;  // contiguous: rows of key
  int key_rows;   // L_k
};

struct AttentionBackwardArgs {
  AttentionArgs batch;  // its out and lse are null
  const void* grad_out;
  const void* out;
  const float* lse;
  const float* grad_lse;  // null where absent
  // Null where not wanted:
  void* dq;
  void* dk;
  void* dv;
  float* dsinks;
  // In the workspace:
  BackwardSegment* segments;  // [max_num_seqs + 2]
  int* query_tiles;           // [max_num_seqs + 3], tiles before each segment
  int* key_tiles;             // the same
  float* row_lse;             // [num_heads, max_query_tiles, tile rows], base 2
  float* row_delta;           // the same
  float* dq_sum;  // of the Hopper kernel; see attention_backward_sm90.cuh
  int query_tile_rows;
  int key_tile_rows;
  int max_query_tiles;
  int max_key_tiles;
  float scale;  // of q.k, as it was given
  // Keys may be two sequences', and there may be rows between sequences: dk
  // and dv are zero at first, and added to.
  bool shared_keys;
};

// A tile of a segment's rows.
struct BackwardTile {
  int segment;
  int seq;    // -1: the rows are of no sequence
  int first;  // row of the tile, within the segment
  int rows;   // of the tile; 0: there is no such tile
  BackwardSegment range;

  // What makes query row i of the sequence KV position i + Shift().
  __device__ __forceinline__ int Shift() const {
    return range.key_rows - range.query_rows;
  }
};

// The `index`th tile of kTileRows rows, of queries (`tiles` is query_tiles) or
// of keys.
template <int kTileRows, bool kOfKeys>
__device__ __forceinline__ BackwardTile
FindBackwardTile(const AttentionBackwardArgs& args, int index) {
  const int* tiles = kOfKeys ? args.key_tiles : args.query_tiles;
  const int num_seqs = NumSeqs(args.batch);
  BackwardTile tile = {};
  tile.seq = -1;
  if (index >= tiles[num_seqs + 2]) return tile;
  // The last segment that begins at or before the tile.
  int low = 0;
  int high = num_seqs + 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tiles[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  tile.segment = low;
  tile.range = args.segments[low];
  tile.first = (index - tiles[low]) * kTileRows;
  const int rows = kOfKeys ? tile.range.key_rows : tile.range.query_rows;
  tile.rows = min(rows - tile.first, kTileRows);
  if (low >= 1 && low <= num_seqs) tile.seq = low - 1;
  return tile;
}

// The query rows of a sequence that keys [first, last] see: [begin, end).
__device__ __forceinline__ TokenRange RowsThatSee(const AttentionArgs& args,
                                                  const BackwardTile& tile,
                                                  int first, int last) {
  const int rows = tile.range.query_rows;
  TokenRange range = {0, tile.seq < 0 ? 0 : rows};
  if (args.window_right >= 0) {
    const int64_t begin = int64_t{first} - args.window_right - tile.Shift();
    range.begin = static_cast<int>(min(max(begin, int64_t{0}), int64_t{rows}));
  }
  if (args.window_left >= 0) {
    const int64_t end = int64_t{last} + args.window_left - tile.Shift() + 1;
    range.end = static_cast<int>(min(max(end, int64_t{0}), int64_t{range.end}));
  }
  return range;
}

// Whether query row `row` sees key `key` of the sequence, which both exist.
__device__ __forceinline__ bool Sees(const AttentionArgs& args, int position,
                                     int key) {
  return (args.window_left < 0 || key >= position - args.window_left) &&
         (args.window_right < 0 || key <= position + args.window_right);
}

// Whether a row at one of the positions may not see one of the keys, or there
// is no such key.
__device__ __forceinline__ bool IsMasked(const AttentionArgs& args,
                                         int num_keys, int first_position,
                                         int last_position, int first_key,
                                         int last_key) {
  return last_key >= num_keys ||
         (args.window_right >= 0 &&
          last_key > first_position + args.window_right) ||
         (args.window_left >= 0 &&
          first_key < last_position - args.window_left);
}

// A weight, and what its logit's gradient is multiplied by for the cap.
struct Weight {
  float value;
  float slope;
};

// From q.k and the row's lse in base 2. `distance` is |position - key|.
template <bool kTransform>
__device__ __forceinline__ Weight WeightOf(const AttentionArgs& args,
                                           float score, float scale, float lse,
                                           float alibi_slope, float distance) {
  Weight weight = {0.0f, 1.0f};
  if constexpr (!kTransform) {
    weight.value = Exp2(fmaf(score, scale, -lse));
  } else {
    score *= scale;
    if (args.soft_cap != 0.0f) {
      score = SoftCap(score, args.soft_cap);
      const float ratio = score / args.soft_cap;
      weight.slope = 1.0f - ratio * ratio;
    }
    weight.value = Exp2(score - alibi_slope * distance - lse);
  }
  return weight;
}

// Adds two neighbouring elements to a pair in memory, which others may add to
// as well. Each sum is rounded.
template <typename T>
__device__ __forceinline__ void AddPair(T* pair, float x, float y) {
  if constexpr (sizeof(T) == 4) {
    atomicAdd(pair, x);
    atomicAdd(pair + 1, y);
  } else {
    unsigned* word = reinterpret_cast<unsigned*>(pair);
    unsigned seen = *word;
    unsigned old;
    do {
      old = seen;
      const T* const elements = reinterpret_cast<const T*>(&old);
      T sum[2] = {FromFloat<T>(ToFloat(elements[0]) + x),
                  FromFloat<T>(ToFloat(elements[1]) + y)};
      seen = atomicCAS(word, old, reinterpret_cast<const unsigned&>(sum));
    } while (seen != old);
  }
}

// Writes two neighbouring elements of dk or dv.
template <typename T>
__device__ __forceinline__ void StoreKeyPair(const AttentionBackwardArgs& args,
                                             void* results, int64_t index,
                                             float x, float y) {
  T* pair = static_cast<T*>(results) + index;
  if (args.shared_keys) {
    AddPair(pair, x, y);
  } else if constexpr (sizeof(T) == 4) {
    pair[0] = x;
    pair[1] = y;
  } else {
    *reinterpret_cast<uint32_t*>(pair) = PackPair<T>(x, y);
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_CUH_
