// From FFI operands to AttentionParams, for both targets of attention.h; the
// CPU and the CUDA handlers share it.
//
// Errors (InvalidArgument) begin with the op's name and ": ". As
// flash_attn_varlen names its arguments:
//   q must be float32, float16 or bfloat16, got int32
//   q must have shape [num_tokens, num_heads, head_dim], got [4, 8]
//   q must have a head_dim that is a multiple of 8 up to 256, got 12
//   num_kv_heads must divide num_heads 8, got 3
//   num_blocks must be at least 0, got -1    (and the other sizes, strides)
//   num_blocks must be 1 without block_table, got 2         (contiguous)
//   kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8
//   k must be float16, got float32                          (auto; v too)
//   k must be float8_e4m3fn or uint8, got float16           (fp8)
//   key_offset must be at least 0, got -1             (value_offset too)
//   k must have at least 256 elements, got 128
//   seqused_k must be int32, got int64    (and every table of the batch)
//   seqused_k must have shape [max_num_seqs], got [3, 1]    (paged)
//   block_table must have shape [3, max_blocks], got [2, 4]
//   cu_seqlens_k must be absent with block_table, got shape [4]
//                                                         (leftpad_k too)
//   cu_seqlens_q must have shape [4], got [3]
//   cu_seqlens_q must have shape [max_num_seqs + 1], got [3, 1]  (contiguous)
//   cu_seqlens_k must have shape [4], got [3]
//   seqused_k must have shape [3], got [4]                (leftpad_k too)
//   block_table must be absent where paged is false, got shape [3, 2]
//   num_seqs must have 1 element, got shape [2]
//   alibi_slopes must be float32, got float16
//   alibi_slopes must have shape [8] or [3, 8], got [4]
//   sinks must be float32, got float16
//   sinks must have shape [8], got [4]
//   k_scale must be absent with kv_cache_dtype auto, got shape [1]
//   k_scale must be float32, got float16              (fp8; v_scale too)
//   k_scale must have 1 element or shape [3, 2], got shape [2]
//   softmax_scale must be finite, got nan
//   window_left must be at least -1, got -2            (window_right too)
//   softcap must be finite and at least 0, got -1
//   num_splits must be from 1 to 1024, got 0
//   out must have shape [4, 8, 64], got [4, 8, 32]        (and q's dtype)
//   lse must be float32, got float16
//   lse must have shape [8, 4], got [4, 8]
//   workspace must be uint8, got float32
//   workspace must have at least 1056 elements, got 16
// CUDA alone, where Python leaves it to the handler:
//   q must have at most 2147483647 rows (token, head), got 4294967296
//   cu_seqlens_q must have at most 1073741824 elements, got 1073741825
//   num_kv_heads must be at most 65535, got 65536
// paged_attention says query, key_cache, value_cache, query_start_loc,
// context_lens, block_tables, scale and soft_cap for q, k, v, cu_seqlens_q,
// seqused_k, block_table, softmax_scale and softcap. An absent operand's type
// and shape are not looked at. max_num_seqs is seqused_k's length where the
// keys are paged, else cu_seqlens_q's less one.
//
// Tested by attention_errors_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHECKS_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHECKS_H_

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {

// What an op calls itself and the arguments that the ops name differently.
struct AttentionNames {
  AttentionOp id;
  const char* op;
  const char* query;
  const char* key;
  const char* value;
  const char* cu_seqlens_q;
  const char* seqused_k;
  const char* block_table;
  const char* scale;
  const char* soft_cap;
};

inline constexpr AttentionNames kFlashAttnVarlenNames = {
    AttentionOp::kFlashAttnVarlen,
    "flash_attn_varlen",
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "seqused_k",
    "block_table",
    "softmax_scale",
    "softcap"};

inline constexpr AttentionNames kPagedAttentionNames = {
    AttentionOp::kPagedAttention,
    "paged_attention",
    "query",
    "key_cache",
    "value_cache",
    "query_start_loc",
    "context_lens",
    "block_tables",
    "scale",
    "soft_cap"};

inline const AttentionNames& NamesOf(AttentionOp op) {
  return op == AttentionOp::kPagedAttention ? kPagedAttentionNames
                                            : kFlashAttnVarlenNames;
}

// In the order of the binding.
struct AttentionInputs {
  xla::ffi::AnyBuffer query;
  xla::ffi::AnyBuffer key;
  xla::ffi::AnyBuffer value;
  xla::ffi::AnyBuffer cu_seqlens_q;
  xla::ffi::AnyBuffer cu_seqlens_k;
  xla::ffi::AnyBuffer seqused_k;
  xla::ffi::AnyBuffer block_table;
  xla::ffi::AnyBuffer leftpad_k;
  xla::ffi::AnyBuffer num_seqs;
  xla::ffi::AnyBuffer alibi_slopes;
  xla::ffi::AnyBuffer sinks;
  xla::ffi::AnyBuffer k_scale;
  xla::ffi::AnyBuffer v_scale;
};

// In the order of the binding.
struct AttentionOperands : AttentionInputs {
  xla::ffi::Result<xla::ffi::AnyBuffer> out;
  xla::ffi::Result<xla::ffi::AnyBuffer> lse;
  xla::ffi::Result<xla::ffi::AnyBuffer> workspace;
};

// Members are in the order of the registration below, which names them.
struct AttentionAttrs {
  float scale;
  int64_t window_left;
  int64_t window_right;
  float soft_cap;
  std::string_view kv_cache_dtype;
  bool paged;
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

// The binding of both targets on every platform; handlers append their
// context.
inline auto AttentionBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // query
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // value
      .Arg<xla::ffi::AnyBuffer>()  // cu_seqlens_q
      .Arg<xla::ffi::AnyBuffer>()  // cu_seqlens_k
      .Arg<xla::ffi::AnyBuffer>()  // seqused_k
      .Arg<xla::ffi::AnyBuffer>()  // block_table
      .Arg<xla::ffi::AnyBuffer>()  // leftpad_k
      .Arg<xla::ffi::AnyBuffer>()  // num_seqs
      .Arg<xla::ffi::AnyBuffer>()  // alibi_slopes
      .Arg<xla::ffi::AnyBuffer>()  // sinks
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Arg<xla::ffi::AnyBuffer>()  // v_scale
      .Ret<xla::ffi::AnyBuffer>()  // out
      .Ret<xla::ffi::AnyBuffer>()  // lse
      .Ret<xla::ffi::AnyBuffer>()  // workspace
      .Attrs<AttentionAttrs>();
}

// All of MakeAttentionParams but the results: for an op on the same batch
// (attention_backward). Sets all of `params` but out, lse and workspace.
xla::ffi::Error BindAttentionInputs(const AttentionNames& names,
                                    const AttentionInputs& inputs,
                                    const AttentionAttrs& attrs,
                                    AttentionParams* params);

// Reads no buffer. The key and value pointers of `params` are moved to the
// view's first element. An empty query (no token or no head) is success: the
// handler has nothing to do then. An empty cache or no sequence is success
// too, and every row of `out` is zero.
xla::ffi::Error MakeAttentionParams(const AttentionNames& names,
                                    const AttentionOperands& operands,
                                    const AttentionAttrs& attrs,
                                    AttentionParams* params);

// The same for what is bound, one by one.
template <const AttentionNames& kNames>
xla::ffi::Error MakeAttention(
    xla::ffi::AnyBuffer query, xla::ffi::AnyBuffer key,
    xla::ffi::AnyBuffer value, xla::ffi::AnyBuffer cu_seqlens_q,
    xla::ffi::AnyBuffer cu_seqlens_k, xla::ffi::AnyBuffer seqused_k,
    xla::ffi::AnyBuffer block_table, xla::ffi::AnyBuffer leftpad_k,
    xla::ffi::AnyBuffer num_seqs, xla::ffi::AnyBuffer alibi_slopes,
    xla::ffi::AnyBuffer sinks, xla::ffi::AnyBuffer k_scale,
    xla::ffi::AnyBuffer v_scale, xla::ffi::Result<xla::ffi::AnyBuffer> out,
    xla::ffi::Result<xla::ffi::AnyBuffer> lse,
    xla::ffi::Result<xla::ffi::AnyBuffer> workspace,
    const AttentionAttrs& attrs, AttentionParams* params) {
  return MakeAttentionParams(
      kNames,
      {{query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
        leftpad_k, num_seqs, alibi_slopes, sinks, k_scale, v_scale},
       out,
       lse,
       workspace},
      attrs, params);
}

// What the CUDA kernels ask beyond that; the CUDA handler's check.
xla::ffi::Error CheckCudaLimits(const AttentionNames& names,
                                const AttentionParams& params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::AttentionAttrs, StructMember<float>("scale"),
    StructMember<int64_t>("window_left"), StructMember<int64_t>("window_right"),
    StructMember<float>("soft_cap"),
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<bool>("paged"), StructMember<int64_t>("num_splits"),
    StructMember<int64_t>("num_kv_heads"), StructMember<int64_t>("num_blocks"),
    StructMember<int64_t>("page_size"), StructMember<int64_t>("block_stride"),
    StructMember<int64_t>("page_stride"), StructMember<int64_t>("head_stride"),
    StructMember<int64_t>("key_offset"), StructMember<int64_t>("value_offset"),
    StructMember<bool>("debug"));

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHECKS_H_
