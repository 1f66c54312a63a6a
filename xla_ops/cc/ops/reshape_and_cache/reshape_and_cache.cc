// Operand checks of the reshape_and_cache targets, for every platform.

#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache.h"

#include <string>
#include <string_view>

#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "reshape_and_cache";

// One cache as it comes, and the names that errors give to its parts.
struct CacheOperand {
  const char* name;
  const char* result_name;
  const char* stride_name;
  const char* offset_name;
  const char* scale_name;
  ffi::AnyBuffer cache;
  ffi::Result<ffi::AnyBuffer> result;
  ffi::AnyBuffer scale;
  int64_t x;
  int64_t block_stride;
  int64_t offset;
};

// Key and slot_mapping, and what follows from them alone.
ffi::Error MakeKeyParams(ffi::AnyBuffer key, ffi::AnyBuffer slot_mapping,
                         int64_t num_blocks, int64_t page_size, int64_t key_x,
                         bool debug, ReshapeAndCacheParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "key", key, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "key", key, {"num_tokens", "num_kv_heads", "head_dim"}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "slot_mapping", slot_mapping, {DType::kS64}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "slot_mapping", slot_mapping, {"num_tokens"}));
  const auto dims = key.dimensions();
  const int64_t num_tokens = slot_mapping.dimensions()[0];
  if (num_tokens > dims[0]) {
    return MustError(kOp, "slot_mapping",
                     "have at most " + std::to_string(dims[0]) + " elements",
                     std::to_string(num_tokens));
  }
  XLA_OPS_RETURN_IF_ERROR(
      CheckGeometry(kOp, {num_blocks, page_size, /*block_stride=*/0,
                          /*page_stride=*/0, /*head_stride=*/0}));
  if (key_x < 1 || dims[2] % key_x != 0) {
    return MustError(kOp, "key_x", "divide head_dim " + std::to_string(dims[2]),
                     std::to_string(key_x));
  }
  *params = ReshapeAndCacheParams{};
  params->dtype = *ToDType(key.element_type());
  params->num_tokens = num_tokens;
  params->num_kv_heads = dims[1];
  params->head_dim = dims[2];
  params->num_blocks = num_blocks;
  params->page_size = page_size;
  params->slot_mapping =
      static_cast<const int64_t*>(slot_mapping.untyped_data());
  params->debug = debug;
  return ffi::Error::Success();
}

ffi::Error BindSide(ffi::AnyBuffer rows, const CacheOperand& operand,
                    std::string_view kv_cache_dtype,
                    ReshapeAndCacheParams* params) {
  ReshapeAndCacheSide& side = params->sides[params->num_sides++];
  side.rows = rows.untyped_data();
  side.x = operand.x;
  side.block_stride = operand.block_stride;
  XLA_OPS_RETURN_IF_ERROR(CheckCacheDType(kOp, operand.name, operand.cache,
                                          kv_cache_dtype, params->dtype,
                                          &params->cache_dtype));
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(kOp, operand.stride_name, operand.block_stride, 0));
  // A dense block, as rows of page_size elements.
  const CacheGeometry geometry = {
      params->num_blocks, params->num_kv_heads, operand.block_stride,
      SaturatingProduct(params->head_dim, params->page_size),
      params->page_size};
  XLA_OPS_RETURN_IF_ERROR(CheckCacheInBounds(
      kOp, operand.name, operand.cache, geometry, params->head_dim,
      params->page_size, operand.offset_name, operand.offset));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, operand.result_name, operand.result, operand.cache));
  ffi::Result<ffi::AnyBuffer> result = operand.result;
  side.cache = result->untyped_data();
  if (!IsEmpty(*params)) {
    side.cache = static_cast<char*>(side.cache) +
                 operand.offset * SizeOf(params->cache_dtype);
  }
  if (operand.scale.element_count() > 0) {
    XLA_OPS_RETURN_IF_ERROR(CheckScale(kOp, operand.scale_name, operand.scale));
    side.scale = static_cast<const float*>(operand.scale.untyped_data());
  }
  return ffi::Error::Success();
}

void AddCopy(ffi::AnyBuffer from, ffi::Result<ffi::AnyBuffer> to,
             ReshapeAndCacheSide* side) {
  if (from.untyped_data() == to->untyped_data()) return;
  side->copy_from = from.untyped_data();
  side->copy_to = to->untyped_data();
  side->copy_bytes = static_cast<int64_t>(from.size_bytes());
}

// Both targets that write keys and values.
ffi::Error MakeTwoSides(ffi::AnyBuffer key, ffi::AnyBuffer value,
                        const CacheOperand& key_cache,
                        const CacheOperand& value_cache,
                        ffi::AnyBuffer slot_mapping,
                        const ReshapeAndCacheAttrs& attrs,
                        ReshapeAndCacheParams* params) {
  XLA_OPS_RETURN_IF_ERROR(MakeKeyParams(key, slot_mapping, attrs.num_blocks,
                                        attrs.page_size, attrs.key_x,
                                        attrs.debug, params));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "value", value, key));
  XLA_OPS_RETURN_IF_ERROR(
      BindSide(key, key_cache, attrs.kv_cache_dtype, params));
  return BindSide(value, value_cache, attrs.kv_cache_dtype, params);
}

}  // namespace

ffi::Error MakeReshapeAndCacheParams(
    ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer key_cache,
    ffi::AnyBuffer value_cache, ffi::AnyBuffer slot_mapping,
    ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
    ffi::Result<ffi::AnyBuffer> key_cache_result,
    ffi::Result<ffi::AnyBuffer> value_cache_result,
    const ReshapeAndCacheAttrs& attrs, ReshapeAndCacheParams* params) {
  XLA_OPS_RETURN_IF_ERROR(MakeTwoSides(
      key, value,
      {"key_cache", "key_cache result", "key_block_stride", "key_offset",
       "k_scale", key_cache, key_cache_result, k_scale, attrs.key_x,
       attrs.key_block_stride, attrs.key_offset},
      {"value_cache", "value_cache result", "value_block_stride",
       "value_offset", "v_scale", value_cache, value_cache_result, v_scale,
       /*x=*/1, attrs.value_block_stride, attrs.value_offset},
      slot_mapping, attrs, params));
  AddCopy(key_cache, key_cache_result, &params->sides[0]);
  AddCopy(value_cache, value_cache_result, &params->sides[1]);
  return ffi::Error::Success();
}

ffi::Error MakeReshapeAndCacheStackedParams(
    ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer kv_cache,
    ffi::AnyBuffer slot_mapping, ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
    ffi::Result<ffi::AnyBuffer> kv_cache_result,
    const ReshapeAndCacheAttrs& attrs, ReshapeAndCacheParams* params) {
  XLA_OPS_RETURN_IF_ERROR(MakeTwoSides(
      key, value,
      {"kv_cache", "kv_cache result", "key_block_stride", "key_offset",
       "k_scale", kv_cache, kv_cache_result, k_scale, attrs.key_x,
       attrs.key_block_stride, attrs.key_offset},
      {"kv_cache", "kv_cache result", "value_block_stride", "value_offset",
       "v_scale", kv_cache, kv_cache_result, v_scale, /*x=*/1,
       attrs.value_block_stride, attrs.value_offset},
      slot_mapping, attrs, params));
  AddCopy(kv_cache, kv_cache_result, &params->sides[0]);
  return ffi::Error::Success();
}

ffi::Error MakeReshapeAndCacheOneParams(
    ffi::AnyBuffer key, ffi::AnyBuffer key_cache, ffi::AnyBuffer slot_mapping,
    ffi::AnyBuffer k_scale, ffi::Result<ffi::AnyBuffer> key_cache_result,
    const ReshapeAndCacheOneAttrs& attrs, ReshapeAndCacheParams* params) {
  XLA_OPS_RETURN_IF_ERROR(MakeKeyParams(key, slot_mapping, attrs.num_blocks,
                                        attrs.page_size, attrs.key_x,
                                        attrs.debug, params));
  XLA_OPS_RETURN_IF_ERROR(
      BindSide(key,
               {"key_cache", "key_cache result", "key_block_stride",
                "key_offset", "k_scale", key_cache, key_cache_result, k_scale,
                attrs.key_x, attrs.key_block_stride, attrs.key_offset},
               attrs.kv_cache_dtype, params));
  AddCopy(key_cache, key_cache_result, &params->sides[0]);
  return ffi::Error::Success();
}

ffi::Error CheckCudaLimits(const ReshapeAndCacheParams& params) {
  const int64_t elements =
      SaturatingProduct(params.num_kv_heads, params.head_dim);
  if (IsEmpty(params) || elements <= kMaxCudaTokenElements) {
    return ffi::Error::Success();
  }
  return MustError(kOp, "key",
                   "have at most " + std::to_string(kMaxCudaTokenElements) +
                       " elements a token",
                   std::to_string(elements));
}

}  // namespace xla_ops
