// Writes new keys and values into a paged KV cache of vLLM's first layout, at
// given slots.
//
//   key cache    [num_blocks, num_kv_heads, head_dim / x, page_size, x]
//   value cache  [num_blocks, num_kv_heads, head_dim, page_size], which is the
//                same with an x of 1
// For token t with slot s = slot_mapping[t] >= 0:
//   cache[s / page_size, h, d / x, s % page_size, d % x] = convert(key[t, h,
//   d])
// Slots out of range, tokens that share a slot, and convert() are as in
// reshape_and_cache_flash.h.
//
// Three targets share one kernel. They differ in what a caller can alias:
//   xla_ops.reshape_and_cache
//     args    key [num_key_tokens, num_kv_heads, head_dim], value (same),
//             key_cache, value_cache, slot_mapping s64 [num_tokens],
//             k_scale f32 [1], v_scale f32 [1], or of no element: 1
//     results key_cache, value_cache (aliased to the arguments)
//   xla_ops.reshape_and_cache_stacked
//     args    key, value, kv_cache, slot_mapping, k_scale, v_scale
//     results kv_cache (aliased), a buffer that holds both caches
//   xla_ops.reshape_and_cache_one
//     args    key, key_cache, slot_mapping, k_scale    (or the values')
//     results key_cache (aliased)
//   attrs
//     kv_cache_dtype string  "auto", "fp8", "fp8_e4m3" or "fp8_e5m2"
//     num_blocks, page_size  i64
//     key_x, key_block_stride, key_offset              i64, in elements
//     value_block_stride, value_offset                 the same; not in _one
//     debug          bool    report skipped out-of-range slots on stderr
//                            (stdout on a GPU)
// key: fp32, fp16 or bf16; num_key_tokens >= num_tokens, further rows are
// ignored. Cache: key's dtype with "auto", else uint8 or the fp8 type named.
//
// A cache operand is a buffer of any shape: block b of the key cache is dense
// and begins key_offset + b * key_block_stride elements into it. In _one, key_x
// of 1 makes the cache one of values. Where a result is not aliased (no caller
// of ours) it is copied first.
//
// Tested by reshape_and_cache_test.cc and tests/ops/test_reshape_and_cache.py.

#ifndef XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_H_
#define XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

// Rows and the cache that they go to.
struct ReshapeAndCacheSide {
  const void* rows;    // [>= num_tokens, num_kv_heads, head_dim]
  void* cache;         // block 0
  const float* scale;  // [1], or null: 1; read for fp8 caches
  int64_t x;           // divides head_dim
  int64_t block_stride;
  // What has to be copied first, to a result that is another buffer; or null.
  const void* copy_from;
  void* copy_to;
  int64_t copy_bytes;
};

struct ReshapeAndCacheParams {
  DType dtype;        // of the rows
  DType cache_dtype;  // == dtype, or kF8E4M3FN / kF8E5M2
  int64_t num_tokens;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t num_blocks;
  int64_t page_size;
  const int64_t* slot_mapping;  // [num_tokens]
  bool debug;
  int num_sides;  // 2, or 1: the first
  ReshapeAndCacheSide sides[2];
};

// What one CUDA launch can count: units of a row in a grid.
inline constexpr int64_t kMaxCudaTokenElements = int64_t{65535} * 16;

// Whether there is nothing to write.
inline bool IsEmpty(const ReshapeAndCacheParams& params) {
  return params.num_tokens == 0 || params.num_kv_heads == 0 ||
         params.head_dim == 0 || params.num_blocks == 0 ||
         params.page_size == 0;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_H_
