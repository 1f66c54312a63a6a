// The CPU kernel of fused_qk_norm_rope_and_cache. Queries are spread over XLA's
// threads by token; keys and values by head, so that tokens with the same slot
// are written in order: here the last one wins whole.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/cache_copy.h"
#include "xla_ops/cc/core/cache_write.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/rope_math.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_cpu.h"

namespace xla_ops {
namespace {

using Params = FusedQkNormRopeAndCacheParams;

template <typename T>
const T* HeadOf(const Params& params, int64_t token, int64_t head) {
  return static_cast<const T*>(params.qkv) +
         (token * NumHeads(params) + head) * params.head_dim;
}

// Puts a head of queries or keys into `out`, normed, where there are weights,
// and rotated; `head`: of a row of qkv.
template <typename T, typename Table>
void RotateInto(const Params& params, int64_t token, int64_t head, T* out) {
  const int64_t position =
      PositionOf(params.positions, params.positions_dtype, token);
  const bool rotate = position >= 0 && position < params.max_position;
  const Table* cos = rotate ? static_cast<const Table*>(params.cos_sin_cache) +
                                  position * params.head_dim
                            : nullptr;
  const int64_t pairs = params.head_dim / 2;
  std::copy_n(HeadOf<T>(params, token, head), params.head_dim, out);
  if (params.q_weight != nullptr) {
    const void* weight =
        head < params.num_heads ? params.q_weight : params.k_weight;
    NormAndRotateHead(params.head_dim, params.eps, params.is_neox,
                      static_cast<const T*>(weight), cos, out);
  } else if (rotate) {
    RotateHead(out, cos, cos + pairs, pairs, params.is_neox);
  }
}

template <typename T, typename Table>
void WriteQueries(const Params& params, int64_t token) {
  T* out = static_cast<T*>(params.query) +
           token * params.num_heads * params.head_dim;
  for (int64_t h = 0; h < params.num_heads; ++h) {
    RotateInto<T, Table>(params, token, h, out + h * params.head_dim);
  }
}

// Writes a head of keys or values of every token; `head`: of a row of qkv.
template <typename T, typename Table, typename CacheT>
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
  std::vector<T> rotated(is_value ? 0 : params.head_dim);
  for (int64_t token = 0; token < params.num_cached_tokens; ++token) {
    const int64_t slot = params.slot_mapping[token];
    if (slot < 0 || slot >= num_slots) continue;
    const int64_t block = slot / params.page_size;
    const int64_t page_offset = slot % params.page_size;
    const T* x = HeadOf<T>(params, token, head);
    if (!is_value) {
      RotateInto<T, Table>(params, token, head, rotated.data());
      x = rotated.data();
    }
    ToCache<T, CacheT>::Run(
        x, params.head_dim, scale,
        cache + block * params.block_stride + page_offset * params.page_stride);
  }
}

template <typename T, typename Table>
void Run(const Params& params, ffi::ThreadPool& pool) {
  ParallelFor(pool, params.num_tokens, 2 * params.num_heads * params.head_dim,
              [&](int64_t token) { WriteQueries<T, Table>(params, token); });
  const auto write = [&](auto element) {
    using CacheT = decltype(element);
    ParallelFor(pool, 2 * params.num_kv_heads,
                2 * params.num_cached_tokens * params.head_dim, [&](int64_t i) {
                  WriteHead<T, Table, CacheT>(params, params.num_heads + i);
                });
  };
  if (params.cache_dtype == params.dtype) {
    write(T{});
  } else if (params.cache_dtype == DType::kF8E4M3FN) {
    write(Float8E4M3FN{});
  } else {
    write(Float8E5M2{});
  }
}

}  // namespace

void FusedQkNormRopeAndCache(const FusedQkNormRopeAndCacheParams& params,
                             ffi::ThreadPool& pool) {
  CopyCaches(params.copies);
  if (params.debug) {
    ReportSkippedSlots("fused_qk_norm_rope_and_cache", params.slot_mapping,
                       params.num_cached_tokens,
                       params.num_blocks * params.page_size);
  }
  if (params.num_tokens == 0) return;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    if (params.table_dtype == DType::kF32) {
      Run<T, float>(params, pool);
    } else {
      Run<T, T>(params, pool);
    }
  });
}

}  // namespace xla_ops
