// From FFI operands to CopyBlocksParams; the CPU and the CUDA handlers share
// it.
//
// Errors (InvalidArgument), each after "copy_blocks: ":
//   cache must be float32, float16, ..., int8 or uint8, got int64
//   block_mapping must be int64, got int32
//   block_mapping must have shape [num_pairs, 2], got [4]
//   num_blocks must be at least 0, got -1    (and the other sizes, strides)
//   offset must be at least 0, got -1
//   cache must have at least 256 elements, got 128
//   cache result must have shape [8, 32], got [8, 16]    (and dtype)
// On CUDA also
//   block_mapping must have at most 2147483647 pairs, got 2147483648
//   cache must have blocks of at most 4278190080 bytes, got 4294967296
// and each after "swap_blocks: ":
//   dst must be float32, float16, ..., int8 or uint8, got int64
//   src must be float32, got float16
//   block_mapping must ... (as above)
//   num_src_blocks must be at least 0, got -1    (and every other number)
//   src must have at least 256 elements, got 128    (dst)
//   dst result must have shape [8, 32], got [8, 16]    (and dtype)
// and on CUDA dst must have blocks of at most 4278190080 bytes.
//
// Tested by copy_blocks_test.cc.

#ifndef XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_CHECKS_H_
#define XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_CHECKS_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"

namespace xla_ops {

// Members are in the order of the registration below, which names them.
struct CopyBlocksAttrs {
  int64_t num_blocks;
  int64_t page_size;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t offset;
  bool debug;
};

struct SwapBlocksAttrs {
  int64_t num_src_blocks;
  int64_t num_dst_blocks;
  int64_t page_size;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t src_block_stride;
  int64_t src_page_stride;
  int64_t src_head_stride;
  int64_t src_offset;
  int64_t dst_block_stride;
  int64_t dst_page_stride;
  int64_t dst_head_stride;
  int64_t dst_offset;
  bool debug;
};

// The bindings of every platform; handlers append their context.
inline auto CopyBlocksBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // cache
      .Arg<xla::ffi::AnyBuffer>()  // block_mapping
      .Ret<xla::ffi::AnyBuffer>()  // cache
      .Attrs<CopyBlocksAttrs>();
}

inline auto SwapBlocksBinding() {
  return xla::ffi::Ffi::Bind()
      .Arg<xla::ffi::AnyBuffer>()  // dst
      .Arg<xla::ffi::AnyBuffer>()  // src
      .Arg<xla::ffi::AnyBuffer>()  // block_mapping
      .Ret<xla::ffi::AnyBuffer>()  // dst
      .Attrs<SwapBlocksAttrs>();
}

// Neither reads a buffer. Empty operands are success.
xla::ffi::Error MakeCopyBlocksParams(
    xla::ffi::AnyBuffer cache, xla::ffi::AnyBuffer block_mapping,
    xla::ffi::Result<xla::ffi::AnyBuffer> cache_result,
    const CopyBlocksAttrs& attrs, CopyBlocksParams* params);

xla::ffi::Error MakeSwapBlocksParams(
    xla::ffi::AnyBuffer dst, xla::ffi::AnyBuffer src,
    xla::ffi::AnyBuffer block_mapping,
    xla::ffi::Result<xla::ffi::AnyBuffer> dst_result,
    const SwapBlocksAttrs& attrs, CopyBlocksParams* params);

// The limits of the CUDA launch.
xla::ffi::Error CheckCudaLimits(const CopyBlocksParams& params);

}  // namespace xla_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::CopyBlocksAttrs, StructMember<int64_t>("num_blocks"),
    StructMember<int64_t>("page_size"), StructMember<int64_t>("num_kv_heads"),
    StructMember<int64_t>("head_dim"), StructMember<int64_t>("block_stride"),
    StructMember<int64_t>("page_stride"), StructMember<int64_t>("head_stride"),
    StructMember<int64_t>("offset"), StructMember<bool>("debug"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::xla_ops::SwapBlocksAttrs, StructMember<int64_t>("num_src_blocks"),
    StructMember<int64_t>("num_dst_blocks"), StructMember<int64_t>("page_size"),
    StructMember<int64_t>("num_kv_heads"), StructMember<int64_t>("head_dim"),
    StructMember<int64_t>("src_block_stride"),
    StructMember<int64_t>("src_page_stride"),
    StructMember<int64_t>("src_head_stride"),
    StructMember<int64_t>("src_offset"),
    StructMember<int64_t>("dst_block_stride"),
    StructMember<int64_t>("dst_page_stride"),
    StructMember<int64_t>("dst_head_stride"),
    StructMember<int64_t>("dst_offset"), StructMember<bool>("debug"));

#endif  // XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_CHECKS_H_
