// fused_qk_norm_rope_and_cache of a stacked cache, and paged_attention of its
// queries over that cache, in one call: all of a decoder's attention between
// its projections. The result is that of the two calls, to the bit. On CUDA the
// kernel for decode finds its sequences and pages while the one that writes the
// cache runs (device/overlap.cuh), which a call of its own cannot: nothing says
// what ran before it.
//
// Target `xla_ops.fused_qk_norm_rope_and_paged_attention`:
//   args     qkv, cos_sin_cache, position_ids, slot_mapping, q_weight,
//            k_weight, k_scale, v_scale   as fused_qk_norm_rope_and_cache.h
//                                         has them; scales of one element
//            cu_seqlens_q, seqused_k, block_table, num_seqs, alibi_slopes,
//            sinks                        as attention.h has them
//            kv_cache
//   results  out        [num_tokens, num_heads, head_dim], qkv's dtype
//            kv_cache   (aliased to the argument)
//            query      as out; scratch, as the others:
//            lse, workspace               as attention.h has them
//   attrs    those of fused_qk_norm_rope_and_cache.h, and scale, window_left,
//            window_right, soft_cap and num_splits of attention.h
// Errors are those of the two calls, and begin with their names.
//
// Tested by tests/ops/test_fused_qk_norm_rope_and_paged_attention.py, and
// tests/gpu/check_one_call.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_FUSED_QK_NORM_ROPE_AND_PAGED_ATTENTION_H_
#define XLA_OPS_CC_OPS_ATTENTION_FUSED_QK_NORM_ROPE_AND_PAGED_ATTENTION_H_

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_checks.h"

namespace xla_ops {

struct PreparedAttentionParams {
  FusedQkNormRopeAndCacheParams write;
  AttentionParams read;
};

// Members are in the order of the registration below, which names them.
struct PreparedAttentionAttrs {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float eps;
  bool is_neox;
  std::string_view kv_cache_dtype;
  int64_t num_blocks;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t key_offset;
  int64_t value_offset;
  float scale;
  int64_t window_left;
  int64_t window_right;
  float soft_cap;
  int64_t num_splits;
  bool debug;
};

inline auto PreparedAttentionBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // qkv
      .Arg<xla::ffi::AnyBuffer>()  // cos_sin_cache
      .Arg<xla::ffi::AnyBuffer>()  // position_ids
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // q_weight
      .Arg<xla::ffi::AnyBuffer>()  // k_weight
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Arg<xla::ffi::AnyBuffer>()  // v_scale
      .Arg<xla::ffi::AnyBuffer>()  // cu_seqlens_q
      .Arg<xla::ffi::AnyBuffer>()  // seqused_k
      .Arg<xla::ffi::AnyBuffer>()  // block_table
      .Arg<xla::ffi::AnyBuffer>()  // num_seqs
      .Arg<xla::ffi::AnyBuffer>()  // alibi_slopes
      .Arg<xla::ffi::AnyBuffer>()  // sinks
      .Arg<xla::ffi::AnyBuffer>()  // kv_cache
      .Ret<xla::ffi::AnyBuffer>()  // out
      .Ret<xla::ffi::AnyBuffer>()  // kv_cache
      .Ret<xla::ffi::AnyBuffer>()  // query
      .Ret<xla::ffi::AnyBuffer>()  // lse
      .Ret<xla::ffi::AnyBuffer>()  // workspace
      .Attrs<PreparedAttentionAttrs>();
}

// An operand that is not there.
inline ffi::AnyBuffer AbsentBuffer() {
  static int64_t dimension = 0;
  static const XLA_FFI_Buffer buffer = {XLA_FFI_Buffer_STRUCT_SIZE,
                                        /*extension_start=*/nullptr,
                                        XLA_FFI_DataType_S32,
                                        /*data=*/nullptr,
                                        /*rank=*/1,
                                        &dimension};
  return ffi::AnyBuffer(&buffer);
}

// Reads no buffer.
inline ffi::Error MakePreparedAttentionParams(
    ffi::AnyBuffer qkv, ffi::AnyBuffer cos_sin_cache,
    ffi::AnyBuffer position_ids, ffi::AnyBuffer slot_mapping,
    ffi::AnyBuffer q_weight, ffi::AnyBuffer k_weight, ffi::AnyBuffer k_scale,
    ffi::AnyBuffer v_scale, ffi::AnyBuffer cu_seqlens_q,
    ffi::AnyBuffer seqused_k, ffi::AnyBuffer block_table,
    ffi::AnyBuffer num_seqs, ffi::AnyBuffer alibi_slopes, ffi::AnyBuffer sinks,
    ffi::AnyBuffer kv_cache, ffi::Result<ffi::AnyBuffer> out,
    ffi::Result<ffi::AnyBuffer> kv_cache_result,
    ffi::Result<ffi::AnyBuffer> query, ffi::Result<ffi::AnyBuffer> lse,
    ffi::Result<ffi::AnyBuffer> workspace, const PreparedAttentionAttrs& attrs,
    PreparedAttentionParams* params) {
  const FusedQkNormRopeAndCacheAttrs write = {
      attrs.num_heads,    attrs.num_kv_heads, attrs.head_dim,
      attrs.eps,          attrs.is_neox,      attrs.kv_cache_dtype,
      attrs.num_blocks,   attrs.page_size,    attrs.block_stride,
      attrs.page_stride,  attrs.head_stride,  attrs.key_offset,
      attrs.value_offset, attrs.debug};
  XLA_OPS_RETURN_IF_ERROR(MakeFusedQkNormRopeAndCacheStackedParams(
      qkv, cos_sin_cache, position_ids, slot_mapping, q_weight, k_weight,
      k_scale, v_scale, kv_cache, query, kv_cache_result, write,
      &params->write));
  const AttentionAttrs read = {
      attrs.scale,        attrs.window_left,    attrs.window_right,
      attrs.soft_cap,     attrs.kv_cache_dtype,
      /*paged=*/true,     attrs.num_splits,     attrs.num_kv_heads,
      attrs.num_blocks,   attrs.page_size,      attrs.block_stride,
      attrs.page_stride,  attrs.head_stride,    attrs.key_offset,
      attrs.value_offset, attrs.debug};
  const ffi::AnyBuffer absent = AbsentBuffer();  // where keys are paged
  return MakeAttentionParams(
      kPagedAttentionNames,
      {{*query, *kv_cache_result, *kv_cache_result, cu_seqlens_q, absent,
        seqused_k, block_table, absent, num_seqs, alibi_slopes, sinks, k_scale,
        v_scale},
       out,
       lse,
       workspace},
      read, &params->read);
}

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::PreparedAttentionAttrs, StructMember<int64_t>("num_heads"),
    StructMember<int64_t>("num_kv_heads"), StructMember<int64_t>("head_dim"),
    StructMember<float>("eps"), StructMember<bool>("is_neox"),
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("block_stride"), StructMember<int64_t>("page_stride"),
    StructMember<int64_t>("head_stride"), StructMember<int64_t>("key_offset"),
    StructMember<int64_t>("value_offset"), StructMember<float>("scale"),
    StructMember<int64_t>("window_left"), StructMember<int64_t>("window_right"),
    StructMember<float>("soft_cap"), StructMember<int64_t>("num_splits"),
    StructMember<bool>("debug"));

#endif  // XLA_OPS_CC_OPS_ATTENTION_FUSED_QK_NORM_ROPE_AND_PAGED_ATTENTION_H_
