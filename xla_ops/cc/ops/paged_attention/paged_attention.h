// Attention of ragged queries over a paged KV cache: prefill, chunked
// prefill and decode mixed in one batch.
//
// Sequence s < num_seqs[0] owns the query rows
//   [query_start_loc[s], query_start_loc[s + 1])
// and the KV tokens 0 .. context_lens[s] - 1, the new tokens included; KV
// token j lies in block block_tables[s, j / page_size] at j % page_size.
// Query row i of L_q sees token j when, with p = i + context_lens[s] - L_q
// (bottom-right aligned causal mask),
//   j <= p   and, with sliding_window W > 0,   j > p - W.
//   logit = scale * q.k;  soft_cap C > 0: logit = C * tanh(logit / C)
//   out = softmax(logit) v, accumulated in fp32
// Query head h reads KV head h / (num_heads / num_kv_heads).
//
// Defined for all values of the integer tensors, and never out of bounds:
//   - a row that sees no token, and a row of no sequence, is zero;
//   - a block id outside [0, num_blocks) masks its tokens;
//   - context_lens is clamped to [0, max_blocks * page_size],
//     query_start_loc to [previous, num_tokens], num_seqs to
//     [0, max_num_seqs].
//
// Target `xla_ops.paged_attention`:
//   args    query           [num_tokens, num_heads, head_dim]
//           key_cache, value_cache   query's dtype, buffers of any shape
//                           (perhaps the same one), described by attributes
//                           as in reshape_and_cache_flash.h
//           context_lens    s32 [max_num_seqs]
//           block_tables    s32 [max_num_seqs, max_blocks]
//           query_start_loc s32 [max_num_seqs + 1]
//           num_seqs        s32 [1]
//   results out             as query
//           workspace       u8 [PagedAttentionWorkspaceBytes(...)], scratch
//   attrs   scale f32; sliding_window i64 (0: none); soft_cap f32 (0: none);
//           num_splits i64, 1 to 1024; num_kv_heads, num_blocks, page_size,
//           block_stride, page_stride, head_stride, key_offset,
//           value_offset i64; debug bool
// num_splits: into how many pieces each sequence's KV tokens are cut, each
// worked on by its own thread blocks and then combined. The host cannot see
// context_lens, so the caller picks it from shapes; the device divides the
// actual length by it. The CPU handler ignores it.
// fp32, fp16, bf16; head_dim a multiple of 8 up to 256;
// num_heads % num_kv_heads == 0; any page_size.
//
// Tested by paged_attention_test.cc and tests/test_paged_attention.py.

#ifndef XLA_OPS_CC_OPS_PAGED_ATTENTION_PAGED_ATTENTION_H_
#define XLA_OPS_CC_OPS_PAGED_ATTENTION_PAGED_ATTENTION_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct PagedAttentionParams {
  DType dtype;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t num_blocks;
  int64_t page_size;
  int64_t max_num_seqs;
  int64_t max_blocks;     // width of block_tables
  int64_t num_splits;     // 1 to 1024
  // Elements from one (block, offset in page, head) to the next.
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  float scale;
  int64_t sliding_window;  // 0: none
  float soft_cap;          // 0: none
  const void* query;
  const void* key_cache;
  const void* value_cache;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int32_t* query_start_loc;
  const int32_t* num_seqs;
  void* out;
  void* workspace;
  int64_t workspace_bytes;
  bool debug;
};

// Partial results of every split: for each split and query row and head an
// unnormalised fp32 accumulator [head_dim], the running maximum and the sum.
constexpr int64_t PagedAttentionWorkspaceBytes(int64_t num_tokens,
                                               int64_t num_heads,
                                               int64_t head_dim,
                                               int64_t num_splits) {
  return num_splits <= 1 ? 0
                         : num_splits * num_tokens * num_heads *
                               (head_dim + 2) * int64_t{sizeof(float)};
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_PAGED_ATTENTION_PAGED_ATTENTION_H_
