// The number of splits, and the workspace that they take.

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_num_splits.h"
#include "xla_ops/cc/ops/attention/attention_share.h"

namespace xla_ops {
namespace {

// More pieces than this gain nothing at 32k tokens on an H100, the longest
// measured: the kernel that combines them has as many to read.
constexpr int64_t kMostSplits = 64;
// Tiles times pieces. A decode step has a thread block a tile, and a large GPU
// holds 4 of them on each of some 130 multiprocessors.
constexpr int64_t kMostBlocks = 512;
// A piece is not worth a block of its own below the kernels' tile of tokens.
constexpr int64_t kLeastTokens = 64;

// Packed rows of a tile in prefill on Hopper (Sm90Shape). By mma.sync small
// calls have tiles of 64 rows (MmaTileRows), which fill a GPU sooner.
constexpr int64_t PrefillRows(int64_t head_dim) {
  return head_dim <= 64 ? 192 : 128;
}
// Prefill's multiprocessors and times in ns on an H200: a KV tile of 128
// tokens, by its full rate there; a tile's partial result, written and read,
// and one more kernel, both estimated.
constexpr int64_t kProcessors = 132;
constexpr int64_t kKvTileTokens = 128;
constexpr int64_t kKvTileTime = 1800;
constexpr int64_t kPartialTime = 33;
constexpr int64_t kCombineTime = 4000;
// Of prefill's pieces.
constexpr int64_t kLeastKvTiles = 2;

// Slots times KV heads. A large GPU holds 528 blocks; with 512 slots an H200
// took up to a sixth longer where a few lengths differ (benchmarks/NOTES.md).
constexpr int64_t kSlotBlocks = 384;

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// False where they are more than any call has.
bool CountRows(const XlaOpsAttentionRequest& request, int64_t* rows) {
  const int64_t group =
      request.num_heads / std::max<int64_t>(1, request.num_kv_heads);
  return !__builtin_mul_overflow(request.num_tokens, group, rows) &&
         request.max_num_seqs <= kAttentionMaxSeqs;
}

bool IsDecode(const XlaOpsAttentionRequest& request, int64_t rows) {
  return rows / kDecodeRows <= request.max_num_seqs &&
         rows <= kDecodeRows * request.max_num_seqs;
}

}  // namespace

// Lengths are on the device, so only bounds are known here: enough pieces that
// a batch of few tokens still occupies a large GPU, and none at all for a
// prefill, whose rows fill it. A piece's time falls with the number of pieces
// and the time to combine them rises with it, so the best number grows as the
// root of the length: on an H100 16 for 1024 tokens, 32 for 4096, 64 for 32768.
//
// A power of two, so that a bound which grows token by token seldom makes a new
// program.
int64_t ChooseDecodeSplits(int64_t tiles, int64_t max_kv_len) {
  int64_t splits = 1;
  while (splits < kMostSplits && tiles <= kMostBlocks / (2 * splits) &&
         std::max(2 * splits * kLeastTokens, 16 * splits * splits) <=
             max_kv_len) {
    splits *= 2;
  }
  return splits;
}

// A multiprocessor works on one tile at a time, so what counts is the number of
// waves: few tiles leave most of the GPU idle, and a few more than it has
// multiprocessors leave it idle half of the time.
int64_t ChoosePrefillSplits(int64_t tiles, int64_t max_kv_len) {
  const int64_t kv_tiles = CeilDivide(max_kv_len, kKvTileTokens);
  const auto time = [&](int64_t splits) {
    return CeilDivide(tiles * splits, kProcessors) *
               CeilDivide(kv_tiles, splits) * kKvTileTime +
           (splits > 1 ? tiles * splits * kPartialTime + kCombineTime : 0);
  };
  int64_t best = 1;
  // The workspace grows with tiles times pieces too.
  for (int64_t splits = 2;
       splits <= kMostSplits && tiles <= 2 * kProcessors / splits &&
       kv_tiles >= splits * kLeastKvTiles;
       splits *= 2) {
    if (time(splits) < time(best)) best = splits;
  }
  return best;
}

int64_t ChooseNumSplits(const XlaOpsAttentionRequest& request) {
  int64_t rows;
  int64_t tiles;
  if (!CountRows(request, &rows)) return 1;
  const bool is_decode = IsDecode(request, rows);
  // What sequences of a row or more could have at most, a tile of each in part
  // full.
  const int64_t tile_rows =
      is_decode ? kDecodeRows : PrefillRows(request.head_dim);
  const int64_t bound =
      std::min(request.num_tokens,
               std::max<int64_t>(0, rows - request.max_num_seqs) / tile_rows +
                   request.max_num_seqs);
  if (__builtin_mul_overflow(bound, request.num_kv_heads, &tiles)) return 1;
  return is_decode ? ChooseDecodeSplits(tiles, request.max_kv_len)
                   : ChoosePrefillSplits(tiles, request.max_kv_len);
}

int64_t ChooseNumSlots(const XlaOpsAttentionRequest& request) {
  int64_t rows;
  // The bound may have been rounded down to a power of two.
  if (request.max_kv_len < kShareLongTokens || request.max_num_seqs < 2 ||
      !CountRows(request, &rows) || !IsDecode(request, rows)) {
    return 0;
  }
  const int64_t slots =
      kSlotBlocks / std::max<int64_t>(1, request.num_kv_heads);
  return slots < 2 ? 0 : slots;
}

const char* MakeAttentionPlan(const XlaOpsAttentionRequest& request,
                              bool can_split, XlaOpsAttentionPlan* plan) {
  if (request.struct_bytes <
      static_cast<int64_t>(sizeof(XlaOpsAttentionRequest))) {
    return "request.struct_bytes must be at least "
           "sizeof(XlaOpsAttentionRequest)";
  }
  if (plan->struct_bytes < static_cast<int64_t>(sizeof(XlaOpsAttentionPlan))) {
    return "plan.struct_bytes must be at least sizeof(XlaOpsAttentionPlan)";
  }
  for (const int64_t size :
       {request.num_tokens, request.num_heads, request.num_kv_heads,
        request.head_dim, request.max_num_seqs, request.max_kv_len}) {
    if (size < 0) return "sizes must be at least 0";
  }
  if (request.num_splits < 0 || request.num_splits > kAttentionMaxSplits) {
    return "num_splits must be from 0 to 1024";
  }
  int64_t splits = request.num_splits;
  if (splits == 0) {
    splits = can_split ? ChooseNumSplits(request) : 1;
  }
  int64_t unused;
  if (__builtin_mul_overflow(request.num_tokens, request.num_heads, &unused) ||
      __builtin_mul_overflow(unused, request.head_dim + 2, &unused) ||
      __builtin_mul_overflow(unused, splits * 4, &unused) ||
      __builtin_add_overflow(unused, kAttentionSchedulerBytes, &unused)) {
    return "the workspace must have less than 2^63 bytes";
  }
  const int64_t slots = can_split && splits == 1 ? ChooseNumSlots(request) : 0;
  int64_t slot_bytes;
  if (__builtin_mul_overflow(
          slots * request.num_kv_heads * kAttentionSlotRows * 4,
          request.head_dim + 2, &slot_bytes) ||
      __builtin_add_overflow(unused, slot_bytes, &unused)) {
    return "the workspace must have less than 2^63 bytes";
  }
  plan->num_splits = splits;
  plan->workspace_bytes =
      AttentionWorkspaceBytes(request.num_tokens, request.num_heads,
                              request.head_dim, splits) +
      slot_bytes;
  return nullptr;
}

}  // namespace xla_ops
