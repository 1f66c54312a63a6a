// Operand checks of fused_qk_norm_rope, for every platform.

#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "fused_qk_norm_rope";

// Columns of qkv. What does not fit in 63 bits is the largest number, which no
// array has.
int64_t NumColumns(const FusedQkNormRopeAttrs& attrs) {
  int64_t columns;
  if (__builtin_add_overflow(attrs.num_heads_q, attrs.num_heads_k, &columns) ||
      __builtin_add_overflow(columns, attrs.num_heads_v, &columns) ||
      __builtin_mul_overflow(columns, attrs.head_dim, &columns)) {
    return INT64_MAX;
  }
  return columns;
}

ffi::Error CheckWeight(const char* name, ffi::AnyBuffer weight,
                       const FusedQkNormRopeParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, name, weight, {params.dtype}));
  return CheckShape(kOp, name, weight, {params.head_dim});
}

}  // namespace

ffi::Error MakeFusedQkNormRopeParams(
    ffi::AnyBuffer qkv, ffi::AnyBuffer q_weight, ffi::AnyBuffer k_weight,
    ffi::AnyBuffer cos_sin_cache, ffi::AnyBuffer position_ids,
    ffi::Result<ffi::AnyBuffer> qkv_result, const FusedQkNormRopeAttrs& attrs,
    FusedQkNormRopeParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "qkv", qkv, kFloatDTypes));
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(kOp, "num_heads_q", attrs.num_heads_q, 0));
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(kOp, "num_heads_k", attrs.num_heads_k, 0));
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(kOp, "num_heads_v", attrs.num_heads_v, 0));
  if (attrs.head_dim < 2 || attrs.head_dim % 2 != 0) {
    return MustError(kOp, "head_dim", "be even and at least 2",
                     std::to_string(attrs.head_dim));
  }
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "qkv", qkv, {"num_tokens", NumColumns(attrs)}));
  XLA_OPS_RETURN_IF_ERROR(CheckPositiveFinite(kOp, "eps", attrs.eps));
  params->dtype = *ToDType(qkv.element_type());
  params->num_tokens = qkv.dimensions()[0];
  params->num_heads_q = attrs.num_heads_q;
  params->num_heads_k = attrs.num_heads_k;
  params->num_heads_v = attrs.num_heads_v;
  params->head_dim = attrs.head_dim;
  params->eps = attrs.eps;
  params->is_neox = attrs.is_neox;
  XLA_OPS_RETURN_IF_ERROR(CheckWeight("q_weight", q_weight, *params));
  XLA_OPS_RETURN_IF_ERROR(CheckWeight("k_weight", k_weight, *params));
  XLA_OPS_RETURN_IF_ERROR(
      params->dtype == DType::kF32
          ? CheckDType(kOp, "cos_sin_cache", cos_sin_cache, {DType::kF32})
          : CheckDType(kOp, "cos_sin_cache", cos_sin_cache,
                       {params->dtype, DType::kF32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOp, "cos_sin_cache", cos_sin_cache,
                                     {"max_position", params->head_dim}));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "position_ids", position_ids,
                                     {DType::kS64, DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "position_ids", position_ids, {params->num_tokens}));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "qkv result", qkv_result, qkv));
  params->cache_dtype = *ToDType(cos_sin_cache.element_type());
  params->positions_dtype = *ToDType(position_ids.element_type());
  params->max_position = cos_sin_cache.dimensions()[0];
  params->qkv = qkv.untyped_data();
  params->q_weight = q_weight.untyped_data();
  params->k_weight = k_weight.untyped_data();
  params->cos_sin_cache = cos_sin_cache.untyped_data();
  params->positions = position_ids.untyped_data();
  params->out = qkv_result->untyped_data();
  return ffi::Error::Success();
}

ffi::Error CheckCudaLimits(const FusedQkNormRopeParams& params) {
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
