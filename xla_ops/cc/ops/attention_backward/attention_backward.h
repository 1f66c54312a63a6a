// The gradient of attention (attention/attention.h, whose contract of the
// batch, its clamping and its absent operands holds here word for word).
//
// With row i of head h, its logits s_j after cap and slopes, and
//   w_j   = exp(s_j - lse),  0 for a token that the row does not see
//   g_j   = v_scale * grad_out.v_j
//   delta = grad_out.out - grad_lse             (0 for an absent grad_lse)
//   ds_j  = w_j * (g_j - delta)
//   dx_j  = ds_j * (1 - tanh^2(x_j / C))        with a soft_cap C, x_j the
//                                               logit before it; else ds_j
// the results are
//   dq    = sum over j of dx_j * scale * k_scale * k_j
//   dk_j  = sum over rows, and the query heads of a KV head, of
//           dx_j * scale * q
//   dv_j  = sum over the same of w_j * grad_out
//   dsinks[h] = -sum over rows of exp(sinks[h] - lse) * delta
// accumulated in fp32; tensor-core kernels may round w and dx to query's dtype
// before they meet a matrix. `out` and `lse` are those of the forward.
//
// A row that sees no token, and a row of no sequence, has an lse of +inf: its
// dq is zero and it adds nothing, whatever finite number grad_out holds there
// and whatever grad_lse does. A token that no row sees, a row of key and value
// that is no sequence's token, has zero dk and dv. Sequences own distinct rows
// of key and value: where cu_seqlens_k, seqused_k and leftpad_k make a row
// two sequences' token (seqused_k beyond the next cu_seqlens_k), its dk and dv
// are the sum of both. A NaN or an infinity may reach rows and tokens of its
// sequence that it has no part in, by 0 * NaN.
//
// Targets `xla_ops.flash_attn_varlen_backward` and
// `xla_ops.paged_attention_backward`, which differ in how their errors name
// the arguments:
//   args    grad_out      as out
//           query, key, value   as in attention.h
//           out           as query
//           lse           f32 [num_heads, num_tokens]
//           grad_lse      f32 [num_heads, num_tokens]     *
//           cu_seqlens_q to v_scale, ten tensors, as in attention.h
//           * absent where it has no element
//   results dq            as query
//           dk, dv        [num_kv_tokens, num_kv_heads, head_dim], dense, of
//                         query's dtype
//           dsinks        f32 [num_heads]
//           workspace     u8 [plan's workspace_bytes], scratch
//   attrs   those of attention.h but num_splits and debug, and
//           deterministic bool; wants_dq, wants_dkv, wants_dsinks bool
// A result that is not wanted has no element and is not computed.
// wants_dkv: not with `paged` nor with kv_cache_dtype other than "auto": a
// cache has no gradient. wants_dsinks: not where sinks are absent.
// deterministic: dq and dsinks are bitwise the same in every run; dk and dv
// are in any case. The CPU handler is deterministic in any case.
// Slopes, and scales of 8-bit keys and values, have no gradient.
// Nothing is reported in debug mode: the forward did.
//
// dk and dv are written even where there is no query row and no sequence.
//
// Tested by attention_backward*_test.cc, tests/ops/test_attention_backward.py
// and, on a GPU, tests/gpu/check_attention_backward.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_H_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_H_

#include <cstdint>

#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {

// Pointers marked * are null where the operand is absent or the result is not
// wanted.
struct AttentionBackwardParams {
  // The batch. Its num_splits is 1, debug false, and out, lse and workspace
  // are null: those below are meant.
  AttentionParams batch;
  const void* grad_out;   // [num_tokens, num_heads, head_dim]
  const void* out;        // the same
  const float* lse;       // [num_heads, num_tokens]
  const float* grad_lse;  // *, the same
  void* dq;               // *, [num_tokens, num_heads, head_dim]
  void* dk;               // *, [num_kv_tokens, num_kv_heads, head_dim]
  void* dv;               // *, the same
  float* dsinks;          // *, [num_heads]
  void* workspace;
  int64_t workspace_bytes;
  bool deterministic;
  bool wants_dq;
  bool wants_dkv;
  bool wants_dsinks;
};

// Rows of key and value, and of dk and dv, where they are contiguous.
inline int64_t NumKvTokens(const AttentionBackwardParams& params) {
  return params.batch.page_size;
}

// What the CUDA kernels take of `workspace`, each rounded up to 256 bytes:
//   segments     s32 [4, max_num_seqs + 2]
//   tiles        s32 [2, max_num_seqs + 3]
//   lse, delta   fp32 [2, num_heads, rows]
//   dq           fp32 [num_heads, rows, padded head_dim], where blocks add to
//                it
// in which rows are those of the query's tiles, each of one sequence: at most
// num_tokens / kBackwardTileRows + max_num_seqs + 2 tiles of that many, and no
// more than there are tokens.
constexpr int64_t kBackwardTileRows = 128;

// The smallest head_dim of those kernels that holds this one.
constexpr int64_t BackwardPaddedHeadDim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

constexpr int64_t BackwardMaxTiles(int64_t num_rows, int64_t max_num_seqs,
                                   int64_t tile_rows) {
  const int64_t tiles = num_rows / tile_rows + max_num_seqs + 2;
  return tiles < num_rows ? tiles : num_rows;
}

constexpr int64_t BackwardAligned(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}

constexpr int64_t AttentionBackwardWorkspaceBytes(int64_t num_tokens,
                                                  int64_t num_heads,
                                                  int64_t head_dim,
                                                  int64_t max_num_seqs) {
  const int64_t rows =
      num_heads * kBackwardTileRows *
      BackwardMaxTiles(num_tokens, max_num_seqs, kBackwardTileRows);
  return BackwardAligned(16 * (max_num_seqs + 2)) +
         BackwardAligned(8 * (max_num_seqs + 3)) + BackwardAligned(8 * rows) +
         BackwardAligned(4 * rows * BackwardPaddedHeadDim(head_dim));
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_H_
