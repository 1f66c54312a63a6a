// Operand checks of the reshape_and_cache_flash targets, for every platform.

#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"

#include <string>
#include <string_view>

#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "reshape_and_cache_flash";

// The operands of one cache and the names that errors give them.
struct CacheOperand {
  const char* name;
  const char* result_name;
  const char* offset_name;
  ffi::AnyBuffer cache;
  ffi::Result<ffi::AnyBuffer> result;
  int64_t offset;
};

CacheGeometry GeometryOf(const ReshapeAndCacheFlashAttrs& attrs) {
  return {attrs.num_blocks, attrs.page_size, attrs.block_stride,
          attrs.page_stride, attrs.head_stride};
}

// Key and slot_mapping, and what follows from them alone.
ffi::Error MakeKeyParams(ffi::AnyBuffer key, ffi::AnyBuffer slot_mapping,
                         const CacheGeometry& geometry, bool debug,
                         ReshapeAndCacheFlashParams* params) {
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
  XLA_OPS_RETURN_IF_ERROR(CheckGeometry(kOp, geometry));

  *params = ReshapeAndCacheFlashParams{};
  params->dtype = *ToDType(key.element_type());
  params->num_tokens = num_tokens;
  params->num_kv_heads = dims[1];
  params->head_dim = dims[2];
  params->num_blocks = geometry.num_blocks;
  params->page_size = geometry.page_size;
  params->block_stride = geometry.block_stride;
  params->page_stride = geometry.page_stride;
  params->head_stride = geometry.head_stride;
  params->key = key.untyped_data();
  params->slot_mapping =
      static_cast<const int64_t*>(slot_mapping.untyped_data());
  params->debug = debug;
  return ffi::Error::Success();
}

// Checks one cache, sets `*data` to its view's first element in the result
// and lists the copy that an unaliased result needs.
ffi::Error BindCache(const CacheOperand& operand, const CacheGeometry& geometry,
                     std::string_view kv_cache_dtype,
                     ReshapeAndCacheFlashParams* params, void** data) {
  XLA_OPS_RETURN_IF_ERROR(CheckCacheDType(kOp, operand.name, operand.cache,
                                          kv_cache_dtype, params->dtype,
                                          &params->cache_dtype));
  XLA_OPS_RETURN_IF_ERROR(CheckCacheInBounds(
      kOp, operand.name, operand.cache, geometry, params->num_kv_heads,
      params->head_dim, operand.offset_name, operand.offset));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, operand.result_name, operand.result, operand.cache));
  ffi::Result<ffi::AnyBuffer> result = operand.result;
  *data = result->untyped_data();
  if (!IsEmpty(*params)) {
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

// Both targets that write keys and values.
ffi::Error MakeTwoCacheParams(ffi::AnyBuffer key, ffi::AnyBuffer value,
                              const CacheOperand& key_cache,
                              const CacheOperand& value_cache,
                              ffi::AnyBuffer slot_mapping,
                              ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
                              const ReshapeAndCacheFlashAttrs& attrs,
                              ReshapeAndCacheFlashParams* params) {
  const CacheGeometry geometry = GeometryOf(attrs);
  XLA_OPS_RETURN_IF_ERROR(
      MakeKeyParams(key, slot_mapping, geometry, attrs.debug, params));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "value", value, key));
  params->value = value.untyped_data();
  XLA_OPS_RETURN_IF_ERROR(BindCache(key_cache, geometry, attrs.kv_cache_dtype,
                                    params, &params->key_cache));
  XLA_OPS_RETURN_IF_ERROR(BindCache(value_cache, geometry, attrs.kv_cache_dtype,
                                    params, &params->value_cache));
  XLA_OPS_RETURN_IF_ERROR(BindScale("k_scale", k_scale, &params->k_scale));
  return BindScale("v_scale", v_scale, &params->v_scale);
}

}  // namespace

ffi::Error MakeReshapeAndCacheFlashParams(
    ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer key_cache,
    ffi::AnyBuffer value_cache, ffi::AnyBuffer slot_mapping,
    ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
    ffi::Result<ffi::AnyBuffer> key_cache_result,
    ffi::Result<ffi::AnyBuffer> value_cache_result,
    const ReshapeAndCacheFlashAttrs& attrs,
    ReshapeAndCacheFlashParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      MakeTwoCacheParams(key, value,
                         {"key_cache", "key_cache result", "key_offset",
                          key_cache, key_cache_result, attrs.key_offset},
                         {"value_cache", "value_cache result", "value_offset",
                          value_cache, value_cache_result, attrs.value_offset},
                         slot_mapping, k_scale, v_scale, attrs, params));
  AddCopy(key_cache, key_cache_result, &params->copies);
  AddCopy(value_cache, value_cache_result, &params->copies);
  return ffi::Error::Success();
}

ffi::Error MakeReshapeAndCacheFlashStackedParams(
    ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::AnyBuffer kv_cache,
    ffi::AnyBuffer slot_mapping, ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
    ffi::Result<ffi::AnyBuffer> kv_cache_result,
    const ReshapeAndCacheFlashAttrs& attrs,
    ReshapeAndCacheFlashParams* params) {
  CacheOperand operand = {"kv_cache", "kv_cache result", "key_offset",
                          kv_cache,   kv_cache_result,   attrs.key_offset};
  CacheOperand value_operand = operand;
  value_operand.offset_name = "value_offset";
  value_operand.offset = attrs.value_offset;
  XLA_OPS_RETURN_IF_ERROR(MakeTwoCacheParams(key, value, operand, value_operand,
                                             slot_mapping, k_scale, v_scale,
                                             attrs, params));
  AddCopy(kv_cache, kv_cache_result, &params->copies);
  return ffi::Error::Success();
}

ffi::Error MakeReshapeAndCacheFlashOneParams(
    ffi::AnyBuffer key, ffi::AnyBuffer key_cache, ffi::AnyBuffer slot_mapping,
    ffi::AnyBuffer k_scale, ffi::Result<ffi::AnyBuffer> key_cache_result,
    const ReshapeAndCacheFlashOneAttrs& attrs,
    ReshapeAndCacheFlashParams* params) {
  const CacheGeometry geometry = {attrs.num_blocks, attrs.page_size,
                                  attrs.block_stride, attrs.page_stride,
                                  attrs.head_stride};
  XLA_OPS_RETURN_IF_ERROR(
      MakeKeyParams(key, slot_mapping, geometry, attrs.debug, params));
  XLA_OPS_RETURN_IF_ERROR(
      BindCache({"key_cache", "key_cache result", "key_offset", key_cache,
                 key_cache_result, attrs.key_offset},
                geometry, attrs.kv_cache_dtype, params, &params->key_cache));
  XLA_OPS_RETURN_IF_ERROR(BindScale("k_scale", k_scale, &params->k_scale));
  AddCopy(key_cache, key_cache_result, &params->copies);
  return ffi::Error::Success();
}

ffi::Error CheckCudaLimits(const ReshapeAndCacheFlashParams& params) {
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
