// How the kernel for decode shares its work out by the sequences' lengths,
// which only the device knows: a thread block takes one item, and finds on the
// device which.
//
// A sequence asks for query tiles, each of which sees some KV tiles. A fair
// share is the sum of all KV tiles over the number of slots for partial results
// in the workspace, which with all KV heads are somewhat fewer than the blocks
// that a large GPU holds. A sequence that takes more than a third longer than
// that, and has more than kShareLongTokens, is long: its KV tiles are cut into
// pieces, and each piece is an item; every other query tile is one. There are
// so many pieces that they take all slots, and never more: equal sequences stay
// whole where they are more than half as many as slots.
//
// The larger items come first: those of cut sequences, in the order of their
// slots, or those of whole ones. No CUDA header, so that it can be tested
// without one.
//
// Where no sequence has more than kShareLongTokens nothing is shared out: a
// block has the query tile that its place in the grid says, and does not
// search.
//
// Tested by attention_share_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SHARE_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SHARE_H_

#include <cstdint>

#ifdef __CUDACC__
#define XLA_OPS_SHARE __host__ __device__ __forceinline__
#else
#define XLA_OPS_SHARE inline
#endif

namespace xla_ops {

// Tokens of a KV tile of the kernel for decode, by its padded head_dim.
constexpr int DecodeTileTokens(bool fp8, int64_t head_dim) {
  return fp8 || head_dim <= 64 ? 128 : 64;
}

// The same for splits of no more tokens, with 8-bit keys, whose splits are a
// cluster.
constexpr int kShortTileTokens = 64;

// Sequences of no more tokens stay whole. A block that is left alone reads so
// many in 75 us on an H200.
constexpr int kShareLongTokens = 4096;

// What a sequence asks for.
struct ShareNeed {
  int tiles;     // query tiles
  int kv_tiles;  // that its rows see, together
};

// Query tiles times KV tiles.
struct ShareLoads {
  int64_t all;
  int64_t cut;  // of long sequences
};

// Numbers of items.
struct ShareSums {
  int cut;    // pieces of sequences that are cut, and so slots
  int whole;  // query tiles of those that are not
};

// What a block works on.
struct ShareItem {
  int tile;    // of the sequence's query tiles
  int piece;   // of the query tile's pieces
  int pieces;  // 1: not cut, and there is no slot
  int slot;
};

XLA_OPS_SHARE int64_t LoadOf(const ShareNeed& need) {
  return int64_t{need.tiles} * need.kv_tiles;
}

// The KV tiles that a long sequence has more of, of `tile_tokens` each.
XLA_OPS_SHARE int LongTiles(int64_t all, int slots, int tile_tokens) {
  const int least = kShareLongTokens / tile_tokens;
  if (slots < 2 || all > INT32_MAX / 4) return INT32_MAX;
  const int limit = 4 * static_cast<int>(all) / (3 * slots);
  return limit > least ? limit : least;
}

// Whether pieces are larger than what stays whole is on average.
XLA_OPS_SHARE bool PiecesFirst(const ShareLoads& loads, int chunk, int whole) {
  return int64_t{chunk} * whole >= loads.all - loads.cut;
}

// KV tiles of a piece, at least: a share of what all long sequences have or,
// where the `whole` query tiles of the others have more each, of what all have.
// Pieces that are smaller than those are left over when the first blocks end,
// and land on whichever multiprocessors end first.
XLA_OPS_SHARE int ShareChunk(const ShareLoads& loads, int whole, int slots) {
  if (slots < 2 || loads.all > INT32_MAX - slots) return INT32_MAX;
  const int chunk = (static_cast<int>(loads.cut) + slots - 1) / slots;
  if (!PiecesFirst(loads, chunk, whole)) {
    return (static_cast<int>(loads.all) + slots - 1) / slots;
  }
  return chunk > 0 ? chunk : 1;
}

// A piece's time falls with the number of pieces, and the time to combine them
// rises with it, so the best number grows as the root of the length: on an H100
// 16 for 1024 tokens, 32 for 4096, 64 for 32768.
XLA_OPS_SHARE int MostPieces(uint32_t tokens) {
  if (tokens < 16) return 1;
#ifdef __CUDA_ARCH__
  const int log2 = 31 - __clz(static_cast<int>(tokens / 16));
#else
  const int log2 = 31 - __builtin_clz(tokens / 16);
#endif
  return 2 << log2 / 2;
}

// How a batch is shared out.
struct ShareRules {
  int long_tiles;
  int chunk;
  int tile_tokens;

  // Into how many pieces a query tile's KV tiles are cut.
  XLA_OPS_SHARE int Pieces(int kv_tiles) const {
    if (kv_tiles <= long_tiles || kv_tiles / 2 < chunk) return 1;
    const int pieces = kv_tiles / chunk;
    const int most = MostPieces(static_cast<uint32_t>(kv_tiles) * tile_tokens);
    return pieces < most ? pieces : most;
  }
};

XLA_OPS_SHARE ShareSums ItemsOf(const ShareNeed& need, int pieces) {
  return pieces > 1 ? ShareSums{need.tiles * pieces, 0}
                    : ShareSums{0, need.tiles};
}

// Whether item `index` of all is one of this sequence, and which. `all`: items
// of all sequences.
XLA_OPS_SHARE bool TakeItem(int index, bool pieces_first, const ShareSums& all,
                            const ShareSums& before, const ShareNeed& need,
                            int pieces, ShareItem* item) {
  const bool is_cut = pieces > 1;
  int local = index - (is_cut ? before.cut : before.whole);
  if (is_cut != pieces_first) local -= is_cut ? all.whole : all.cut;
  if (local < 0 || local >= need.tiles * pieces) return false;
  const int step = local / pieces;
  // Under a causal mask the last tile has the most to do.
  item->tile = need.tiles - 1 - step;
  item->piece = local - step * pieces;
  item->pieces = pieces;
  item->slot = is_cut ? before.cut + local : -1;
  return true;
}

}  // namespace xla_ops

#undef XLA_OPS_SHARE

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SHARE_H_
