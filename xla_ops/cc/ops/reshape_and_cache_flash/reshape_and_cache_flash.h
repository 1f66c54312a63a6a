// Writes new keys and values into a paged KV cache, at given slots.
//
// For token t with slot s = slot_mapping[t] >= 0:
//   cache[s / page_size, s % page_size, h, :] = convert(key[t, h, :])
// A negative slot skips its token (padding); a slot at or past
// num_blocks * page_size is skipped too, never written out of bounds. Tokens
// should have slots of their own: where several share one, the last of them is
// written on a CPU; on CUDA each element is one of theirs, so that heads, parts
// of a head, key and value may be of different tokens. (So pad with -1, not
// with a slot.) convert() is the identity for kv_cache_dtype "auto" and, for
// "fp8"/"fp8_e4m3"/"fp8_e5m2", saturating round-to-nearest-even of
// float(x) / scale; NaN stays NaN and infinities saturate to the largest finite
// value, as in vLLM.
//
// Three targets share one kernel. They differ in what a caller can alias:
//   xla_ops.reshape_and_cache_flash
//     args    key [num_key_tokens, num_kv_heads, head_dim], value (same),
//             key_cache, value_cache, slot_mapping s64 [num_tokens],
//             k_scale f32 [1], v_scale f32 [1], or of no element: 1
//     results key_cache, value_cache (aliased to the arguments)
//   xla_ops.reshape_and_cache_flash_stacked
//     args    key, value, kv_cache, slot_mapping, k_scale, v_scale
//     results kv_cache (aliased), a buffer that holds both caches
//   xla_ops.reshape_and_cache_flash_one
//     args    key, key_cache, slot_mapping, scale     (or the values')
//     results key_cache (aliased)
//   attrs (all three)
//     kv_cache_dtype string  "auto", "fp8", "fp8_e4m3" or "fp8_e5m2"
//     num_blocks, page_size, block_stride, page_stride, head_stride,
//     key_offset, value_offset  i64, in elements: where the caches lie
//     debug          bool    report skipped out-of-range slots on stderr
//                            (stdout on a GPU)
// key: fp32, fp16 or bf16; num_key_tokens >= num_tokens, further rows are
// ignored. Cache: key's dtype with "auto", else uint8 or the fp8 type named.
//
// A cache operand is a buffer of any shape, described by attributes as in
// torch by strides: element (block, offset, head, d) of the key cache is at
//   key_offset + block * block_stride + offset * page_stride
//              + head * head_stride + d.
// XLA arrays have no strides, so this is how NHD, HND (a permuted view) and
// views of a stacked [2, ...] or [num_blocks, 2, ...] cache are written in
// place, in the buffer that they are views of. Offsets and strides must be
// >= 0 and every element must lie inside its buffer (checked before the
// launch). Unused attributes (value_offset of _one) are absent.
// Where a result is not aliased (no caller of ours) it is copied first.
//
// Tested by reshape_and_cache_flash_test.cc and
// tests/ops/test_reshape_and_cache_flash.py.

#ifndef XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_RESHAPE_AND_CACHE_FLASH_H_
#define XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_RESHAPE_AND_CACHE_FLASH_H_

#include <cstdint>

#include "xla_ops/cc/core/cache_copy.h"
#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

// One or two caches written by one launch; `value*` are null for one.
struct ReshapeAndCacheFlashParams {
  DType dtype;        // of key and value
  DType cache_dtype;  // == dtype, or kF8E4M3FN / kF8E5M2
  int64_t num_tokens;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t num_blocks;
  int64_t page_size;
  // Elements from one (block, offset in page, head) to the next; head_dim
  // is dense. These two describe NHD and HND alike.
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  const void* key;              // [>= num_tokens, num_kv_heads, head_dim]
  const void* value;            // the same, or null
  void* key_cache;              // num_blocks * block_stride elements
  void* value_cache;            // the same, or null
  const int64_t* slot_mapping;  // [num_tokens]
  const float* k_scale;         // [1], or null: 1; read for fp8 caches
  const float* v_scale;         // the same
  bool debug;
  CacheCopies copies;  // what has to be copied first
};

// What one CUDA launch can count of a token's key.
inline constexpr int64_t kMaxCudaTokenElements = int64_t{1} << 30;

// Whether there is nothing to write.
inline bool IsEmpty(const ReshapeAndCacheFlashParams& params) {
  return params.num_tokens == 0 || params.num_kv_heads == 0 ||
         params.head_dim == 0 || params.num_blocks == 0 ||
         params.page_size == 0;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_RESHAPE_AND_CACHE_FLASH_H_
