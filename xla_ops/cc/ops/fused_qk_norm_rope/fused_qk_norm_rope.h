// RMSNorm of each head of queries and keys and their rotary position embedding,
// in one pass over a fused projection and in place.
//
// A row of qkv holds num_heads_q heads of queries, num_heads_k of keys and
// num_heads_v of values. With w the weight of queries or of keys, and cos[i] =
// cache[p, i], sin[i] = cache[p, head_dim / 2 + i] for a token at position p:
//   y[d] = x[d] * (w[d] / sqrt(mean(x^2) + eps))
//   (x[a], x[b]) <- (T(y[a] * cos[i] - y[b] * sin[i]),
//                    T(y[b] * cos[i] + y[a] * sin[i]))
// where pair i is (a, b) = (i, i + head_dim / 2) with is_neox and (2 i, 2 i +
// 1) without. All of it is fp32, rounded once to the tensor's type T, as in
// vLLM. Values stay. A token whose position is outside [0, max_position), which
// vLLM leaves undefined, is normalised and not rotated.
//
// Target `xla_ops.fused_qk_norm_rope`:
//   args     qkv           [num_tokens, all heads * head_dim]  fp32, fp16, bf16
//            q_weight      [head_dim], qkv's dtype
//            k_weight      [head_dim], qkv's dtype
//            cos_sin_cache [max_position, head_dim], qkv's dtype or fp32
//            position_ids  [num_tokens]  s64 or s32
//   results  qkv           aliased to the argument
//   attrs    num_heads_q, num_heads_k, num_heads_v, head_dim i64, eps f32,
//            is_neox bool
// Where the result is not aliased (no caller of ours) it is copied first.
//
// Tested by fused_qk_norm_rope_test.cc and
// tests/ops/test_fused_qk_norm_rope.py.

#ifndef XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_H_
#define XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct FusedQkNormRopeParams {
  DType dtype;
  DType cache_dtype;      // `dtype` or kF32
  DType positions_dtype;  // kS64 or kS32
  int64_t num_tokens;
  int64_t num_heads_q;
  int64_t num_heads_k;
  int64_t num_heads_v;
  int64_t head_dim;  // even
  int64_t max_position;
  float eps;
  bool is_neox;
  const void* qkv;            // [num_tokens, all heads, head_dim]
  const void* q_weight;       // [head_dim]
  const void* k_weight;       // [head_dim]
  const void* cos_sin_cache;  // [max_position, head_dim]
  const void* positions;      // [num_tokens]
  void* out;                  // like qkv; usually `qkv`
};

// What one CUDA launch can count: heads and a head's elements in 31 bits.
inline constexpr int64_t kMaxCudaTokenElements = int64_t{1} << 30;

inline int64_t NumHeads(const FusedQkNormRopeParams& params) {
  return params.num_heads_q + params.num_heads_k + params.num_heads_v;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_FUSED_QK_NORM_ROPE_H_
