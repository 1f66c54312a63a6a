// Operand checks of the fused_qk_norm_rope_and_cache targets, for every
// platform.

#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "fused_qk_norm_rope_and_cache";

using Attrs = FusedQkNormRopeAndCacheAttrs;
using Params = FusedQkNormRopeAndCacheParams;

// What both targets take, but for caches and results.
struct Operands {
  ffi::AnyBuffer qkv;
  ffi::AnyBuffer q_weight;
  ffi::AnyBuffer k_weight;
  ffi::AnyBuffer cos_sin_cache;
  ffi::AnyBuffer position_ids;
  ffi::AnyBuffer slot_mapping;
  ffi::AnyBuffer k_scale;
  ffi::AnyBuffer v_scale;
};

// The operands of one cache and the names that errors give them.
struct CacheOperand {
  const char* name;
  const char* result_name;
  const char* offset_name;
  ffi::AnyBuffer cache;
  ffi::Result<ffi::AnyBuffer> result;
  int64_t offset;
};

// Columns of qkv. What does not fit in 63 bits is the largest number, which no
// array has.
int64_t NumColumns(const Attrs& attrs) {
  int64_t columns;
  if (__builtin_mul_overflow(attrs.num_kv_heads, 2, &columns) ||
      __builtin_add_overflow(attrs.num_heads, columns, &columns) ||
      __builtin_mul_overflow(columns, attrs.head_dim, &columns)) {
    return INT64_MAX;
  }
  return columns;
}

ffi::Error CheckQkv(ffi::AnyBuffer qkv, const Attrs& attrs) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "qkv", qkv, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(CheckAtLeast(kOp, "num_heads", attrs.num_heads, 0));
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(kOp, "num_kv_heads", attrs.num_kv_heads, 0));
  if (attrs.head_dim < 2 || attrs.head_dim % 2 != 0) {
    return MustError(kOp, "head_dim", "be even and at least 2",
                     std::to_string(attrs.head_dim));
  }
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "qkv", qkv, {"num_tokens", NumColumns(attrs)}));
  return CheckPositiveFinite(kOp, "eps", attrs.eps);
}

ffi::Error BindWeights(ffi::AnyBuffer q_weight, ffi::AnyBuffer k_weight,
                       Params* params) {
  const bool is_normed = q_weight.element_count() > 0;
  if (is_normed != (k_weight.element_count() > 0)) {
    return is_normed
               ? MustError(kOp, "k_weight", "be given with q_weight", "None")
               : MustError(kOp, "k_weight", "be absent without q_weight",
                           "shape " + FormatShape(k_weight.dimensions()));
  }
  if (!is_normed) return ffi::Error::Success();
  const struct {
    const char* name;
    ffi::AnyBuffer weight;
    const void** data;
  } kWeights[] = {{"q_weight", q_weight, &params->q_weight},
                  {"k_weight", k_weight, &params->k_weight}};
  for (const auto& [name, weight, data] : kWeights) {
    XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, name, weight, {params->dtype}));
    XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, name, weight, {params->head_dim}));
    *data = weight.untyped_data();
  }
  return ffi::Error::Success();
}

ffi::Error BindRotation(ffi::AnyBuffer table, ffi::AnyBuffer position_ids,
                        Params* params) {
  XLA_OPS_RETURN_IF_ERROR(
      params->dtype == DType::kF32
          ? CheckDType(kOp, "cos_sin_cache", table, {DType::kF32})
          : CheckDType(kOp, "cos_sin_cache", table,
                       {params->dtype, DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "cos_sin_cache", table,
                                     {"max_position", params->head_dim}));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "position_ids", position_ids,
                                     {DType::kS64, DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "position_ids", position_ids, {params->num_tokens}));
  params->table_dtype = *ToDType(table.element_type());
  params->positions_dtype = *ToDType(position_ids.element_type());
  params->max_position = table.dimensions()[0];
  params->cos_sin_cache = table.untyped_data();
  params->positions = position_ids.untyped_data();
  return ffi::Error::Success();
}

ffi::Error BindSlots(ffi::AnyBuffer slot_mapping, const CacheGeometry& geometry,
                     Params* params) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "slot_mapping", slot_mapping, {DType::kS64}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "slot_mapping", slot_mapping, {"num_tokens"}));
  params->num_cached_tokens = slot_mapping.dimensions()[0];
  if (params->num_cached_tokens > params->num_tokens) {
    return MustError(
        kOp, "slot_mapping",
        "have at most " + std::to_string(params->num_tokens) + " elements",
        std::to_string(params->num_cached_tokens));
  }
  XLA_OPS_RETURN_IF_ERROR(CheckGeometry(kOp, geometry));
  params->num_blocks = geometry.num_blocks;
  params->page_size = geometry.page_size;
  params->block_stride = geometry.block_stride;
  params->page_stride = geometry.page_stride;
  params->head_stride = geometry.head_stride;
  params->slot_mapping =
      static_cast<const int64_t*>(slot_mapping.untyped_data());
  return ffi::Error::Success();
}

// Checks one cache and sets `*data` to its view's first element in the result.
ffi::Error BindCache(const CacheOperand& operand, const CacheGeometry& geometry,
                     const Attrs& attrs, Params* params, void** data) {
  XLA_OPS_RETURN_IF_ERROR(CheckCacheDType(kOp, operand.name, operand.cache,
                                          attrs.kv_cache_dtype, params->dtype,
                                          &params->cache_dtype));
  XLA_OPS_RETURN_IF_ERROR(CheckCacheInBounds(
      kOp, operand.name, operand.cache, geometry, params->num_kv_heads,
      params->head_dim, operand.offset_name, operand.offset));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, operand.result_name, operand.result, operand.cache));
  ffi::Result<ffi::AnyBuffer> result = operand.result;
  *data = result->untyped_data();
  // A view of no element may begin anywhere, or nowhere.
  if (CacheExtent(geometry, params->num_kv_heads, params->head_dim) > 0) {
    *data = static_cast<char*>(*data) +
            operand.offset * SizeOf(params->cache_dtype);
  }
  return ffi::Error::Success();
}

ffi::Error BindScale(const char* name, ffi::AnyBuffer scale,
                     const float** data) {
  if (scale.element_count() == 0) return ffi::Error::Success();
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, name, scale, {DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(CheckOneElement(kOp, name, scale));
  *data = static_cast<const float*>(scale.untyped_data());
  return ffi::Error::Success();
}

// Both targets.
ffi::Error MakeParams(const Operands& operands, const CacheOperand& key_cache,
                      const CacheOperand& value_cache,
                      ffi::Result<ffi::AnyBuffer> query, const Attrs& attrs,
                      Params* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckQkv(operands.qkv, attrs));
  *params = Params{};
  params->dtype = *ToDType(operands.qkv.element_type());
  params->num_tokens = operands.qkv.dimensions()[0];
  params->num_heads = attrs.num_heads;
  params->num_kv_heads = attrs.num_kv_heads;
  params->head_dim = attrs.head_dim;
  params->eps = attrs.eps;
  params->is_neox = attrs.is_neox;
  params->debug = attrs.debug;
  XLA_OPS_RETURN_IF_ERROR(
      BindWeights(operands.q_weight, operands.k_weight, params));
  XLA_OPS_RETURN_IF_ERROR(
      BindRotation(operands.cos_sin_cache, operands.position_ids, params));
  const CacheGeometry geometry = {attrs.num_blocks, attrs.page_size,
                                  attrs.block_stride, attrs.page_stride,
                                  attrs.head_stride};
  XLA_OPS_RETURN_IF_ERROR(BindSlots(operands.slot_mapping, geometry, params));
  XLA_OPS_RETURN_IF_ERROR(
      BindCache(key_cache, geometry, attrs, params, &params->key_cache));
  XLA_OPS_RETURN_IF_ERROR(
      BindCache(value_cache, geometry, attrs, params, &params->value_cache));
  XLA_OPS_RETURN_IF_ERROR(
      BindScale("k_scale", operands.k_scale, &params->k_scale));
  XLA_OPS_RETURN_IF_ERROR(
      BindScale("v_scale", operands.v_scale, &params->v_scale));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "query result", query, {params->dtype}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "query result", query,
                 {params->num_tokens, params->num_heads, params->head_dim}));
  params->qkv = operands.qkv.untyped_data();
  params->query = query->untyped_data();
  return ffi::Error::Success();
}

}  // namespace

ffi::Error MakeFusedQkNormRopeAndCacheParams(
    ffi::AnyBuffer qkv, ffi::AnyBuffer cos_sin_cache,
    ffi::AnyBuffer position_ids, ffi::AnyBuffer slot_mapping,
    ffi::AnyBuffer q_weight, ffi::AnyBuffer k_weight, ffi::AnyBuffer k_scale,
    ffi::AnyBuffer v_scale, ffi::AnyBuffer value_cache,
    ffi::AnyBuffer key_cache, ffi::Result<ffi::AnyBuffer> query,
    ffi::Result<ffi::AnyBuffer> key_cache_result,
    ffi::Result<ffi::AnyBuffer> value_cache_result, const Attrs& attrs,
    Params* params) {
  XLA_OPS_RETURN_IF_ERROR(
      MakeParams({qkv, q_weight, k_weight, cos_sin_cache, position_ids,
                  slot_mapping, k_scale, v_scale},
                 {"key_cache", "key_cache result", "key_offset", key_cache,
                  key_cache_result, attrs.key_offset},
                 {"value_cache", "value_cache result", "value_offset",
                  value_cache, value_cache_result, attrs.value_offset},
                 query, attrs, params));
  AddCopy(key_cache, key_cache_result, &params->copies);
  AddCopy(value_cache, value_cache_result, &params->copies);
  return ffi::Error::Success();
}

ffi::Error MakeFusedQkNormRopeAndCacheStackedParams(
    ffi::AnyBuffer qkv, ffi::AnyBuffer cos_sin_cache,
    ffi::AnyBuffer position_ids, ffi::AnyBuffer slot_mapping,
    ffi::AnyBuffer q_weight, ffi::AnyBuffer k_weight, ffi::AnyBuffer k_scale,
    ffi::AnyBuffer v_scale, ffi::AnyBuffer kv_cache,
    ffi::Result<ffi::AnyBuffer> query,
    ffi::Result<ffi::AnyBuffer> kv_cache_result, const Attrs& attrs,
    Params* params) {
  const CacheOperand keys = {"kv_cache", "kv_cache result", "key_offset",
                             kv_cache,   kv_cache_result,   attrs.key_offset};
  CacheOperand values = keys;
  values.offset_name = "value_offset";
  values.offset = attrs.value_offset;
  XLA_OPS_RETURN_IF_ERROR(
      MakeParams({qkv, q_weight, k_weight, cos_sin_cache, position_ids,
                  slot_mapping, k_scale, v_scale},
                 keys, values, query, attrs, params));
  AddCopy(kv_cache, kv_cache_result, &params->copies);
  return ffi::Error::Success();
}

ffi::Error CheckCudaLimits(const Params& params) {
  const int64_t elements = SaturatingProduct(NumHeads(params), params.head_dim);
  if (params.num_tokens == 0 || elements <= kMaxCudaTokenElements) {
    return ffi::Error::Success();
  }
  return MustError(kOp, "qkv",
                   "have at most " + std::to_string(kMaxCudaTokenElements) +
                       " elements a token",
                   std::to_string(elements));
}

}  // namespace xla_ops
