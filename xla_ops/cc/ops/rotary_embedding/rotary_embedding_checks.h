// From FFI operands to RotaryEmbeddingParams; the CPU and the CUDA handlers
// share it.
//
// Errors (InvalidArgument), each after "rotary_embedding: ":
//   positions must be int64 or int32, got float32
//   positions must have shape [num_tokens] or [batch_size, seq_len], got []
//   head_size must be at least 1, got 0
//   query must be float32, float16 or bfloat16, got int32
//   query must have shape [7, num_heads * 64] or [7, num_heads, 64], got [7]
//   key must be float16, got float32
//   key must have shape ..., as query
//   key must have a number of heads that divides query's 8, got 3
//   cos_sin_cache must be float16 or float32, got bfloat16
//   cos_sin_cache must have shape [max_position, rotary_dim], got [64]
//   cos_sin_cache must have an even last dimension of at most 64, got 65
//   query result must have shape [7, 512], got [7, 256]  (and dtype; key)
// On CUDA also
//   query must have at most 1073741824 elements a token, key's included, got
//   2147483648
//
// Tested by rotary_embedding_test.cc.

#ifndef XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_CHECKS_H_
#define XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_CHECKS_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"

namespace xla_ops {

// The bindings of every platform; handlers append their context.
inline auto RotaryEmbeddingBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // positions
      .Arg<xla::ffi::AnyBuffer>()  // query
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // cos_sin_cache
      .Ret<xla::ffi::AnyBuffer>()  // query
      .Ret<xla::ffi::AnyBuffer>()  // key
      .Attr<int64_t>("head_size")
      .Attr<bool>("is_neox");
}

inline auto RotaryEmbeddingOneBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // positions
      .Arg<xla::ffi::AnyBuffer>()  // query
      .Arg<xla::ffi::AnyBuffer>()  // cos_sin_cache
      .Ret<xla::ffi::AnyBuffer>()  // query
      .Attr<int64_t>("head_size")
      .Attr<bool>("is_neox");
}

// Read no buffer. No token and no head are success: the handler has nothing
// to do then.
xla::ffi::Error MakeRotaryEmbeddingParams(
    xla::ffi::AnyBuffer positions, xla::ffi::AnyBuffer query,
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer cos_sin_cache,
    xla::ffi::Result<xla::ffi::AnyBuffer> query_result,
    xla::ffi::Result<xla::ffi::AnyBuffer> key_result, int64_t head_size,
    bool is_neox, RotaryEmbeddingParams* params);

xla::ffi::Error MakeRotaryEmbeddingOneParams(
    xla::ffi::AnyBuffer positions, xla::ffi::AnyBuffer query,
    xla::ffi::AnyBuffer cos_sin_cache,
    xla::ffi::Result<xla::ffi::AnyBuffer> query_result, int64_t head_size,
    bool is_neox, RotaryEmbeddingParams* params);

// The limit of the CUDA launch.
xla::ffi::Error CheckCudaLimits(const RotaryEmbeddingParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ROTARY_EMBEDDING_ROTARY_EMBEDDING_CHECKS_H_
