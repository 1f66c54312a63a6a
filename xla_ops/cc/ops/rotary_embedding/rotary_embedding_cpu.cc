// CPU kernel and handlers of the rotary_embedding targets, tokens spread
// over XLA's threads.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/rope_math.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_checks.h"

namespace xla_ops {
namespace {

template <typename T, typename Table>
void RotateToken(const RotaryEmbeddingParams& params, const RotaryHeads& heads,
                 int64_t token) {
  const int64_t row = heads.num_heads * params.head_size;
  if (row == 0) return;
  T* out = static_cast<T*>(heads.out) + token * row;
  if (heads.out != heads.in) {
    std::memcpy(out, static_cast<const T*>(heads.in) + token * row,
                static_cast<size_t>(row) * sizeof(T));
  }
  const int64_t position =
      PositionOf(params.positions, params.positions_dtype, token);
  if (position < 0 || position >= params.max_position) return;
  const int64_t pairs = params.rotary_dim / 2;
  const Table* cos = static_cast<const Table*>(params.cos_sin_cache) +
                     position * params.rotary_dim;
  for (int64_t head = 0; head < heads.num_heads; ++head) {
    RotateHead(out + head * params.head_size, cos, cos + pairs, pairs,
               params.is_neox);
  }
}

void RotaryEmbedding(const RotaryEmbeddingParams& params,
                     ffi::ThreadPool& pool) {
  const int64_t cost =
      (params.query.num_heads + params.key.num_heads) * params.head_size;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const auto rotate = [&](auto cache_value) {
      using Table = decltype(cache_value);
      ParallelFor(pool, params.num_tokens, cost, [&](int64_t token) {
        RotateToken<T, Table>(params, params.query, token);
        RotateToken<T, Table>(params, params.key, token);
      });
    };
    if (params.cache_dtype == DType::kF32) {
      rotate(float{});
    } else {
      rotate(T{});
    }
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(rotary_embedding, RotaryEmbeddingBinding(),
                    MakeRotaryEmbeddingParams, RotaryEmbedding);
XLA_OPS_CPU_HANDLER(rotary_embedding_one, RotaryEmbeddingOneBinding(),
                    MakeRotaryEmbeddingOneParams, RotaryEmbedding);

}  // namespace xla_ops
