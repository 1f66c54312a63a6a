// Rotary position embedding of queries and, if given, keys.
//
// For token t at position p, cos[i] = cache[p, i] and sin[i] =
// cache[p, rotary_dim / 2 + i]. Each head's first rotary_dim elements are
// rotated in pairs (x, y), pair i being elements (i, i + rotary_dim / 2) with
// is_neox and (2 i, 2 i + 1) without (GPT-J's order):
//   x' = T(T(x * cos[i]) - T(y * sin[i]))
//   y' = T(T(y * cos[i]) + T(x * sin[i]))
// T rounds to the tensor's type, each product too, as in vLLM; cos and sin
// first, where the cache is fp32. Elements from rotary_dim on are copied. A
// position outside [0, max_position), which vLLM leaves undefined, copies its
// token unrotated: -1 marks padding.
//
// Target `xla_ops.rotary_embedding`:
//   args     positions     s64 or s32, [num_tokens] or [batch_size, seq_len]
//            query         [positions' shape, num_heads * head_size] or
//                          [positions' shape, num_heads, head_size];
//                          fp32, fp16 or bf16
//            key           likewise with num_kv_heads, a divisor of num_heads
//            cos_sin_cache [max_position, rotary_dim], query's dtype or fp32
//   results  query, key    like the arguments
//   attrs    head_size i64, is_neox bool
// Target `xla_ops.rotary_embedding_one`: the same without key.
// A result may lie in its argument's buffer.
//
// Tested by rotary_embedding_test.cc and tests/ops/test_rotary_embedding.py.

#ifndef XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_H_
#define XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

// The queries or the keys.
struct RotaryHeads {
  int64_t num_heads;  // zero where there are no keys
  const void* in;     // [num_tokens, num_heads, head_size]
  void* out;          // the same; may be `in`
};

// What one CUDA launch can count of a token, query's and key's together.
inline constexpr int64_t kMaxCudaTokenElements = int64_t{1} << 30;

struct RotaryEmbeddingParams {
  DType dtype;
  int64_t num_tokens;
  int64_t head_size;
  int64_t rotary_dim;  // even, <= head_size
  int64_t max_position;
  bool is_neox;
  DType positions_dtype;      // kS64 or kS32
  const void* positions;      // [num_tokens]
  DType cache_dtype;          // `dtype` or kF32
  const void* cos_sin_cache;  // [max_position, rotary_dim]
  RotaryHeads query;
  RotaryHeads key;
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_H_
