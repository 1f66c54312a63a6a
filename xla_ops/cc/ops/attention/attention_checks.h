// From FFI operands to AttentionParams; the CPU and the CUDA handler
// share it.
//
// Errors (InvalidArgument) begin with "paged_attention: ":
//   query must be float32, float16 or bfloat16, got int32
//   query must have shape [num_tokens, num_heads, head_dim], got [4, 8]
//   query must have a head_dim that is a multiple of 8 up to 256, got 12
//   key_cache must be float16, got float32          (value_cache likewise)
//   num_kv_heads must divide num_heads 8, got 3
//   num_blocks must be at least 0, got -1    (and the other sizes, strides)
//   key_offset must be at least 0, got -1           (value_offset likewise)
//   key_cache must have at least 256 elements, got 128
//   context_lens must be int32, got int64           (the others likewise)
//   context_lens must have shape [max_num_seqs], got [3, 1]
//   block_tables must have shape [3, max_blocks], got [2, 4]
//   query_start_loc must have shape [4], got [3]
//   num_seqs must have 1 element, got shape [2]
//   scale must be finite, got nan
//   sliding_window must be at least 0, got -1
//   soft_cap must be finite and at least 0, got -1
//   num_splits must be from 1 to 1024, got 0
//   out must have shape [4, 8, 64], got [4, 8, 32]  (and dtype)
//   workspace must be uint8, got float32
//   workspace must have at least 1056 elements, got 16
//
// Tested by attention_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHECKS_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHECKS_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {

// More splits than this never pay, and the bound keeps the workspace's size
// from overflowing.
inline constexpr int64_t kMaxNumSplits = 1024;

// Members are in the order of the registration below, which names them.
struct AttentionAttrs {
  float scale;
  int64_t sliding_window;
  float soft_cap;
  int64_t num_splits;
  int64_t num_kv_heads;
  int64_t num_blocks;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t key_offset;
  int64_t value_offset;
  bool debug;
};

// The binding of every platform; handlers append their context.
inline auto AttentionBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // query
      .Arg<xla::ffi::AnyBuffer>()  // key_cache
      .Arg<xla::ffi::AnyBuffer>()  // value_cache
      .Arg<xla::ffi::AnyBuffer>()  // context_lens
      .Arg<xla::ffi::AnyBuffer>()  // block_tables
      .Arg<xla::ffi::AnyBuffer>()  // query_start_loc
      .Arg<xla::ffi::AnyBuffer>()  // num_seqs
      .Ret<xla::ffi::AnyBuffer>()  // out
      .Ret<xla::ffi::AnyBuffer>()  // workspace
      .Attrs<AttentionAttrs>();
}

// Reads no buffer. The cache pointers of `params` are moved to the view's
// first element. An empty query (no token or no head) is success: the
// handler has nothing to do then. An empty cache or no sequence is success
// too, and every row of `out` is zero.
xla::ffi::Error MakeAttentionParams(
    xla::ffi::AnyBuffer query, xla::ffi::AnyBuffer key_cache,
    xla::ffi::AnyBuffer value_cache, xla::ffi::AnyBuffer context_lens,
    xla::ffi::AnyBuffer block_tables, xla::ffi::AnyBuffer query_start_loc,
    xla::ffi::AnyBuffer num_seqs, xla::ffi::Result<xla::ffi::AnyBuffer> out,
    xla::ffi::Result<xla::ffi::AnyBuffer> workspace,
    const AttentionAttrs& attrs, AttentionParams* params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::AttentionAttrs, StructMember<float>("scale"),
    StructMember<int64_t>("sliding_window"), StructMember<float>("soft_cap"),
    StructMember<int64_t>("num_splits"), StructMember<int64_t>("num_kv_heads"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("block_stride"), StructMember<int64_t>("page_stride"),
    StructMember<int64_t>("head_stride"), StructMember<int64_t>("key_offset"),
    StructMember<int64_t>("value_offset"), StructMember<bool>("debug"));

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHECKS_H_
