// Copies whole blocks of one paged cache to other blocks of it, in place.
//
// The pairs of block_mapping are (source, destination); the result is that
// of copying pair after pair, also where a block is the source or the
// destination of several, which vLLM leaves to chance. A pair with a negative
// number is padding and is skipped; so is one with a number of num_blocks or
// more, which is never read or written.
//
// Target `xla_ops.copy_blocks`:
//   args     cache         a buffer of any shape; fp32, fp16, bf16, fp8, s8
//                          or u8
//            block_mapping [num_pairs, 2]  s64
//   results  cache         aliased to the argument
//   attrs    num_blocks, page_size, num_kv_heads, head_dim,
//            block_stride, page_stride, head_stride, offset
//                   i64, in elements: where the blocks lie
//            debug  bool   report skipped pairs that are no padding, on
//                          stderr (stdout on a GPU)
// Element (block, page offset, head, d) of the cache is
//   offset + block * block_stride + page offset * page_stride
//          + head * head_stride + d
// elements into the buffer (cache_geometry.h). A block is copied element by
// element, so the three inner dimensions may be any that describe it: a
// dense block is [1, 1, its size]. Distinct blocks must not overlap.
// Where the result is not aliased (no caller of ours) it is copied first.
//
// Target `xla_ops.swap_blocks` copies from one cache to another in the same
// manner: block source of src to block destination of dst, pair after pair.
//   args     dst           a buffer of any shape; the types above
//            src           a buffer of any shape, of dst's type
//            block_mapping [num_pairs, 2]  s64
//   results  dst           aliased to the argument
//   attrs    num_src_blocks, num_dst_blocks, page_size, num_kv_heads, head_dim,
//            src_block_stride, src_page_stride, src_head_stride, src_offset,
//            dst_block_stride, dst_page_stride, dst_head_stride, dst_offset
//                   i64, in elements
//            debug  bool
// src and dst must not share memory.
//
// Tested by copy_blocks_test.cc and tests/ops/test_copy_blocks.py.

#ifndef XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_H_
#define XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_H_

#include <cstdint>

namespace xla_ops {

// From one block, outer and inner run to the next, in bytes.
struct BlockStrides {
  int64_t block;
  int64_t outer;
  int64_t inner;
};

// The operands as bytes: no kernel looks at values. A block consists of
// outer_size * inner_size runs of run_size bytes.
struct CopyBlocksParams {
  // Whether source and target are one cache, as in copy_blocks.
  bool within_one;
  int64_t num_pairs;
  int64_t num_source_blocks;
  int64_t num_target_blocks;
  int64_t outer_size;
  int64_t inner_size;
  int64_t run_size;
  BlockStrides source_strides;
  BlockStrides target_strides;
  const char* source;            // the first byte of block 0
  char* target;                  // the same
  const int64_t* block_mapping;  // [num_pairs, 2]
  bool debug;
  // An unaliased result: what has to be copied to it first; else null.
  const void* copy_from;
  void* copy_to;
  int64_t copy_size;
};

// What one CUDA launch can count: pairs in a grid, bytes in 32 bits.
inline constexpr int64_t kMaxCudaPairs = INT32_MAX;
inline constexpr int64_t kMaxCudaBlockBytes = int64_t{255} << 24;

// Whether there is nothing to copy between blocks.
inline bool IsEmpty(const CopyBlocksParams& params) {
  return params.num_pairs == 0 || params.num_source_blocks == 0 ||
         params.num_target_blocks == 0 || params.outer_size == 0 ||
         params.inner_size == 0 || params.run_size == 0;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_COPY_BLOCKS_COPY_BLOCKS_H_
