// CPU kernel and handler of fused_qk_norm_rope: tokens spread over XLA's
// threads.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/rope_math.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope_checks.h"

namespace xla_ops {
namespace {

template <typename T, typename Table>
void Run(const FusedQkNormRopeParams& params, ffi::ThreadPool& pool) {
  const int64_t heads = params.num_heads_q + params.num_heads_k;
  const int64_t row = NumHeads(params) * params.head_dim;
  ParallelFor(
      pool, params.num_tokens, 2 * heads * params.head_dim, [&](int64_t token) {
        const int64_t position =
            PositionOf(params.positions, params.positions_dtype, token);
        const bool rotate = position >= 0 && position < params.max_position;
        const Table* cos =
            rotate ? static_cast<const Table*>(params.cos_sin_cache) +
                         position * params.head_dim
                   : nullptr;
        T* head = static_cast<T*>(params.out) + token * row;
        for (int64_t h = 0; h < heads; ++h, head += params.head_dim) {
          const void* weight =
              h < params.num_heads_q ? params.q_weight : params.k_weight;
          NormAndRotateHead(params.head_dim, params.eps, params.is_neox,
                            static_cast<const T*>(weight), cos, head);
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
