// The number of splits, and the workspace that they take.

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_num_splits.h"

namespace xla_ops {
namespace {

// More pieces than this gain nothing at 32k tokens on an H100, the longest
// measured: the kernel that combines them has as many to read.
constexpr int64_t kMostSplits = 64;
// Rows times pieces. A decode step has a thread block a row, and a large GPU
// holds 4 of them on each of some 130 multiprocessors.
constexpr int64_t kMostBlocks = 512;
// A piece is not worth a block of its own below the kernels' tile of tokens.
constexpr int64_t kLeastTokens = 64;

}  // namespace

// Lengths are on the device, so only bounds are known here: enough pieces that
// a batch of few tokens still occupies a large GPU, and none at all for a
// prefill, whose rows fill it. A piece's time falls with the number of pieces
// and the time to combine them rises with it, so the best number grows as the
// root of the length: on an H100 16 for 1024 tokens, 32 for 4096, 64 for 32768.
//
// A power of two, so that a bound which grows token by token seldom makes a new
// program.
int64_t ChooseNumSplits(int64_t rows, int64_t max_kv_len) {
  int64_t splits = 1;
  while (splits < kMostSplits && rows <= kMostBlocks / (2 * splits) &&
         std::max(2 * splits * kLeastTokens, 16 * splits * splits) <=
             max_kv_len) {
    splits *= 2;
  }
  return splits;
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
    int64_t rows;
    if (__builtin_mul_overflow(request.num_tokens, request.num_kv_heads,
                               &rows)) {
      rows = INT64_MAX;
    }
    splits = can_split ? ChooseNumSplits(rows, request.max_kv_len) : 1;
  }
  int64_t unused;
  if (__builtin_mul_overflow(request.num_tokens, request.num_heads, &unused) ||
      __builtin_mul_overflow(unused, request.head_dim + 2, &unused) ||
      __builtin_mul_overflow(unused, splits * 4, &unused) ||
      __builtin_add_overflow(unused, kAttentionSchedulerBytes, &unused)) {
    return "the workspace must have less than 2^63 bytes";
  }
  plan->num_splits = splits;
  plan->workspace_bytes = AttentionWorkspaceBytes(
      request.num_tokens, request.num_heads, request.head_dim, splits);
  return nullptr;
}

}  // namespace xla_ops
