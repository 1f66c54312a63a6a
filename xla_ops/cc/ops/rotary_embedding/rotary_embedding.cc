// Operand checks of the rotary_embedding targets, for every platform.

#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"

#include <cstddef>
#include <string>

#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "rotary_embedding";

ffi::Error CheckPositions(ffi::AnyBuffer positions, int64_t head_size,
                          RotaryEmbeddingParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "positions", positions, {DType::kS64, DType::kS32}));
  const auto dims = positions.dimensions();
  if (dims.size() != 1 && dims.size() != 2) {
    return MustError(kOp, "positions",
                     "have shape [num_tokens] or [batch_size, seq_len]",
                     FormatShape(dims));
  }
  XLA_OPS_RETURN_IF_ERROR(CheckAtLeast(kOp, "head_size", head_size, 1));
  *params = RotaryEmbeddingParams{};
  params->num_tokens = static_cast<int64_t>(positions.element_count());
  params->head_size = head_size;
  params->positions_dtype = *ToDType(positions.element_type());
  params->positions = positions.untyped_data();
  return ffi::Error::Success();
}

// Checks queries or keys whose dtype is right, and binds them.
ffi::Error BindHeads(const char* name, const char* result_name,
                     ffi::AnyBuffer positions, ffi::AnyBuffer heads,
                     ffi::Result<ffi::AnyBuffer> result, int64_t head_size,
                     RotaryHeads* bound) {
  const auto tokens = positions.dimensions();
  const auto dims = heads.dimensions();
  const size_t rank = tokens.size();
  bool fits = dims.size() == rank + 1 || dims.size() == rank + 2;
  for (size_t i = 0; fits && i < rank; ++i) fits = dims[i] == tokens[i];
  fits = fits && (dims.size() == rank + 1 ? dims[rank] % head_size == 0
                                          : dims[rank + 1] == head_size);
  if (!fits) {
    const std::string shape = FormatShape(tokens);
    const std::string start = shape.substr(0, shape.size() - 1);
    const std::string size = std::to_string(head_size);
    return MustError(kOp, name,
                     "have shape " + start + ", num_heads * " + size + "] or " +
                         start + ", num_heads, " + size + "]",
                     FormatShape(dims));
  }
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, result_name, result, heads));
  bound->num_heads =
      dims.size() == rank + 1 ? dims[rank] / head_size : dims[rank];
  bound->in = heads.untyped_data();
  bound->out = result->untyped_data();
  return ffi::Error::Success();
}

ffi::Error BindQuery(ffi::AnyBuffer positions, ffi::AnyBuffer query,
                     ffi::Result<ffi::AnyBuffer> result,
                     RotaryEmbeddingParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "query", query, kFloatDTypes));
  params->dtype = *ToDType(query.element_type());
  return BindHeads("query", "query result", positions, query, result,
                   params->head_size, &params->query);
}

ffi::Error BindCache(ffi::AnyBuffer cache, RotaryEmbeddingParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      params->dtype == DType::kF32
          ? CheckDType(kOp, "cos_sin_cache", cache, {DType::kF32})
          : CheckDType(kOp, "cos_sin_cache", cache,
                       {params->dtype, DType::kF32}));
  params->cache_dtype = *ToDType(cache.element_type());
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "cos_sin_cache", cache, {"max_position", "rotary_dim"}));
  const auto dims = cache.dimensions();
  if (dims[1] % 2 != 0 || dims[1] > params->head_size) {
    return MustError(kOp, "cos_sin_cache",
                     "have an even last dimension of at most " +
                         std::to_string(params->head_size),
                     std::to_string(dims[1]));
  }
  params->max_position = dims[0];
  params->rotary_dim = dims[1];
  params->cos_sin_cache = cache.untyped_data();
  return ffi::Error::Success();
}

}  // namespace

ffi::Error MakeRotaryEmbeddingParams(ffi::AnyBuffer positions,
                                     ffi::AnyBuffer query, ffi::AnyBuffer key,
                                     ffi::AnyBuffer cos_sin_cache,
                                     ffi::Result<ffi::AnyBuffer> query_result,
                                     ffi::Result<ffi::AnyBuffer> key_result,
                                     int64_t head_size, bool is_neox,
                                     RotaryEmbeddingParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckPositions(positions, head_size, params));
  XLA_OPS_RETURN_IF_ERROR(BindQuery(positions, query, query_result, params));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "key", key, {params->dtype}));
  XLA_OPS_RETURN_IF_ERROR(BindHeads("key", "key result", positions, key,
                                    key_result, head_size, &params->key));
  const int64_t num_heads = params->query.num_heads;
  const int64_t num_kv_heads = params->key.num_heads;
  if (num_kv_heads == 0 ? num_heads != 0 : num_heads % num_kv_heads != 0) {
    return MustError(kOp, "key",
                     "have a number of heads that divides query's " +
                         std::to_string(num_heads),
                     std::to_string(num_kv_heads));
  }
  params->is_neox = is_neox;
  return BindCache(cos_sin_cache, params);
}

ffi::Error MakeRotaryEmbeddingOneParams(
    ffi::AnyBuffer positions, ffi::AnyBuffer query,
    ffi::AnyBuffer cos_sin_cache, ffi::Result<ffi::AnyBuffer> query_result,
    int64_t head_size, bool is_neox, RotaryEmbeddingParams* params) {
  XLA_OPS_RETURN_IF_ERROR(CheckPositions(positions, head_size, params));
  XLA_OPS_RETURN_IF_ERROR(BindQuery(positions, query, query_result, params));
  params->is_neox = is_neox;
  return BindCache(cos_sin_cache, params);
}

ffi::Error CheckCudaLimits(const RotaryEmbeddingParams& params) {
  const int64_t elements = SaturatingProduct(
      params.query.num_heads + params.key.num_heads, params.head_size);
  if (params.num_tokens == 0 || elements <= kMaxCudaTokenElements) {
    return ffi::Error::Success();
  }
  return MustError(kOp, "query",
                   "have at most " + std::to_string(kMaxCudaTokenElements) +
                       " elements a token, key's included",
                   std::to_string(elements));
}

}  // namespace xla_ops
