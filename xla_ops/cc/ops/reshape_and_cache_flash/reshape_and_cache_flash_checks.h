// From FFI operands to ReshapeAndCacheFlashParams, for the three targets of
// reshape_and_cache_flash.h; the CPU and the CUDA handlers share it.
//
// Errors (InvalidArgument) begin with "reshape_and_cache_flash: " for all
// three targets, as the Python op has one name:
//   key must be float32, float16 or bfloat16, got int32
//   key must have shape [num_tokens, num_kv_heads, head_dim], got [4, 8]
//   value must be float16, got float32
//   value must have shape [4, 2, 8], got [4, 2, 16]
//   slot_mapping must be int64, got int32
//   slot_mapping must have shape [num_tokens], got [4, 1]
//   slot_mapping must have at most 4 elements, got 5
//   kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8
//   key_cache must be float16, got float32                       (auto)
//   key_cache must be float8_e4m3fn or uint8, got float16        (fp8)
//   k_scale must be float32, got float16
//   k_scale must have 1 element, got shape [2]
//   num_blocks must be at least 0, got -1    (and the other sizes, strides)
//   key_offset must be at least 0, got -1
//   key_cache must have at least 256 elements, got 128
//   key_cache result must have shape [8, 32], got [8, 16]
// On CUDA also
//   key must have at most 1073741824 elements a token, got 2147483648
// value_cache, v_scale, value_offset likewise; kv_cache in the stacked
// target. The target _one says key, key_cache and k_scale.
//
// Tested by reshape_and_cache_flash_test.cc.

#ifndef XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_CHECKS_H_
#define XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_CHECKS_H_

#include <cstdint>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"

namespace xla_ops {

// Members are in the order of the registration below, which names them.
struct ReshapeAndCacheFlashAttrs {
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

// Target _one has one cache and so no value_offset.
struct ReshapeAndCacheFlashOneAttrs {
  std::string_view kv_cache_dtype;
  int64_t num_blocks;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t key_offset;
  bool debug;
};

// The bindings of every platform; handlers append their context.
inline auto ReshapeAndCacheFlashBinding() {
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
      .Attrs<ReshapeAndCacheFlashAttrs>();
}

inline auto ReshapeAndCacheFlashStackedBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // value
      .Arg<xla::ffi::AnyBuffer>()  // kv_cache
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Arg<xla::ffi::AnyBuffer>()  // v_scale
      .Ret<xla::ffi::AnyBuffer>()  // kv_cache
      .Attrs<ReshapeAndCacheFlashAttrs>();
}

inline auto ReshapeAndCacheFlashOneBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // key
      .Arg<xla::ffi::AnyBuffer>()  // key_cache
      .Arg<xla::ffi::AnyBuffer>()  // slot_mapping
      .Arg<xla::ffi::AnyBuffer>()  // k_scale
      .Ret<xla::ffi::AnyBuffer>()  // key_cache
      .Attrs<ReshapeAndCacheFlashOneAttrs>();
}

// None of these reads a buffer. The cache pointers of `params` are the
// results', moved to the view's first element. With no token, an empty key
// or an empty cache they succeed; the handler has only the copies to do then.
xla::ffi::Error MakeReshapeAndCacheFlashParams(
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer value,
    xla::ffi::AnyBuffer key_cache, xla::ffi::AnyBuffer value_cache,
    xla::ffi::AnyBuffer slot_mapping, xla::ffi::AnyBuffer k_scale,
    xla::ffi::AnyBuffer v_scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> key_cache_result,
    xla::ffi::Result<xla::ffi::AnyBuffer> value_cache_result,
    const ReshapeAndCacheFlashAttrs& attrs, ReshapeAndCacheFlashParams* params);

xla::ffi::Error MakeReshapeAndCacheFlashStackedParams(
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer value,
    xla::ffi::AnyBuffer kv_cache, xla::ffi::AnyBuffer slot_mapping,
    xla::ffi::AnyBuffer k_scale, xla::ffi::AnyBuffer v_scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> kv_cache_result,
    const ReshapeAndCacheFlashAttrs& attrs, ReshapeAndCacheFlashParams* params);

xla::ffi::Error MakeReshapeAndCacheFlashOneParams(
    xla::ffi::AnyBuffer key, xla::ffi::AnyBuffer key_cache,
    xla::ffi::AnyBuffer slot_mapping, xla::ffi::AnyBuffer k_scale,
    xla::ffi::Result<xla::ffi::AnyBuffer> key_cache_result,
    const ReshapeAndCacheFlashOneAttrs& attrs,
    ReshapeAndCacheFlashParams* params);

// The limit of the CUDA launch.
xla::ffi::Error CheckCudaLimits(const ReshapeAndCacheFlashParams& params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::ReshapeAndCacheFlashAttrs,
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("block_stride"), StructMember<int64_t>("page_stride"),
    StructMember<int64_t>("head_stride"), StructMember<int64_t>("key_offset"),
    StructMember<int64_t>("value_offset"), StructMember<bool>("debug"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::ReshapeAndCacheFlashOneAttrs,
    StructMember<std::string_view>("kv_cache_dtype"),
    StructMember<int64_t>("num_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("block_stride"), StructMember<int64_t>("page_stride"),
    StructMember<int64_t>("head_stride"), StructMember<int64_t>("key_offset"),
    StructMember<bool>("debug"));

#endif  // XLA_OPS_CC_OPS_RESHAPE_AND_CACHE_FLASH_CHECKS_H_
