// Operand checks of attention, for both targets and every platform.

#include "xla_ops/cc/ops/attention/attention.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"

namespace xla_ops {
namespace {

constexpr int64_t kMaxHeadDim = 256;

bool IsAbsent(ffi::AnyBuffer buffer) { return buffer.element_count() == 0; }

ffi::Error CheckAbsent(const AttentionNames& names, const char* argument,
                       ffi::AnyBuffer buffer, const std::string& where) {
  if (IsAbsent(buffer)) return ffi::Error::Success();
  return MustError(names.op, argument, "be absent " + where,
                   "shape " + FormatShape(buffer.dimensions()));
}

ffi::Error BindQuery(const AttentionNames& names, ffi::AnyBuffer query,
                     AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(names.op, names.query, query, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(names.op, names.query, query,
                                     {"num_tokens", "num_heads", "head_dim"}));
  const int64_t head_dim = query.dimensions()[2];
  if (head_dim <= 0 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    return MustError(names.op, names.query,
                     "have a head_dim that is a multiple of 8 up to 256",
                     std::to_string(head_dim));
  }
  params->dtype = *ToDType(query.element_type());
  params->num_tokens = query.dimensions()[0];
  params->num_heads = query.dimensions()[1];
  params->head_dim = head_dim;
  params->query = query.untyped_data();
  return ffi::Error::Success();
}

ffi::Error BindGeometry(const AttentionNames& names,
                        const AttentionAttrs& attrs,
                        const CacheGeometry& geometry,
                        AttentionParams* params) {
  // No KV head is right only for no query head.
  if (attrs.num_kv_heads < 1 ? params->num_heads != 0
                             : params->num_heads % attrs.num_kv_heads != 0) {
    return MustError(names.op, "num_kv_heads",
                     "divide num_heads " + std::to_string(params->num_heads),
                     std::to_string(attrs.num_kv_heads));
  }
  XLA_OPS_RETURN_IF_ERROR(CheckGeometry(names.op, geometry));
  if (!attrs.paged && attrs.num_blocks != 1) {
    return MustError(names.op, "num_blocks",
                     std::string("be 1 without ") + names.block_table,
                     std::to_string(attrs.num_blocks));
  }
  params->paged = attrs.paged;
  params->num_kv_heads = attrs.num_kv_heads;
  params->num_blocks = geometry.num_blocks;
  params->page_size = geometry.page_size;
  params->block_stride = geometry.block_stride;
  params->page_stride = geometry.page_stride;
  params->head_stride = geometry.head_stride;
  return ffi::Error::Success();
}

// Checks keys or values and sets `*data` to their view's first element.
ffi::Error BindCache(const AttentionNames& names, const char* argument,
                     ffi::AnyBuffer cache, const char* offset_name,
                     int64_t offset, const CacheGeometry& geometry,
                     std::string_view kv_cache_dtype, AttentionParams* params,
                     const void** data) {
  XLA_OPS_RETURN_IF_ERROR(CheckCacheDType(names.op, argument, cache,
                                          kv_cache_dtype, params->dtype,
                                          &params->kv_dtype));
  XLA_OPS_RETURN_IF_ERROR(CheckCacheInBounds(
      names.op, argument, cache, geometry, params->num_kv_heads,
      params->head_dim, offset_name, offset));
  const bool empty =
      CacheExtent(geometry, params->num_kv_heads, params->head_dim) == 0;
  *data = static_cast<const char*>(cache.untyped_data()) +
          (empty ? 0 : offset * SizeOf(params->kv_dtype));
  return ffi::Error::Success();
}

ffi::Error BindInt32(const AttentionNames& names, const char* argument,
                     ffi::AnyBuffer buffer, std::initializer_list<Dim> shape,
                     const int32_t** data) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(names.op, argument, buffer, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(names.op, argument, buffer, shape));
  *data = static_cast<const int32_t*>(buffer.untyped_data());
  return ffi::Error::Success();
}

// The tables of a batch whose keys lie in pages.
ffi::Error BindPaged(const AttentionNames& names, const AttentionInputs& in,
                     AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindInt32(names, names.seqused_k, in.seqused_k,
                                    {"max_num_seqs"}, &params->seqused_k));
  params->max_num_seqs = in.seqused_k.dimensions()[0];
  XLA_OPS_RETURN_IF_ERROR(BindInt32(names, names.block_table, in.block_table,
                                    {params->max_num_seqs, "max_blocks"},
                                    &params->block_table));
  params->max_blocks = in.block_table.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(BindInt32(names, names.cu_seqlens_q, in.cu_seqlens_q,
                                    {params->max_num_seqs + 1},
                                    &params->cu_seqlens_q));
  const std::string where = std::string("with ") + names.block_table;
  XLA_OPS_RETURN_IF_ERROR(
      CheckAbsent(names, "cu_seqlens_k", in.cu_seqlens_k, where));
  XLA_OPS_RETURN_IF_ERROR(CheckAbsent(names, "leftpad_k", in.leftpad_k, where));
  // max_blocks * page_size bounds seqused_k.
  int64_t max_kv_len;
  if (__builtin_mul_overflow(params->max_blocks, params->page_size,
                             &max_kv_len)) {
    return MustError(names.op, "page_size", "give less than 2^63 tokens",
                     std::to_string(params->page_size));
  }
  return ffi::Error::Success();
}

// The tables of a batch whose keys lie in rows, one sequence after another.
ffi::Error BindContiguous(const AttentionNames& names,
                          const AttentionInputs& in, AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindInt32(names, names.cu_seqlens_q, in.cu_seqlens_q,
                                    {"max_num_seqs + 1"},
                                    &params->cu_seqlens_q));
  params->max_num_seqs = in.cu_seqlens_q.dimensions()[0] - 1;
  if (params->max_num_seqs < 0) {
    return MustError(names.op, names.cu_seqlens_q,
                     "have shape [max_num_seqs + 1]", "[0]");
  }
  XLA_OPS_RETURN_IF_ERROR(BindInt32(names, "cu_seqlens_k", in.cu_seqlens_k,
                                    {params->max_num_seqs + 1},
                                    &params->cu_seqlens_k));
  if (!IsAbsent(in.seqused_k)) {
    XLA_OPS_RETURN_IF_ERROR(BindInt32(names, names.seqused_k, in.seqused_k,
                                      {params->max_num_seqs},
                                      &params->seqused_k));
  }
  if (!IsAbsent(in.leftpad_k)) {
    XLA_OPS_RETURN_IF_ERROR(BindInt32(names, "leftpad_k", in.leftpad_k,
                                      {params->max_num_seqs},
                                      &params->leftpad_k));
  }
  return CheckAbsent(names, names.block_table, in.block_table,
                     "where paged is false");
}

ffi::Error BindSequences(const AttentionNames& names, const AttentionInputs& in,
                         AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(params->paged ? BindPaged(names, in, params)
                                        : BindContiguous(names, in, params));
  if (IsAbsent(in.num_seqs)) return ffi::Error::Success();
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(names.op, "num_seqs", in.num_seqs, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckOneElement(names.op, "num_seqs", in.num_seqs));
  params->num_seqs = static_cast<const int32_t*>(in.num_seqs.untyped_data());
  return ffi::Error::Success();
}

ffi::Error BindLogitOperands(const AttentionNames& names,
                             const AttentionInputs& in,
                             AttentionParams* params) {
  if (!IsAbsent(in.alibi_slopes)) {
    XLA_OPS_RETURN_IF_ERROR(
        CheckDType(names.op, "alibi_slopes", in.alibi_slopes, {DType::kF32}));
    const int64_t shape[] = {params->max_num_seqs, params->num_heads};
    const ffi::Span<const int64_t> of_seq(shape, 2);
    const ffi::Span<const int64_t> of_head(shape + 1, 1);
    const auto dims = in.alibi_slopes.dimensions();
    if (!(dims == of_seq) && !(dims == of_head)) {
      return MustError(
          names.op, "alibi_slopes",
          "have shape " + FormatShape(of_head) + " or " + FormatShape(of_seq),
          FormatShape(dims));
    }
    params->alibi_slopes =
        static_cast<const float*>(in.alibi_slopes.untyped_data());
    params->alibi_seq_stride = dims.size() == 2 ? params->num_heads : 0;
  }
  if (!IsAbsent(in.sinks)) {
    XLA_OPS_RETURN_IF_ERROR(
        CheckDType(names.op, "sinks", in.sinks, {DType::kF32}));
    XLA_OPS_RETURN_IF_ERROR(
        CheckShape(names.op, "sinks", in.sinks, {params->num_heads}));
    params->sinks = static_cast<const float*>(in.sinks.untyped_data());
  }
  return ffi::Error::Success();
}

// `index` is that of kv_scale_seq_stride: 0 for keys, 1 for values.
ffi::Error BindScale(const AttentionNames& names, const char* argument,
                     ffi::AnyBuffer scale, int index, AttentionParams* params,
                     const float** data) {
  if (params->kv_dtype == params->dtype) {
    return CheckAbsent(names, argument, scale, "with kv_cache_dtype auto");
  }
  if (IsAbsent(scale)) return ffi::Error::Success();
  XLA_OPS_RETURN_IF_ERROR(CheckDType(names.op, argument, scale, {DType::kF32}));
  const int64_t shape[] = {params->max_num_seqs, params->num_kv_heads};
  const ffi::Span<const int64_t> of_head(shape, 2);
  const bool one = scale.element_count() == 1;
  if (!one && !(scale.dimensions() == of_head)) {
    return MustError(names.op, argument,
                     "have 1 element or shape " + FormatShape(of_head),
                     "shape " + FormatShape(scale.dimensions()));
  }
  params->kv_scale_seq_stride[index] = one ? 0 : params->num_kv_heads;
  params->kv_scale_head_stride[index] = one ? 0 : 1;
  *data = static_cast<const float*>(scale.untyped_data());
  return ffi::Error::Success();
}

ffi::Error BindScalars(const AttentionNames& names, const AttentionAttrs& attrs,
                       AttentionParams* params) {
  if (!std::isfinite(attrs.scale)) {
    return MustError(names.op, names.scale, "be finite",
                     FormatFloat(attrs.scale));
  }
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(names.op, "window_left", attrs.window_left, -1));
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(names.op, "window_right", attrs.window_right, -1));
  if (!(attrs.soft_cap >= 0 && std::isfinite(attrs.soft_cap))) {
    return MustError(names.op, names.soft_cap, "be finite and at least 0",
                     FormatFloat(attrs.soft_cap));
  }
  if (attrs.num_splits < 1 || attrs.num_splits > kAttentionMaxSplits) {
    return MustError(names.op, "num_splits",
                     "be from 1 to " + std::to_string(kAttentionMaxSplits),
                     std::to_string(attrs.num_splits));
  }
  params->scale = attrs.scale;
  params->window_left = attrs.window_left;
  params->window_right = attrs.window_right;
  params->soft_cap = attrs.soft_cap;
  params->num_splits = attrs.num_splits;
  params->debug = attrs.debug;
  return ffi::Error::Success();
}

ffi::Error BindResults(const AttentionNames& names, AttentionOperands operands,
                       AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(names.op, "out", operands.out, operands.query));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(names.op, "lse", operands.lse, {DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(names.op, "lse", operands.lse,
                                     {params->num_heads, params->num_tokens}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(names.op, "workspace", operands.workspace, {DType::kU8}));
  const int64_t wanted =
      AttentionWorkspaceBytes(params->num_tokens, params->num_heads,
                              params->head_dim, params->num_splits);
  const int64_t got = static_cast<int64_t>(operands.workspace->element_count());
  if (got < wanted) {
    return MustError(names.op, "workspace",
                     "have at least " + std::to_string(wanted) + " elements",
                     std::to_string(got));
  }
  params->out = operands.out->untyped_data();
  params->lse = static_cast<float*>(operands.lse->untyped_data());
  params->workspace = operands.workspace->untyped_data();
  params->workspace_bytes = got;
  return ffi::Error::Success();
}

}  // namespace

ffi::Error BindAttentionInputs(const AttentionNames& names,
                               const AttentionInputs& inputs,
                               const AttentionAttrs& attrs,
                               AttentionParams* params) {
  *params = AttentionParams{};
  params->op = names.id;
  XLA_OPS_RETURN_IF_ERROR(BindQuery(names, inputs.query, params));
  const CacheGeometry geometry = {attrs.num_blocks, attrs.page_size,
                                  attrs.block_stride, attrs.page_stride,
                                  attrs.head_stride};
  XLA_OPS_RETURN_IF_ERROR(BindGeometry(names, attrs, geometry, params));
  XLA_OPS_RETURN_IF_ERROR(
      BindCache(names, names.key, inputs.key, "key_offset", attrs.key_offset,
                geometry, attrs.kv_cache_dtype, params, &params->key));
  XLA_OPS_RETURN_IF_ERROR(BindCache(
      names, names.value, inputs.value, "value_offset", attrs.value_offset,
      geometry, attrs.kv_cache_dtype, params, &params->value));
  XLA_OPS_RETURN_IF_ERROR(BindSequences(names, inputs, params));
  XLA_OPS_RETURN_IF_ERROR(BindLogitOperands(names, inputs, params));
  XLA_OPS_RETURN_IF_ERROR(
      BindScale(names, "k_scale", inputs.k_scale, 0, params, &params->k_scale));
  XLA_OPS_RETURN_IF_ERROR(
      BindScale(names, "v_scale", inputs.v_scale, 1, params, &params->v_scale));
  return BindScalars(names, attrs, params);
}

ffi::Error MakeAttentionParams(const AttentionNames& names,
                               const AttentionOperands& operands,
                               const AttentionAttrs& attrs,
                               AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(BindAttentionInputs(names, operands, attrs, params));
  return BindResults(names, operands, params);
}

ffi::Error CheckCudaLimits(const AttentionNames& names,
                           const AttentionParams& params) {
  // Nothing will be launched.
  if (params.num_tokens == 0 || params.num_heads == 0) {
    return ffi::Error::Success();
  }
  const int64_t rows = SaturatingProduct(params.num_tokens, params.num_heads);
  if (rows > kAttentionMaxRows) {
    return MustError(names.op, names.query,
                     "have at most " + std::to_string(kAttentionMaxRows) +
                         " rows (token, head)",
                     std::to_string(rows));
  }
  if (params.max_num_seqs > kAttentionMaxSeqs) {
    return MustError(
        names.op, names.cu_seqlens_q,
        "have at most " + std::to_string(kAttentionMaxSeqs + 1) + " elements",
        std::to_string(params.max_num_seqs + 1));
  }
  if (params.num_kv_heads > kAttentionMaxKvHeads) {
    return MustError(names.op, "num_kv_heads",
                     "be at most " + std::to_string(kAttentionMaxKvHeads),
                     std::to_string(params.num_kv_heads));
  }
  return ffi::Error::Success();
}

}  // namespace xla_ops
