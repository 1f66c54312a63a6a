// CPU kernel and handlers of the rotary_embedding targets, tokens spread
// over XLA's threads.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_checks.h"

namespace xla_ops {
namespace {

// T(a * b), as a float.
template <typename T>
float Product(T a, T b) {
  return ToFloat(FromFloat<T>(ToFloat(a) * ToFloat(b)));
}

// Rotates one head. `head`: [head_size]; `cos`, `sin`: [rotary_dim / 2].
template <typename T>
void RotateHead(T* head, const T* cos, const T* sin, int64_t pairs,
                bool is_neox) {
  const int64_t step = is_neox ? 1 : 2;
  const int64_t distance = is_neox ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    const T x = head[i * step];
    const T y = head[i * step + distance];
    head[i * step] = FromFloat<T>(Product(x, cos[i]) - Product(y, sin[i]));
    head[i * step + distance] =
        FromFloat<T>(Product(y, cos[i]) + Product(x, sin[i]));
  }
}

template <typename T>
void RotateToken(const RotaryEmbeddingParams& params, const RotaryHeads& heads,
                 int64_t token) {
  const int64_t row = heads.num_heads * params.head_size;
  if (row == 0) return;
  T* out = static_cast<T*>(heads.out) + token * row;
  if (heads.out != heads.in) {
    std::memcpy(out, static_cast<const T*>(heads.in) + token * row,
                static_cast<size_t>(row) * sizeof(T));
  }
  const int64_t position = params.positions[token];
  if (position < 0 || position >= params.max_position) return;
  const int64_t pairs = params.rotary_dim / 2;
  const T* cos = static_cast<const T*>(params.cos_sin_cache) +
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
    ParallelFor(pool, params.num_tokens, cost, [&](int64_t token) {
      RotateToken<T>(params, params.query, token);
      RotateToken<T>(params, params.key, token);
    });
  });
}

ffi::Error RotaryEmbeddingCpu(ffi::AnyBuffer positions, ffi::AnyBuffer query,
                              ffi::AnyBuffer key, ffi::AnyBuffer cos_sin_cache,
                              ffi::Result<ffi::AnyBuffer> query_result,
                              ffi::Result<ffi::AnyBuffer> key_result,
                              int64_t head_size, bool is_neox,
                              ffi::ThreadPool pool) {
  RotaryEmbeddingParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeRotaryEmbeddingParams(
      positions, query, key, cos_sin_cache, query_result, key_result, head_size,
      is_neox, &params));
  RotaryEmbedding(params, pool);
  return ffi::Error::Success();
}

ffi::Error RotaryEmbeddingOneCpu(ffi::AnyBuffer positions, ffi::AnyBuffer query,
                                 ffi::AnyBuffer cos_sin_cache,
                                 ffi::Result<ffi::AnyBuffer> query_result,
                                 int64_t head_size, bool is_neox,
                                 ffi::ThreadPool pool) {
  RotaryEmbeddingParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeRotaryEmbeddingOneParams(positions, query, cos_sin_cache,
                                   query_result, head_size, is_neox, &params));
  RotaryEmbedding(params, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_rotary_embedding_cpu(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_rotary_embedding_one_cpu(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_rotary_embedding_cpu, xla_ops::RotaryEmbeddingCpu,
    xla_ops::RotaryEmbeddingBinding().Ctx<xla::ffi::ThreadPool>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_rotary_embedding_one_cpu, xla_ops::RotaryEmbeddingOneCpu,
    xla_ops::RotaryEmbeddingOneBinding().Ctx<xla::ffi::ThreadPool>());

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.rotary_embedding",
     "Host",
     {nullptr, nullptr, nullptr, xla_ops_rotary_embedding_cpu}},
    {"xla_ops.rotary_embedding_one",
     "Host",
     {nullptr, nullptr, nullptr, xla_ops_rotary_embedding_one_cpu}})
