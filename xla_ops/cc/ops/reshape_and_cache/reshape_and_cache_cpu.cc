// CPU kernel and handlers of the xla_ops.reshape_and_cache targets.
//
// Threads share the work by cache and head, not by token, so that tokens
// with the same slot are written in order: here the last one wins whole.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache.h"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache_checks.h"

namespace xla_ops {
namespace {

constexpr int kMaxReports = 8;

void ReportSkippedSlots(const ReshapeAndCacheParams& params,
                        int64_t num_slots) {
  int reports = 0;
  for (int64_t t = 0; t < params.num_tokens && reports < kMaxReports; ++t) {
    const int64_t slot = params.slot_mapping[t];
    if (slot < num_slots) continue;
    ++reports;
    std::fprintf(stderr,
                 "xla_ops: reshape_and_cache: slot_mapping[%lld] must be less "
                 "than %lld, got %lld; skipped\n",
                 static_cast<long long>(t), static_cast<long long>(num_slots),
                 static_cast<long long>(slot));
  }
}

// `scale` is read for fp8.
template <typename T, typename CacheT>
CacheT Convert(T x, float scale) {
  if constexpr (std::is_same_v<T, CacheT>) {
    return x;
  } else {
    return FromFloat<CacheT>(ToFloat(x) / scale);
  }
}

// Writes head `head` of every token.
template <typename T, typename CacheT>
void WriteHead(const ReshapeAndCacheParams& params,
               const ReshapeAndCacheSide& side, int64_t head) {
  const int64_t num_slots = params.num_blocks * params.page_size;
  const float scale = side.scale != nullptr ? *side.scale : 1.0f;
  const int64_t x = side.x;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const int64_t slot = params.slot_mapping[t];
    if (slot < 0 || slot >= num_slots) continue;
    const T* from = static_cast<const T*>(side.rows) +
                    (t * params.num_kv_heads + head) * params.head_dim;
    CacheT* to = static_cast<CacheT*>(side.cache) +
                 slot / params.page_size * side.block_stride +
                 head * params.head_dim * params.page_size +
                 slot % params.page_size * x;
    for (int64_t d = 0; d < params.head_dim; d += x) {
      for (int64_t i = 0; i < x; ++i) {
        to[d * params.page_size + i] = Convert<T, CacheT>(from[d + i], scale);
      }
    }
  }
}

template <typename T, typename CacheT>
void Write(const ReshapeAndCacheParams& params, ffi::ThreadPool& pool) {
  const int64_t num_heads = params.num_kv_heads;
  ParallelFor(pool, params.num_sides * num_heads,
              params.num_tokens * params.head_dim, [&](int64_t i) {
                WriteHead<T, CacheT>(params, params.sides[i / num_heads],
                                     i % num_heads);
              });
}

void ReshapeAndCache(const ReshapeAndCacheParams& params,
                     ffi::ThreadPool& pool) {
  for (const ReshapeAndCacheSide& side : params.sides) {
    if (side.copy_bytes > 0) {
      std::memcpy(side.copy_to, side.copy_from,
                  static_cast<size_t>(side.copy_bytes));
    }
  }
  if (params.debug) {
    ReportSkippedSlots(params, params.num_blocks * params.page_size);
  }
  if (IsEmpty(params)) return;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    if (params.cache_dtype == params.dtype) {
      Write<T, T>(params, pool);
    } else if (params.cache_dtype == DType::kF8E4M3FN) {
      Write<T, Float8E4M3FN>(params, pool);
    } else {
      Write<T, Float8E5M2>(params, pool);
    }
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(reshape_and_cache, ReshapeAndCacheBinding(),
                    MakeReshapeAndCacheParams, ReshapeAndCache);
XLA_OPS_CPU_HANDLER(reshape_and_cache_stacked, ReshapeAndCacheStackedBinding(),
                    MakeReshapeAndCacheStackedParams, ReshapeAndCache);
XLA_OPS_CPU_HANDLER(reshape_and_cache_one, ReshapeAndCacheOneBinding(),
                    MakeReshapeAndCacheOneParams, ReshapeAndCache);

}  // namespace xla_ops
