// Attention of ragged queries over contiguous keys and values or over a
// paged KV cache: prefill, chunked prefill and decode mixed in one batch.
//
// Sequence s < num_seqs owns the query rows
//   [cu_seqlens_q[s], cu_seqlens_q[s + 1]),    L_q of them,
// and KV tokens 0 .. L_k - 1, the new tokens included:
//   paged       L_k = seqused_k[s]; token j lies in block
//               block_table[s, j / page_size] at j % page_size
//   contiguous  token j is row cu_seqlens_k[s] + leftpad_k[s] + j, and
//               L_k = (seqused_k[s], or cu_seqlens_k[s + 1] -
//               cu_seqlens_k[s]) - leftpad_k[s]
// Query row i (p = i + L_k - L_q, so bottom-right aligned) sees token j when
//   window_left  < 0  or  j >= p - window_left,     and
//   window_right < 0  or  j <= p + window_right     (causal: window_right 0)
//   logit = scale * q.k * k_scale[s, kv_head]
//   soft_cap C > 0:  logit = C * tanh(logit / C)
//   alibi_slopes:    logit -= slope[head] * |p - j|
//   out = sum_j w_j v_j * v_scale[s, kv_head], w = softmax(logit); a sink
//   adds exp(sink[head]) to the softmax's denominator, and no value
//   lse = log(denominator), natural, the sink included
// accumulated in fp32. In the tensor-core kernels the weights are rounded to
// query's dtype before they meet V; with 8-bit keys and values to fp16, and so
// is Q, where it is bf16 relative to the power of two below its row's largest
// magnitude. Query head h reads KV head h / (num_heads / num_kv_heads).
//
// Defined for all values of the integer tensors, and never out of bounds:
//   - a row that sees no token, or none with a logit above -inf, and a row
//     of no sequence, is zero, and its lse is +inf, with a sink too;
//   - a block id outside [0, num_blocks) masks its tokens;
//   - num_seqs is clamped to [0, max_num_seqs], cu_seqlens_q to [previous,
//     num_tokens], cu_seqlens_k to [previous, num_kv_tokens], leftpad_k to
//     [0, L_k], seqused_k to [0, what the sequence's pages or, contiguous,
//     the rows from cu_seqlens_k[s] to the buffer's end hold].
// What lies past L_k or in masked blocks is never used, NaN neither. A NaN or
// an infinity in V at a token of the sequence may reach rows that do not see
// that token, by 0 * NaN: kernels work on tiles of rows and tokens.
// With `debug` such values are reported, on stderr or a GPU's stdout, as in
//   xla_ops: paged_attention: context_lens[3] must be from 0 to 24, got 99;
//   clamped              (on one line; "masked" for a block id)
//
// Targets `xla_ops.flash_attn_varlen` and `xla_ops.paged_attention`, which
// differ in how their errors name the arguments (attention_checks.h):
//   args    query        [num_tokens, num_heads, head_dim]
//           key, value   buffers of any shape (perhaps the same one),
//                        described by attributes as in
//                        reshape_and_cache_flash.h
//           cu_seqlens_q s32 [max_num_seqs + 1]
//           cu_seqlens_k s32 [max_num_seqs + 1]           *
//           seqused_k    s32 [max_num_seqs]               *
//           block_table  s32 [max_num_seqs, max_blocks]   *
//           leftpad_k    s32 [max_num_seqs]               *
//           num_seqs     s32 [1]                          *
//           alibi_slopes f32 [num_heads] or [max_num_seqs, num_heads]  *
//           sinks        f32 [num_heads]                  *
//           k_scale, v_scale  f32 [1] or [max_num_seqs, num_kv_heads]  *
//           * absent where it has no element (`paged` says whether there
//             is a block table, which may be empty)
//   results out          as query
//           lse          f32 [num_heads, num_tokens]
//           workspace    u8 [AttentionWorkspaceBytes(...)], scratch
//   attrs   scale f32; window_left, window_right i64 (-1: unbounded);
//           soft_cap f32 (0: none); kv_cache_dtype string "auto", "fp8",
//           "fp8_e4m3" or "fp8_e5m2"; paged bool; num_splits i64, 1 to
//           1024; num_kv_heads, num_blocks, page_size, block_stride,
//           page_stride, head_stride, key_offset, value_offset i64; debug
//           bool
// paged: cu_seqlens_k and leftpad_k are absent, seqused_k is not.
// Contiguous: cu_seqlens_k is not absent; the buffer is one block
// (num_blocks 1) of page_size = num_kv_tokens rows.
// num_seqs absent: max_num_seqs. k_scale, v_scale absent: 1.
// kv_cache_dtype "auto": key and value have query's dtype, and scales must be
// absent; else they are uint8 or the fp8 type named.
// num_splits: into how many pieces each sequence's KV tokens are cut, each
// worked on by its own thread blocks and then combined. The host cannot see
// lengths, so the caller picks it from bounds, or asks the library, with the
// workspace's size (attention_plan.h); the device divides the actual length by
// it. The CPU handler ignores it. With one split, and slots in the workspace,
// CUDA's kernel for decode cuts sequences that are much longer than the others
// (attention_share.h): there the order in which a sequence's tokens are added
// up, and so the last bits of its rows, follow from the lengths of all. The
// same call has the same bits.
// fp32, fp16, bf16; head_dim a multiple of 8 up to 256;
// num_heads % num_kv_heads == 0; any page_size. CUDA: no more rows (token,
// head), sequences and KV heads than kAttentionMax... below.
//
// Tested by attention*_test.cc, tests/ops/test_paged_attention.py and
// tests/ops/test_flash_attn_varlen.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

// Which target was called; the kernels tell them apart in reports alone.
enum class AttentionOp : uint8_t { kFlashAttnVarlen, kPagedAttention };

// Pointers marked * are null where the operand is absent.
struct AttentionParams {
  AttentionOp op;
  DType dtype;     // of query and out
  DType kv_dtype;  // dtype, kF8E4M3FN or kF8E5M2
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t max_num_seqs;
  bool paged;
  int64_t num_blocks;  // contiguous: 1
  int64_t page_size;   // contiguous: num_kv_tokens
  int64_t max_blocks;  // width of block_table; contiguous: 0
  int64_t num_splits;  // 1 to 1024
  // Elements from one (block, offset in page, head) to the next.
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  float scale;
  int64_t window_left;   // -1: unbounded
  int64_t window_right;  // -1: unbounded
  float soft_cap;        // 0: none
  const void* query;
  const void* key;
  const void* value;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;  // *
  const int32_t* seqused_k;     // *
  const int32_t* block_table;   // unused where not paged
  const int32_t* leftpad_k;     // *
  const int32_t* num_seqs;      // *
  const float* alibi_slopes;    // *
  const float* sinks;           // *
  const float* k_scale;         // *
  const float* v_scale;         // *
  // Elements from one sequence to the next; 0 where all share one row.
  int64_t alibi_seq_stride;
  // From one sequence, and one KV head, to the next; 0 for one value.
  int64_t kv_scale_seq_stride[2];  // of k_scale, v_scale
  int64_t kv_scale_head_stride[2];
  void* out;
  float* lse;
  void* workspace;
  int64_t workspace_bytes;
  bool debug;
};

// CUDA's limits: kernels count rows and sequences in 32 bits, and a grid has a
// KV head an index of y. Beyond them the handler returns an error that names
// the argument, and LaunchAttention cudaErrorInvalidConfiguration.
constexpr int64_t kAttentionMaxRows = INT32_MAX;  // num_tokens * num_heads
constexpr int64_t kAttentionMaxSeqs = INT32_MAX / 2;
constexpr int64_t kAttentionMaxKvHeads = 65535;

// More splits than this never pay, and the bound keeps the workspace's size
// from overflowing.
constexpr int64_t kAttentionMaxSplits = 1024;

// The workspace begins with the tile scheduler's counter, a 32-bit word in a
// cache line of its own.
constexpr int64_t kAttentionSchedulerBytes = 128;

// Then, of every split and each query row and head, an unnormalised fp32
// accumulator [head_dim], the running maximum and the sum. A workspace has at
// least that.
constexpr int64_t AttentionWorkspaceBytes(int64_t num_tokens, int64_t num_heads,
                                          int64_t head_dim,
                                          int64_t num_splits) {
  return kAttentionSchedulerBytes +
         (num_splits <= 1 ? 0
                          : num_splits * num_tokens * num_heads *
                                (head_dim + 2) * int64_t{sizeof(float)});
}

// With one split, what is left of the workspace are slots, each for a piece of
// one sequence that the kernel for decode cuts by its length: the same of up to
// 16 packed rows of every KV head. It cuts none where there are none.
constexpr int64_t kAttentionSlotRows = 16;
constexpr int64_t AttentionSlotBytes(int64_t num_kv_heads, int64_t head_dim) {
  return num_kv_heads * kAttentionSlotRows * (head_dim + 2) *
         int64_t{sizeof(float)};
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_H_
