// CPU kernel and handlers of the xla_ops.reshape_and_cache_flash targets.
//
// Threads share the work by cache and head, not by token, so that tokens
// with the same slot are written in order: here the last one wins whole.

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/cache_copy.h"
#include "xla_ops/cc/core/cache_write.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_checks.h"

namespace xla_ops {
namespace {

// Writes head `head` of every token. `rows`: [num_tokens, num_kv_heads,
// head_dim]; `cache`: the view's first element.
template <typename T, typename CacheT>
void WriteHead(const ReshapeAndCacheFlashParams& params, const T* rows,
               int64_t head, float scale, CacheT* cache) {
  const int64_t num_slots = params.num_blocks * params.page_size;
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const int64_t slot = params.slot_mapping[t];
    if (slot < 0 || slot >= num_slots) continue;
    const int64_t block = slot / params.page_size;
    const int64_t page_offset = slot % params.page_size;
    ToCache<T, CacheT>::Run(
        rows + (t * params.num_kv_heads + head) * params.head_dim,
        params.head_dim, scale,
        cache + block * params.block_stride + page_offset * params.page_stride +
            head * params.head_stride);
  }
}

template <typename T, typename CacheT>
void Write(const ReshapeAndCacheFlashParams& params, ffi::ThreadPool& pool) {
  const bool scaled = params.cache_dtype != params.dtype;
  const float k_scale = scaled && params.k_scale ? *params.k_scale : 1.0f;
  const bool two = params.value != nullptr;
  const float v_scale =
      two && scaled && params.v_scale ? *params.v_scale : 1.0f;
  const int64_t num_heads = params.num_kv_heads;
  ParallelFor(pool, two ? 2 * num_heads : num_heads,
              params.num_tokens * params.head_dim, [&](int64_t i) {
                if (i < num_heads) {
                  WriteHead(params, static_cast<const T*>(params.key), i,
                            k_scale, static_cast<CacheT*>(params.key_cache));
                } else {
                  WriteHead(params, static_cast<const T*>(params.value),
                            i - num_heads, v_scale,
                            static_cast<CacheT*>(params.value_cache));
                }
              });
}

void ReshapeAndCacheFlash(const ReshapeAndCacheFlashParams& params,
                          ffi::ThreadPool& pool) {
  CopyCaches(params.copies);
  if (params.debug) {
    ReportSkippedSlots("reshape_and_cache_flash", params.slot_mapping,
                       params.num_tokens, params.num_blocks * params.page_size);
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

XLA_OPS_CPU_HANDLER(reshape_and_cache_flash, ReshapeAndCacheFlashBinding(),
                    MakeReshapeAndCacheFlashParams, ReshapeAndCacheFlash);
XLA_OPS_CPU_HANDLER(reshape_and_cache_flash_stacked,
                    ReshapeAndCacheFlashStackedBinding(),
                    MakeReshapeAndCacheFlashStackedParams,
                    ReshapeAndCacheFlash);
XLA_OPS_CPU_HANDLER(reshape_and_cache_flash_one,
                    ReshapeAndCacheFlashOneBinding(),
                    MakeReshapeAndCacheFlashOneParams, ReshapeAndCacheFlash);

}  // namespace xla_ops
