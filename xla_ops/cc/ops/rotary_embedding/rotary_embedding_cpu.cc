// CPU kernel and handlers of the rotary_embedding targets, tokens spread
// over XLA's threads.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_checks.h"

namespace xla_ops {
namespace {

// T(a * b), as a float.
template <typename T>
float Product(T a, T b) {
  return ToFloat(FromFloat<T>(ToFloat(a) * ToFloat(b)));
}

// Rotates one head. `head`: [head_size]; `cos`, `sin`: [rotary_dim / 2], of T
// or float.
template <typename T, typename Table>
void RotateHead(T* head, const Table* cos, const Table* sin, int64_t pairs,
                bool is_neox) {
  const int64_t step = is_neox ? 1 : 2;
  const int64_t distance = is_neox ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    const T x = head[i * step];
    const T y = head[i * step + distance];
    const T c = FromFloat<T>(ToFloat(cos[i]));
    const T s = FromFloat<T>(ToFloat(sin[i]));
    head[i * step] = FromFloat<T>(Product(x, c) - Product(y, s));
    head[i * step + distance] = FromFloat<T>(Product(y, c) + Product(x, s));
  }
}

int64_t PositionOf(const RotaryEmbeddingParams& params, int64_t token) {
  return params.positions_dtype == DType::kS32
             ? static_cast<const int32_t*>(params.positions)[token]
             : static_cast<const int64_t*>(params.positions)[token];
}

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
  const int64_t position = PositionOf(params, token);
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
