// From FFI operands to FusedQkNormRopeAndCacheParams, for both targets of
// fused_qk_norm_rope_and_cache.h; the CPU and the CUDA handlers share it.
//
// Errors (InvalidArgument), in the order of the checks, each after
// "fused_qk_norm_rope_and_cache: ":
//   qkv must be float32, float16 or bfloat16, got int32
//   num_heads must be at least 0, got -1    (num_kv_heads)
//   head_dim must be even and at least 2, got 7
//   qkv must have shape [num_tokens, 512], got [4, 256]
//   eps must be positive and finite, got 0
//   k_weight must be given with q_weight, got None
//   k_weight must be absent without q_weight, got shape [64]
//   q_weight must be float16, got float32
//   q_weight must have shape [64], got [32]
//   k_weight must ... (the same)
//   cos_sin_cache must be float16 or float32, got bfloat16
//   cos_sin_cache must have shape [max_position, 64], got [64]
//   position_ids must be int64 or int32, got float32
//   position_ids must have shape [4], got [3]
//   slot_mapping must be int64, got int32
//   slot_mapping must have shape [num_tokens], got [4, 1]
//   slot_mapping must have at most 4 elements, got 5
//   num_blocks must be at least 0, got -1    (and the other sizes, strides)
//   kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8
//   key_cache must be float16, got float32                       (auto)
//   key_cache must be float8_e4m3fn or uint8, got float16        (fp8)
//   key_offset must be at least 0, got -1
//   key_cache must have at least 256 elements, got 128
//   key_cache result must have shape [8, 32], got [8, 16]
//   value_cache ..., kv_cache ... (the same)
//   k_scale must be float32, got float16
//   k_scale must have 1 element, got shape [2]    (v_scale)
//   query result must have shape [4, 8, 64], got [4, 256]    (and dtype)
// On CUDA also
//   qkv must have at most 1073741824 elements a token, got 2147483648
//
// Tested by fused_qk_norm_rope_and_cache_test.cc.

#ifndef XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_CHECKS_H_
#define XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_CHECKS_H_

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"

namespace xla_ops {

// Members are in the order of the registration below, which names them.
struct FusedQkNormRopeAndCacheAttrs {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float eps;
  bool is_neox;
  std::string_view kv_cache_dtype;
  int64_t num_blocks;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t key_offset;
  int64_t value_offset;
  bool debug;
};

// The bindings of every platform; handlers append their context.
inline auto FusedQkNormRopeAndCacheBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // qkv
      .Arg<xla::ffi::AnyBuffer>()  // cos_sin_cache
      .Arg<xla::ffi::AnyBuffer>()  // position_ids
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // q_weight
      .Arg<xla::ffi::AnyBuffer>()  // k_weight
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Arg<xla::ffi::AnyBuffer>()  // v_scale
      .Arg<xla::ffi::AnyBuffer>()  // value_cache
      .Arg<xla::ffi::AnyBuffer>()  // key_cache
      .Ret<xla::ffi::AnyBuffer>()  // query
      .Ret<xla::ffi::AnyBuffer>()  // key_cache
      .Ret<xla::ffi::AnyBuffer>()  // value_cache
      .Attrs<FusedQkNormRopeAndCacheAttrs>();
}

inline auto FusedQkNormRopeAndCacheStackedBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // qkv
      .Arg<xla::ffi::AnyBuffer>()  // cos_sin_cache
      .Arg<xla::ffi::AnyBuffer>()  // position_ids
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // q_weight
      .Arg<xla::ffi::AnyBuffer>()  // k_weight
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Arg<xla::ffi::AnyBuffer>()  // v_scale
      .Arg<xla::ffi::AnyBuffer>()  // kv_cache
      .Ret<xla::ffi::AnyBuffer>()  // query
      .Ret<xla::ffi::AnyBuffer>()  // kv_cache
      .Attrs<FusedQkNormRopeAndCacheAttrs>();
}

// Neither reads a buffer. The caches of `params` are the results', and point to
// their views' first elements. No token, no head and an empty cache are
// success.
xla::ffi::Error MakeFusedQkNormRopeAndCacheParams(
    xla::ffi::AnyBuffer qkv, xla::ffi::AnyBuffer cos_sin_cache,
    xla::ffi::AnyBuffer position_ids, xla::ffi::AnyBuffer slot_mapping,
    xla::ffi::AnyBuffer q_weight, xla::ffi::AnyBuffer k_weight,
    xla::ffi::AnyBuffer k_scale, xla::ffi::AnyBuffer v_scale,
    xla::ffi::AnyBuffer value_cache, xla::ffi::AnyBuffer key_cache,
    xla::ffi::Result<xla::ffi::AnyBuffer> query,
    xla::ffi::Result<xla::ffi::AnyBuffer> key_cache_result,
    xla::ffi::Result<xla::ffi::AnyBuffer> value_cache_result,
    const FusedQkNormRopeAndCacheAttrs& attrs,
    FusedQkNormRopeAndCacheParams* params);

xla::ffi::Error MakeFusedQkNormRopeAndCacheStackedParams(
    xla::ffi::AnyBuffer qkv, xla::ffi::AnyBuffer cos_sin_cache,
    xla::ffi::AnyBuffer position_ids, xla::ffi::AnyBuffer slot_mapping,
    xla::ffi::AnyBuffer q_weight, xla::ffi::AnyBuffer k_weight,
    xla::ffi::AnyBuffer k_scale, xla::ffi::AnyBuffer v_scale,
    xla::ffi::AnyBuffer kv_cache, xla::ffi::Result<xla::ffi::AnyBuffer> query,
    xla::ffi::Result<xla::ffi::AnyBuffer> kv_cache_result,
    const FusedQkNormRopeAndCacheAttrs& attrs,
    FusedQkNormRopeAndCacheParams* params);

// The limits of the CUDA launch.
xla::ffi::Error CheckCudaLimits(const FusedQkNormRopeAndCacheParams& params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::FusedQkNormRopeAndCacheAttrs, StructMember<int64_t>("num_heads"),
    StructMember<int64_t>("num_kv_heads"), StructMember<int64_t>("head_dim"),
    StructMember<float>("eps"), StructMember<bool>("is_neox"),
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("block_stride"), StructMember<int64_t>("page_stride"),
    StructMember<int64_t>("head_stride"), StructMember<int64_t>("key_offset"),
    StructMember<int64_t>("value_offset"), StructMember<bool>("debug"));

#endif  // XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_CHECKS_H_
