// CPU kernel and handlers of the fused_qk_norm_rope_and_cache targets. Tokens
// are spread over XLA's threads, but those of keys and values are written head
// by head, so that tokens with the same slot are written in order: here the
// last one wins whole.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/cache_write.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/rope_math.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_checks.h"

namespace xla_ops {
namespace {

using Params = FusedQkNormRopeAndCacheParams;

template <typename T>
T* HeadOf(const Params& params, int64_t token, int64_t head) {
  return static_cast<T*>(params.qkv) +
         (token * NumHeads(params) + head) * params.head_dim;
}

// Norms, where there are weights, and rotates a token's queries and keys.
template <typename T, typename Table>
void RotateToken(const Params& params, int64_t token) {
  const int64_t position =
      PositionOf(params.positions, params.positions_dtype, token);
  const bool rotate = position >= 0 && position < params.max_position;
  const Table* cos = rotate ? static_cast<const Table*>(params.cos_sin_cache) +
                                  position * params.head_dim
                            : nullptr;
  const int64_t pairs = params.head_dim / 2;
  for (int64_t h = 0; h < params.num_heads + params.num_kv_heads; ++h) {
    T* head = HeadOf<T>(params, token, h);
    if (params.q_weight != nullptr) {
      const void* weight =
          h < params.num_heads ? params.q_weight : params.k_weight;
      NormAndRotateHead(params.head_dim, params.eps, params.is_neox,
                        static_cast<const T*>(weight), cos, head);
    } else if (rotate) {
      RotateHead(head, cos, cos + pairs, pairs, params.is_neox);
    }
  }
}

// Writes a head of keys or values of every token; `head`: of a row of qkv.
template <typename T, typename CacheT>
void WriteHead(const Params& params, int64_t head) {
  const int64_t kv_head = (head - params.num_heads) % params.num_kv_heads;
  const bool is_value = head >= params.num_heads + params.num_kv_heads;
  const float* given = is_value ? params.v_scale : params.k_scale;
  const bool is_scaled = params.cache_dtype != params.dtype && given != nullptr;
  const float scale = is_scaled ? *given : 1.0f;
  CacheT* cache =
      static_cast<CacheT*>(is_value ? params.value_cache : params.key_cache) +
      kv_head * params.head_stride;
  const int64_t num_slots = params.num_blocks * params.page_size;
  for (int64_t token = 0; token < params.num_cached_tokens; ++token) {
    const int64_t slot = params.slot_mapping[token];
    if (slot < 0 || slot >= num_slots) continue;
    const int64_t block = slot / params.page_size;
    const int64_t page_offset = slot % params.page_size;
    ToCache<T, CacheT>::Run(
        HeadOf<T>(params, token, head), params.head_dim, scale,
        cache + block * params.block_stride + page_offset * params.page_stride);
  }
}

template <typename T, typename CacheT>
void WriteCaches(const Params& params, ffi::ThreadPool& pool) {
  ParallelFor(
      pool, 2 * params.num_kv_heads, params.num_cached_tokens * params.head_dim,
      [&](int64_t i) { WriteHead<T, CacheT>(params, params.num_heads + i); });
}

void FusedQkNormRopeAndCache(const Params& params, ffi::ThreadPool& pool) {
  for (int i = 0; i < params.num_copies; ++i) {
    const ResultCopy& copy = params.copies[i];
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
  if (params.debug) {
    ReportSkippedSlots("fused_qk_norm_rope_and_cache", params.slot_mapping,
                       params.num_cached_tokens,
                       params.num_blocks * params.page_size);
  }
  const int64_t heads = params.num_heads + params.num_kv_heads;
  if (params.num_tokens == 0 || heads == 0) return;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const auto rotate = [&](auto entry) {
      using Table = decltype(entry);
      ParallelFor(pool, params.num_tokens, 2 * heads * params.head_dim,
                  [&](int64_t token) { RotateToken<T, Table>(params, token); });
    };
    if (params.table_dtype == DType::kF32) {
      rotate(float{});
    } else {
      rotate(T{});
    }
    if (params.cache_dtype == params.dtype) {
      WriteCaches<T, T>(params, pool);
    } else if (params.cache_dtype == DType::kF8E4M3FN) {
      WriteCaches<T, Float8E4M3FN>(params, pool);
    } else {
      WriteCaches<T, Float8E5M2>(params, pool);
    }
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(fused_qk_norm_rope_and_cache,
                    FusedQkNormRopeAndCacheBinding(),
                    MakeFusedQkNormRopeAndCacheParams, FusedQkNormRopeAndCache);
XLA_OPS_CPU_HANDLER(fused_qk_norm_rope_and_cache_stacked,
                    FusedQkNormRopeAndCacheStackedBinding(),
                    MakeFusedQkNormRopeAndCacheStackedParams,
                    FusedQkNormRopeAndCache);

}  // namespace xla_ops
