// From FFI operands to ReshapeAndCacheParams, for the three targets of
// reshape_and_cache.h; the CPU and the CUDA handlers share it.
//
// Errors (InvalidArgument) begin with "reshape_and_cache: " for all three
// targets, as the Python op has one name:
//   key must be float32, float16 or bfloat16, got int32
//   key must have shape [num_tokens, num_kv_heads, head_dim], got [4, 8]
//   value must be float16, got float32
//   value must have shape [4, 2, 8], got [4, 2, 16]
//   slot_mapping must be int64, got int32
//   slot_mapping must have shape [num_tokens], got [4, 1]
//   slot_mapping must have at most 4 elements, got 5
//   num_blocks must be at least 0, got -1    (and page_size, strides, offsets)
//   num_blocks must give less than 2^63 slots, got 9223372036854775807
//   key_x must divide head_dim 8, got 3
//   kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8
//   key_cache must be float16, got float32                       (auto)
//   key_cache must be float8_e4m3fn or uint8, got float16        (fp8)
//   key_cache must have at least 256 elements, got 128
//   key_cache result must have shape [8, 32], got [8, 16]
//   k_scale must be float32, got float16
//   k_scale must have 1 element, got shape [2]
// value_cache, v_scale, value_offset likewise; kv_cache in the stacked
// target. The target _one says key, key_cache and k_scale. On CUDA also
//   key must have at most 1048560 elements a token, got 2097152
//
// Tested by reshape_and_cache_test.cc.

#ifndef XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_CHECKS_H_
#define XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_CHECKS_H_

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache.h"

namespace xla_ops {

// Members are in the order of the registration below, which names them.
struct ReshapeAndCacheAttrs {
  std::string_view kv_cache_dtype;
  int64_t num_blocks;
  int64_t page_size;
  int64_t key_x;
  int64_t key_block_stride;
  int64_t key_offset;
  int64_t value_block_stride;
  int64_t value_offset;
  bool debug;
};

// Target _one has one cache.
struct ReshapeAndCacheOneAttrs {
  std::string_view kv_cache_dtype;
  int64_t num_blocks;
  int64_t page_size;
  int64_t key_x;
  int64_t key_block_stride;
  int64_t key_offset;
  bool debug;
};

// The bindings of every platform; handlers append their context.
inline auto ReshapeAndCacheBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // value
      .Arg<xla::ffi::AnyBuffer>()  // key_cache
      .Arg<xla::ffi::AnyBuffer>()  // value_cache
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Arg<xla::ffi::AnyBuffer>()  // v_scale
      .Ret<xla::ffi::AnyBuffer>()  // key_cache
      .Ret<xla::ffi::AnyBuffer>()  // value_cache
      .Attrs<ReshapeAndCacheAttrs>();
}

inline auto ReshapeAndCacheStackedBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // value
      .Arg<xla::ffi::AnyBuffer>()  // kv_cache
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Arg<xla::ffi::AnyBuffer>()  // v_scale
      .Ret<xla::ffi::AnyBuffer>()  // kv_cache
      .Attrs<ReshapeAndCacheAttrs>();
}

inline auto ReshapeAndCacheOneBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // key_cache
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Ret<xla::ffi::AnyBuffer>()  // key_cache
      .Attrs<ReshapeAndCacheOneAttrs>();
}

// None of these reads a buffer. The cache pointers of `params` are the
// results', moved to block 0. With no token, an empty key or an empty cache
// they succeed; the handler has only the copies to do then.
xla::ffi::Error MakeReshapeAndCacheParams(
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer value,
    xla::ffi::AnyBuffer key_cache, xla::ffi::AnyBuffer value_cache,
    xla::ffi::AnyBuffer slot_mapping, xla::ffi::AnyBuffer k_scale,
    xla::ffi::AnyBuffer v_scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> key_cache_result,
    xla::ffi::Result<xla::ffi::AnyBuffer> value_cache_result,
    const ReshapeAndCacheAttrs& attrs, ReshapeAndCacheParams* params);

xla::ffi::Error MakeReshapeAndCacheStackedParams(
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer value,
    xla::ffi::AnyBuffer kv_cache, xla::ffi::AnyBuffer slot_mapping,
    xla::ffi::AnyBuffer k_scale, xla::ffi::AnyBuffer v_scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> kv_cache_result,
    const ReshapeAndCacheAttrs& attrs, ReshapeAndCacheParams* params);

xla::ffi::Error MakeReshapeAndCacheOneParams(
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer key_cache,
    xla::ffi::AnyBuffer slot_mapping, xla::ffi::AnyBuffer k_scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> key_cache_result,
    const ReshapeAndCacheOneAttrs& attrs, ReshapeAndCacheParams* params);

// The limits of the CUDA launch.
xla::ffi::Error CheckCudaLimits(const ReshapeAndCacheParams& params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::ReshapeAndCacheAttrs,
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("key_x"), StructMember<int64_t>("key_block_stride"),
    StructMember<int64_t>("key_offset"),
    StructMember<int64_t>("value_block_stride"),
    StructMember<int64_t>("value_offset"), StructMember<bool>("debug"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::ReshapeAndCacheOneAttrs,
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("key_x"), StructMember<int64_t>("key_block_stride"),
    StructMember<int64_t>("key_offset"), StructMember<bool>("debug"));

#endif  // XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_RESHAPE_AND_CACHE_CHECKS_H_
