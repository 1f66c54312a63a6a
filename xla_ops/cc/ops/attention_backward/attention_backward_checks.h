// From FFI operands to AttentionBackwardParams, for both targets of
// attention_backward.h; the CPU and the CUDA handlers share it.
//
// Errors (InvalidArgument) are those of attention_checks.h, but for
// num_splits and the results, after "flash_attn_varlen_backward: " or
// "paged_attention_backward: ", and:
//   wants_dkv must be false with block_table, got true
//   wants_dkv must be false with kv_cache_dtype fp8, got true
//   wants_dsinks must be false without sinks, got true
//   grad_out must have shape [4, 8, 64], got [4, 8]  (and q's dtype; out too)
//   lse must be float32, got float16                     (grad_lse too)
//   lse must have shape [8, 4], got [4, 8]               (grad_lse too)
//   dq must have shape [4, 8, 64], got [4, 8]            (and q's dtype)
//   dk must be float16, got float32                      (dv too)
//   dk must have shape [6, 2, 64], got [6, 2, 32]        (dv too)
//   dsinks must be float32, got float16
//   dsinks must have shape [8], got [4]
//   dq must have no element where it is not wanted, got shape [4, 8, 64]
//                                           (dk, dv and dsinks too)
//   workspace must be uint8, got float32
// CUDA alone: those of attention_checks.h, and
//   workspace must have at least 1056 elements, got 16
//
// Tested by attention_backward_errors_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_CHECKS_H_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_CHECKS_H_

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward.h"

namespace xla_ops {

constexpr AttentionNames BackwardNames(AttentionNames names, const char* op) {
  names.op = op;
  return names;
}

inline constexpr AttentionNames kFlashAttnVarlenBackwardNames =
    BackwardNames(kFlashAttnVarlenNames, "flash_attn_varlen_backward");
inline constexpr AttentionNames kPagedAttentionBackwardNames =
    BackwardNames(kPagedAttentionNames, "paged_attention_backward");

inline const AttentionNames& BackwardNamesOf(AttentionOp op) {
  return op == AttentionOp::kPagedAttention ? kPagedAttentionBackwardNames
                                            : kFlashAttnVarlenBackwardNames;
}

// What is not in AttentionInputs, in the order of the binding.
struct AttentionBackwardOperands {
  xla::ffi::AnyBuffer grad_out;
  xla::ffi::AnyBuffer out;
  xla::ffi::AnyBuffer lse;
  xla::ffi::AnyBuffer grad_lse;
  xla::ffi::Result<xla::ffi::AnyBuffer> dq;
  xla::ffi::Result<xla::ffi::AnyBuffer> dk;
  xla::ffi::Result<xla::ffi::AnyBuffer> dv;
  xla::ffi::Result<xla::ffi::AnyBuffer> dsinks;
  xla::ffi::Result<xla::ffi::AnyBuffer> workspace;
};

// Members are in the order of the registration below, which names them.
struct AttentionBackwardAttrs {
  float scale;
  int64_t window_left;
  int64_t window_right;
  float soft_cap;
  std::string_view kv_cache_dtype;
  bool paged;
  int64_t num_kv_heads;
  int64_t num_blocks;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t key_offset;
  int64_t value_offset;
  bool deterministic;
  bool wants_dq;
  bool wants_dkv;
  bool wants_dsinks;
};

// The binding of both targets on every platform; handlers append their
// context.
inline auto AttentionBackwardBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // grad_out
      .Arg<xla::ffi::AnyBuffer>()  // query
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // value
      .Arg<xla::ffi::AnyBuffer>()  // out
      .Arg<xla::ffi::AnyBuffer>()  // lse
      .Arg<xla::ffi::AnyBuffer>()  // grad_lse
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
      .Ret<xla::ffi::AnyBuffer>()  // dq
      .Ret<xla::ffi::AnyBuffer>()  // dk
      .Ret<xla::ffi::AnyBuffer>()  // dv
      .Ret<xla::ffi::AnyBuffer>()  // dsinks
      .Ret<xla::ffi::AnyBuffer>()  // workspace
      .Attrs<AttentionBackwardAttrs>();
}

// Reads no buffer.
xla::ffi::Error MakeAttentionBackwardParams(
    const AttentionNames& names, const AttentionInputs& inputs,
    const AttentionBackwardOperands& operands,
    const AttentionBackwardAttrs& attrs, AttentionBackwardParams* params);

// The same for what is bound, one by one.
template <const AttentionNames& kNames>
xla::ffi::Error MakeAttentionBackward(
    xla::ffi::AnyBuffer grad_out, xla::ffi::AnyBuffer query,
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer value, xla::ffi::AnyBuffer out,
    xla::ffi::AnyBuffer lse, xla::ffi::AnyBuffer grad_lse,
    xla::ffi::AnyBuffer cu_seqlens_q, xla::ffi::AnyBuffer cu_seqlens_k,
    xla::ffi::AnyBuffer seqused_k, xla::ffi::AnyBuffer block_table,
    xla::ffi::AnyBuffer leftpad_k, xla::ffi::AnyBuffer num_seqs,
    xla::ffi::AnyBuffer alibi_slopes, xla::ffi::AnyBuffer sinks,
    xla::ffi::AnyBuffer k_scale, xla::ffi::AnyBuffer v_scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> dq,
    xla::ffi::Result<xla::ffi::AnyBuffer> dk,
    xla::ffi::Result<xla::ffi::AnyBuffer> dv,
    xla::ffi::Result<xla::ffi::AnyBuffer> dsinks,
    xla::ffi::Result<xla::ffi::AnyBuffer> workspace,
    const AttentionBackwardAttrs& attrs, AttentionBackwardParams* params) {
  return MakeAttentionBackwardParams(
      kNames,
      {query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
       leftpad_k, num_seqs, alibi_slopes, sinks, k_scale, v_scale},
      {grad_out, out, lse, grad_lse, dq, dk, dv, dsinks, workspace}, attrs,
      params);
}

// What the CUDA kernels ask beyond that; the CUDA handler's check.
xla::ffi::Error CheckCudaLimits(const AttentionNames& names,
                                const AttentionBackwardParams& params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::AttentionBackwardAttrs, StructMember<float>("scale"),
    StructMember<int64_t>("window_left"), StructMember<int64_t>("window_right"),
    StructMember<float>("soft_cap"),
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<bool>("paged"), StructMember<int64_t>("num_kv_heads"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("block_stride"), StructMember<int64_t>("page_stride"),
    StructMember<int64_t>("head_stride"), StructMember<int64_t>("key_offset"),
    StructMember<int64_t>("value_offset"), StructMember<bool>("deterministic"),
    StructMember<bool>("wants_dq"), StructMember<bool>("wants_dkv"),
    StructMember<bool>("wants_dsinks"));

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_CHECKS_H_
