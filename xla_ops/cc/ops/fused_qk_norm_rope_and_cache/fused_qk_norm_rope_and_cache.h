// RMSNorm of each head of queries and keys, their rotary position embedding and
// the write of the new keys and values into a paged KV cache, in one pass over
// a fused projection: what a decoder's attention does before it reads the
// cache.
//
// A row of qkv, which is read alone, holds num_heads heads of queries,
// num_kv_heads of keys and as many of values. Queries and keys are worked on
//   with weights     as fused_qk_norm_rope does: RMSNorm and rotation in fp32,
//                    rounded once
//   without          as rotary_embedding does: no norm, each product and each
//                    sum of the rotation rounded to the tensor's type
// and a token at a position outside [0, max_position) is not rotated. Queries
// are a result, dense, as paged attention takes them; token t's keys and values
// go to slot_mapping[t] of the caches and nowhere else, as
// reshape_and_cache_flash writes them: a slot outside [0, num_blocks *
// page_size) skips its token, tokens from slot_mapping's length on have none,
// and an fp8 cache stores fp8(float(x) / scale) of the rounded x. Slots should
// be of one token each; where several share one, the last of them is written on
// a CPU, and on CUDA each element is one of theirs.
//
// Target `xla_ops.fused_qk_norm_rope_and_cache`:
//   args     qkv           [num_tokens, (num_heads + 2 num_kv_heads) *
//                          head_dim], fp32, fp16 or bf16
//            cos_sin_cache [max_position, head_dim], qkv's dtype or fp32
//            position_ids  [num_tokens]  s64 or s32
//            slot_mapping  s64 [<= num_tokens]
//            q_weight      [head_dim], qkv's dtype; of no element: no norm
//            k_weight      the same
//            k_scale       f32 [1], or of no element: 1; read for fp8 caches
//            v_scale       the same
//            value_cache   a buffer of any shape, see the attributes
//            key_cache     the same
//   results  query         [num_tokens, num_heads, head_dim]
//            key_cache, value_cache  (aliased to the arguments)
// Target `xla_ops.fused_qk_norm_rope_and_cache_stacked`: one kv_cache that
// holds both in place of value_cache and key_cache; results query, kv_cache.
//   attrs    num_heads, num_kv_heads, head_dim i64, eps f32, is_neox bool;
//            kv_cache_dtype, num_blocks, page_size, block_stride, page_stride,
//            head_stride, key_offset, value_offset, debug: what
//            reshape_and_cache_flash has
// The caches come last, in the reverse order of the results: torch_xla numbers
// the parameters of a program from a call's last operand to its first, and XLA
// pairs donated buffers with results by order, so that caches of one size stay
// where they are (docs/adr/0007-in-place.md). Where one is not aliased (no
// caller of ours) it is copied first.
//
// Tested by fused_qk_norm_rope_and_cache_test.cc and
// tests/ops/test_fused_qk_norm_rope_and_cache.py.

#ifndef XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_H_
#define XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_H_

#include <cstdint>

#include "xla_ops/cc/core/cache_copy.h"
#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct FusedQkNormRopeAndCacheParams {
  DType dtype;
  DType table_dtype;      // `dtype` or kF32
  DType positions_dtype;  // kS64 or kS32
  DType cache_dtype;      // `dtype`, or kF8E4M3FN / kF8E5M2
  int64_t num_tokens;
  int64_t num_cached_tokens;  // <= num_tokens: the first ones, which have slots
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;  // even
  int64_t max_position;
  float eps;
  bool is_neox;
  const void* qkv;            // [num_tokens, all heads, head_dim]
  void* query;                // [num_tokens, num_heads, head_dim]
  const void* q_weight;       // [head_dim], or null: no norm
  const void* k_weight;       // the same
  const void* cos_sin_cache;  // [max_position, head_dim]
  const void* positions;      // [num_tokens]
  // The caches; elements of each as reshape_and_cache_flash.h has it.
  int64_t num_blocks;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  void* key_cache;
  void* value_cache;
  const int64_t* slot_mapping;  // [num_cached_tokens]
  const float* k_scale;         // [1], or null: 1; read for fp8 caches
  const float* v_scale;         // the same
  bool debug;
  CacheCopies copies;  // what has to be copied first
};

// What one CUDA launch can count: heads and a head's elements in 31 bits.
inline constexpr int64_t kMaxCudaTokenElements = int64_t{1} << 30;

// Of a row of qkv.
inline int64_t NumHeads(const FusedQkNormRopeAndCacheParams& params) {
  return params.num_heads + 2 * params.num_kv_heads;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_H_
