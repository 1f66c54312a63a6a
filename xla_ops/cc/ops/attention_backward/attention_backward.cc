// Operand checks of attention's gradient, for both targets and every platform.

#include "xla_ops/cc/ops/attention_backward/attention_backward.h"

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_checks.h"

namespace xla_ops {
namespace {

using AnyResult = ffi::Result<ffi::AnyBuffer>;

ffi::Error CheckWants(const AttentionNames& names,
                      const AttentionBackwardAttrs& attrs,
                      const AttentionParams& batch) {
  if (attrs.wants_dkv && attrs.paged) {
    return MustError(names.op, "wants_dkv",
                     std::string("be false with ") + names.block_table, "true");
  }
  if (attrs.wants_dkv && attrs.kv_cache_dtype != "auto") {
    return MustError(
        names.op, "wants_dkv",
        "be false with kv_cache_dtype " + std::string(attrs.kv_cache_dtype),
        "true");
  }
  if (attrs.wants_dsinks && batch.sinks == nullptr && batch.num_heads > 0) {
    return MustError(names.op, "wants_dsinks", "be false without sinks",
                     "true");
  }
  return ffi::Error::Success();
}

// lse, or its gradient.
ffi::Error BindRowFloats(const AttentionNames& names, const char* argument,
                         ffi::AnyBuffer buffer, const AttentionParams& batch,
                         const float** data) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(names.op, argument, buffer, {DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(names.op, argument, buffer,
                                     {batch.num_heads, batch.num_tokens}));
  *data = static_cast<const float*>(buffer.untyped_data());
  return ffi::Error::Success();
}

template <typename T>
ffi::Error BindResult(const AttentionNames& names, const char* argument,
                      AnyResult result, bool wanted, DType dtype,
                      std::initializer_list<Dim> shape, T** data) {
  if (!wanted) {
    if (result->element_count() == 0) return ffi::Error::Success();
    return MustError(names.op, argument,
                     "have no element where it is not wanted",
                     "shape " + FormatShape(result->dimensions()));
  }
  XLA_OPS_RETURN_IF_ERROR(CheckDType(names.op, argument, result, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(names.op, argument, result, shape));
  *data = static_cast<T*>(result->untyped_data());
  return ffi::Error::Success();
}

}  // namespace

ffi::Error MakeAttentionBackwardParams(
    const AttentionNames& names, const AttentionInputs& inputs,
    const AttentionBackwardOperands& operands,
    const AttentionBackwardAttrs& attrs, AttentionBackwardParams* params) {
  *params = AttentionBackwardParams{};
  AttentionParams& batch = params->batch;
  XLA_OPS_RETURN_IF_ERROR(BindAttentionInputs(
      names, inputs,
      {attrs.scale, attrs.window_left, attrs.window_right, attrs.soft_cap,
       attrs.kv_cache_dtype, attrs.paged, /*num_splits=*/1, attrs.num_kv_heads,
       attrs.num_blocks, attrs.page_size, attrs.block_stride, attrs.page_stride,
       attrs.head_stride, attrs.key_offset, attrs.value_offset,
       /*debug=*/false},
      &batch));
  XLA_OPS_RETURN_IF_ERROR(CheckWants(names, attrs, batch));
  params->deterministic = attrs.deterministic;
  params->wants_dq = attrs.wants_dq;
  params->wants_dkv = attrs.wants_dkv;
  params->wants_dsinks = attrs.wants_dsinks;

  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(names.op, "grad_out", operands.grad_out, inputs.query));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(names.op, "out", operands.out, inputs.query));
  params->grad_out = operands.grad_out.untyped_data();
  params->out = operands.out.untyped_data();
  XLA_OPS_RETURN_IF_ERROR(
      BindRowFloats(names, "lse", operands.lse, batch, &params->lse));
  if (operands.grad_lse.element_count() > 0) {
    XLA_OPS_RETURN_IF_ERROR(BindRowFloats(names, "grad_lse", operands.grad_lse,
                                          batch, &params->grad_lse));
  }

  XLA_OPS_RETURN_IF_ERROR(BindResult(
      names, "dq", operands.dq, attrs.wants_dq, batch.dtype,
      {batch.num_tokens, batch.num_heads, batch.head_dim}, &params->dq));
  const std::initializer_list<Dim> kv_shape = {
      batch.page_size, batch.num_kv_heads, batch.head_dim};
  XLA_OPS_RETURN_IF_ERROR(BindResult(names, "dk", operands.dk, attrs.wants_dkv,
                                     batch.dtype, kv_shape, &params->dk));
  XLA_OPS_RETURN_IF_ERROR(BindResult(names, "dv", operands.dv, attrs.wants_dkv,
                                     batch.dtype, kv_shape, &params->dv));
  XLA_OPS_RETURN_IF_ERROR(BindResult(names, "dsinks", operands.dsinks,
                                     attrs.wants_dsinks, DType::kF32,
                                     {batch.num_heads}, &params->dsinks));
  const ffi::AnyBuffer workspace = BufferOf(operands.workspace);
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(names.op, "workspace", workspace, {DType::kU8}));
  params->workspace = workspace.untyped_data();
  params->workspace_bytes = static_cast<int64_t>(workspace.element_count());
  return ffi::Error::Success();
}

ffi::Error CheckCudaLimits(const AttentionNames& names,
                           const AttentionBackwardParams& params) {
  const AttentionParams& batch = params.batch;
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(names, batch));
  const int64_t wanted = AttentionBackwardWorkspaceBytes(
      batch.num_tokens, batch.num_heads, batch.head_dim, batch.max_num_seqs);
  if (params.workspace_bytes < wanted) {
    return MustError(names.op, "workspace",
                     "have at least " + std::to_string(wanted) + " elements",
                     std::to_string(params.workspace_bytes));
  }
  return ffi::Error::Success();
}

}  // namespace xla_ops
