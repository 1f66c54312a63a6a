// Operand checks of paged_attention, for every platform.

#include "xla_ops/cc/ops/attention/attention.h"

#include <cmath>
#include <string>

#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "paged_attention";
constexpr int64_t kMaxHeadDim = 256;

ffi::Error CheckQuery(ffi::AnyBuffer query) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "query", query, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "query", query, {"num_tokens", "num_heads", "head_dim"}));
  const int64_t head_dim = query.dimensions()[2];
  if (head_dim <= 0 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    return MustError(kOp, "query",
                     "have a head_dim that is a multiple of 8 up to 256",
                     std::to_string(head_dim));
  }
  return ffi::Error::Success();
}

// Checks one cache and sets `*data` to its view's first element.
ffi::Error BindCache(const char* name, ffi::AnyBuffer cache,
                     const char* offset_name, int64_t offset,
                     const CacheGeometry& geometry,
                     const AttentionParams& params, const void** data) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, name, cache, {params.dtype}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckCacheInBounds(kOp, name, cache, geometry, params.num_kv_heads,
                         params.head_dim, offset_name, offset));
  const bool empty =
      CacheExtent(geometry, params.num_kv_heads, params.head_dim) == 0;
  *data = static_cast<const char*>(cache.untyped_data()) +
          (empty ? 0 : offset * SizeOf(params.dtype));
  return ffi::Error::Success();
}

ffi::Error CheckInt32(const char* name, ffi::AnyBuffer buffer,
                      std::initializer_list<Dim> shape, const int32_t** data) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, name, buffer, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, name, buffer, shape));
  *data = static_cast<const int32_t*>(buffer.untyped_data());
  return ffi::Error::Success();
}

// The tables that describe the batch.
ffi::Error BindSequences(ffi::AnyBuffer context_lens,
                         ffi::AnyBuffer block_tables,
                         ffi::AnyBuffer query_start_loc,
                         ffi::AnyBuffer num_seqs,
                         AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckInt32("context_lens", context_lens,
                                     {"max_num_seqs"}, &params->context_lens));
  params->max_num_seqs = context_lens.dimensions()[0];
  XLA_OPS_RETURN_IF_ERROR(CheckInt32("block_tables", block_tables,
                                     {params->max_num_seqs, "max_blocks"},
                                     &params->block_tables));
  params->max_blocks = block_tables.dimensions()[1];
  XLA_OPS_RETURN_IF_ERROR(CheckInt32("query_start_loc", query_start_loc,
                                     {params->max_num_seqs + 1},
                                     &params->query_start_loc));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "num_seqs", num_seqs, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckOneElement(kOp, "num_seqs", num_seqs));
  params->num_seqs = static_cast<const int32_t*>(num_seqs.untyped_data());
  // max_blocks * page_size bounds context_lens.
  int64_t max_context;
  if (__builtin_mul_overflow(params->max_blocks, params->page_size,
                             &max_context)) {
    return MustError(kOp, "page_size", "give less than 2^63 tokens",
                     std::to_string(params->page_size));
  }
  return ffi::Error::Success();
}

ffi::Error CheckScalars(const AttentionAttrs& attrs) {
  if (!std::isfinite(attrs.scale)) {
    return MustError(kOp, "scale", "be finite", FormatFloat(attrs.scale));
  }
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(kOp, "sliding_window", attrs.sliding_window, 0));
  if (!(attrs.soft_cap >= 0 && std::isfinite(attrs.soft_cap))) {
    return MustError(kOp, "soft_cap", "be finite and at least 0",
                     FormatFloat(attrs.soft_cap));
  }
  if (attrs.num_splits < 1 || attrs.num_splits > kMaxNumSplits) {
    return MustError(kOp, "num_splits",
                     "be from 1 to " + std::to_string(kMaxNumSplits),
                     std::to_string(attrs.num_splits));
  }
  return ffi::Error::Success();
}

ffi::Error BindResults(ffi::AnyBuffer query, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> workspace,
                       AttentionParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "out", out, query));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "workspace", workspace, {DType::kU8}));
  const int64_t wanted =
      AttentionWorkspaceBytes(params->num_tokens, params->num_heads,
                                   params->head_dim, params->num_splits);
  const int64_t got = static_cast<int64_t>(workspace->element_count());
  if (got < wanted) {
    return MustError(kOp, "workspace",
                     "have at least " + std::to_string(wanted) + " elements",
                     std::to_string(got));
  }
  params->out = out->untyped_data();
  params->workspace = workspace->untyped_data();
  params->workspace_bytes = got;
  return ffi::Error::Success();
}

}  // namespace

ffi::Error MakeAttentionParams(
    ffi::AnyBuffer query, ffi::AnyBuffer key_cache, ffi::AnyBuffer value_cache,
    ffi::AnyBuffer context_lens, ffi::AnyBuffer block_tables,
    ffi::AnyBuffer query_start_loc, ffi::AnyBuffer num_seqs,
    ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
    const AttentionAttrs& attrs, AttentionParams* params) {
  *params = AttentionParams{};
  XLA_OPS_RETURN_IF_ERROR(CheckQuery(query));
  params->dtype = *ToDType(query.element_type());
  params->num_tokens = query.dimensions()[0];
  params->num_heads = query.dimensions()[1];
  params->head_dim = query.dimensions()[2];
  params->query = query.untyped_data();
  // No KV head is right only for no query head.
  if (attrs.num_kv_heads < 1 ? params->num_heads != 0
                             : params->num_heads % attrs.num_kv_heads != 0) {
    return MustError(kOp, "num_kv_heads",
                     "divide num_heads " + std::to_string(params->num_heads),
                     std::to_string(attrs.num_kv_heads));
  }
  const CacheGeometry geometry = {attrs.num_blocks, attrs.page_size,
                                  attrs.block_stride, attrs.page_stride,
                                  attrs.head_stride};
  XLA_OPS_RETURN_IF_ERROR(CheckGeometry(kOp, geometry));
  params->num_kv_heads = attrs.num_kv_heads;
  params->num_blocks = attrs.num_blocks;
  params->page_size = attrs.page_size;
  params->block_stride = attrs.block_stride;
  params->page_stride = attrs.page_stride;
  params->head_stride = attrs.head_stride;
  XLA_OPS_RETURN_IF_ERROR(BindCache("key_cache", key_cache, "key_offset",
                                    attrs.key_offset, geometry, *params,
                                    &params->key_cache));
  XLA_OPS_RETURN_IF_ERROR(BindCache("value_cache", value_cache, "value_offset",
                                    attrs.value_offset, geometry, *params,
                                    &params->value_cache));
  XLA_OPS_RETURN_IF_ERROR(BindSequences(context_lens, block_tables,
                                        query_start_loc, num_seqs, params));
  XLA_OPS_RETURN_IF_ERROR(CheckScalars(attrs));
  params->scale = attrs.scale;
  params->sliding_window = attrs.sliding_window;
  params->soft_cap = attrs.soft_cap;
  params->num_splits = attrs.num_splits;
  params->debug = attrs.debug;
  return BindResults(query, out, workspace, params);
}

}  // namespace xla_ops
