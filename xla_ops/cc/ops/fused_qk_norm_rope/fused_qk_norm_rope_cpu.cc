// CPU kernel and handler of fused_qk_norm_rope: tokens spread over XLA's
// threads.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/row_math.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope_checks.h"

namespace xla_ops {
namespace {

int64_t PositionOf(const FusedQkNormRopeParams& params, int64_t token) {
  return params.positions_dtype == DType::kS32
             ? static_cast<const int32_t*>(params.positions)[token]
             : static_cast<const int64_t*>(params.positions)[token];
}

// `cos`: a row of the cache, or null where the token is not rotated.
template <typename T, typename Table>
void NormAndRotateHead(const FusedQkNormRopeParams& params, const T* weight,
                       const Table* cos, T* head) {
  const int64_t pairs = params.head_dim / 2;
  const float scale =
      RmsNormScale(params.head_dim, params.eps,
                   [head](int64_t d) { return ToFloat(head[d]); });
  const int64_t step = params.is_neox ? 1 : 2;
  const int64_t distance = params.is_neox ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    T* a = head + i * step;
    T* b = a + distance;
    const float x = ToFloat(*a) * (scale * ToFloat(weight[a - head]));
    const float y = ToFloat(*b) * (scale * ToFloat(weight[b - head]));
    const float c = cos != nullptr ? ToFloat(cos[i]) : 1.0f;
    const float s = cos != nullptr ? ToFloat(cos[pairs + i]) : 0.0f;
    *a = FromFloat<T>(x * c - y * s);
    *b = FromFloat<T>(y * c + x * s);
  }
}

template <typename T, typename Table>
void Run(const FusedQkNormRopeParams& params, ffi::ThreadPool& pool) {
  const int64_t heads = params.num_heads_q + params.num_heads_k;
  const int64_t row = NumHeads(params) * params.head_dim;
  ParallelFor(
      pool, params.num_tokens, 2 * heads * params.head_dim, [&](int64_t token) {
        const int64_t position = PositionOf(params, token);
        const bool rotate = position >= 0 && position < params.max_position;
        const Table* cos =
            rotate ? static_cast<const Table*>(params.cos_sin_cache) +
                         position * params.head_dim
                   : nullptr;
        T* head = static_cast<T*>(params.out) + token * row;
        for (int64_t h = 0; h < heads; ++h, head += params.head_dim) {
          const void* weight =
              h < params.num_heads_q ? params.q_weight : params.k_weight;
          NormAndRotateHead(params, static_cast<const T*>(weight), cos, head);
        }
      });
}

void FusedQkNormRope(const FusedQkNormRopeParams& params,
                     ffi::ThreadPool& pool) {
  const int64_t size = params.num_tokens * NumHeads(params) * params.head_dim;
  if (size == 0) return;
  if (params.out != params.qkv) {
    std::memcpy(params.out, params.qkv,
                static_cast<size_t>(size * SizeOf(params.dtype)));
  }
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    if (params.cache_dtype == DType::kF32) {
      Run<T, float>(params, pool);
    } else {
      Run<T, T>(params, pool);
    }
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(fused_qk_norm_rope, FusedQkNormRopeBinding(),
                    MakeFusedQkNormRopeParams, FusedQkNormRope);

}  // namespace xla_ops
