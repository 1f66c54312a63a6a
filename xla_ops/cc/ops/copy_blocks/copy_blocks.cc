// Operand checks of copy_blocks and swap_blocks, for every platform.

#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"

#include <initializer_list>
#include <string>
#include <utility>

#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_checks.h"

namespace xla_ops {
namespace {

constexpr std::initializer_list<DType> kDTypes = {
    DType::kF32,    DType::kF16, DType::kBF16, DType::kF8E4M3FN,
    DType::kF8E5M2, DType::kS8,  DType::kU8};

ffi::Error BindMapping(const char* op, ffi::AnyBuffer block_mapping,
                       CopyBlocksParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(op, "block_mapping", block_mapping, {DType::kS64}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(op, "block_mapping", block_mapping, {"num_pairs", 2}));
  params->num_pairs = block_mapping.dimensions()[0];
  params->block_mapping =
      static_cast<const int64_t*>(block_mapping.untyped_data());
  return ffi::Error::Success();
}

BlockStrides StridesInBytes(const CacheGeometry& geometry, int64_t size) {
  return {geometry.block_stride * size, geometry.page_stride * size,
          geometry.head_stride * size};
}

// An unaliased result is copied first.
void BindCopy(ffi::AnyBuffer cache, ffi::Result<ffi::AnyBuffer> result,
              CopyBlocksParams* params) {
  if (cache.untyped_data() == result->untyped_data()) return;
  params->copy_from = cache.untyped_data();
  params->copy_to = result->untyped_data();
  params->copy_size = static_cast<int64_t>(cache.size_bytes());
}

}  // namespace

ffi::Error MakeCopyBlocksParams(ffi::AnyBuffer cache,
                                ffi::AnyBuffer block_mapping,
                                ffi::Result<ffi::AnyBuffer> cache_result,
                                const CopyBlocksAttrs& attrs,
                                CopyBlocksParams* params) {
  constexpr char kOp[] = "copy_blocks";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "cache", cache, kDTypes));
  XLA_OPS_RETURN_IF_ERROR(BindMapping(kOp, block_mapping, params));
  const CacheGeometry geometry = {attrs.num_blocks, attrs.page_size,
                                  attrs.block_stride, attrs.page_stride,
                                  attrs.head_stride};
  XLA_OPS_RETURN_IF_ERROR(CheckGeometry(kOp, geometry));
  XLA_OPS_RETURN_IF_ERROR(
      CheckAtLeast(kOp, "num_kv_heads", attrs.num_kv_heads, 0));
  XLA_OPS_RETURN_IF_ERROR(CheckAtLeast(kOp, "head_dim", attrs.head_dim, 0));
  XLA_OPS_RETURN_IF_ERROR(CheckCacheInBounds(kOp, "cache", cache, geometry,
                                             attrs.num_kv_heads, attrs.head_dim,
                                             "offset", attrs.offset));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kOp, "cache result", cache_result, cache));

  const int64_t bytes = SizeOf(*ToDType(cache.element_type()));
  params->within_one = true;
  params->num_source_blocks = params->num_target_blocks = attrs.num_blocks;
  params->outer_size = attrs.page_size;
  params->inner_size = attrs.num_kv_heads;
  params->run_size = attrs.head_dim * bytes;
  params->source_strides = params->target_strides =
      StridesInBytes(geometry, bytes);
  params->target = static_cast<char*>(cache_result->untyped_data());
  if (!IsEmpty(*params)) params->target += attrs.offset * bytes;
  params->source = params->target;
  params->debug = attrs.debug;
  BindCopy(cache, cache_result, params);
  return ffi::Error::Success();
}

ffi::Error MakeSwapBlocksParams(ffi::AnyBuffer dst, ffi::AnyBuffer src,
                                ffi::AnyBuffer block_mapping,
                                ffi::Result<ffi::AnyBuffer> dst_result,
                                const SwapBlocksAttrs& attrs,
                                CopyBlocksParams* params) {
  constexpr char kOp[] = "swap_blocks";
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "dst", dst, kDTypes));
  const DType dtype = *ToDType(dst.element_type());
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOp, "src", src, {dtype}));
  XLA_OPS_RETURN_IF_ERROR(BindMapping(kOp, block_mapping, params));
  const std::pair<const char*, int64_t> numbers[] = {
      {"num_src_blocks", attrs.num_src_blocks},
      {"num_dst_blocks", attrs.num_dst_blocks},
      {"page_size", attrs.page_size},
      {"num_kv_heads", attrs.num_kv_heads},
      {"head_dim", attrs.head_dim},
      {"src_block_stride", attrs.src_block_stride},
      {"src_page_stride", attrs.src_page_stride},
      {"src_head_stride", attrs.src_head_stride},
      {"dst_block_stride", attrs.dst_block_stride},
      {"dst_page_stride", attrs.dst_page_stride},
      {"dst_head_stride", attrs.dst_head_stride}};
  for (const auto& [name, value] : numbers) {
    XLA_OPS_RETURN_IF_ERROR(CheckAtLeast(kOp, name, value, 0));
  }
  const CacheGeometry from = {attrs.num_src_blocks, attrs.page_size,
                              attrs.src_block_stride, attrs.src_page_stride,
                              attrs.src_head_stride};
  const CacheGeometry to = {attrs.num_dst_blocks, attrs.page_size,
                            attrs.dst_block_stride, attrs.dst_page_stride,
                            attrs.dst_head_stride};
  XLA_OPS_RETURN_IF_ERROR(CheckCacheInBounds(kOp, "src", src, from,
                                             attrs.num_kv_heads, attrs.head_dim,
                                             "src_offset", attrs.src_offset));
  XLA_OPS_RETURN_IF_ERROR(CheckCacheInBounds(kOp, "dst", dst, to,
                                             attrs.num_kv_heads, attrs.head_dim,
                                             "dst_offset", attrs.dst_offset));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOp, "dst result", dst_result, dst));

  const int64_t bytes = SizeOf(dtype);
  params->within_one = false;
  params->num_source_blocks = attrs.num_src_blocks;
  params->num_target_blocks = attrs.num_dst_blocks;
  params->outer_size = attrs.page_size;
  params->inner_size = attrs.num_kv_heads;
  params->run_size = attrs.head_dim * bytes;
  params->source_strides = StridesInBytes(from, bytes);
  params->target_strides = StridesInBytes(to, bytes);
  params->source = static_cast<const char*>(src.untyped_data());
  params->target = static_cast<char*>(dst_result->untyped_data());
  if (!IsEmpty(*params)) {
    params->source += attrs.src_offset * bytes;
    params->target += attrs.dst_offset * bytes;
  }
  params->debug = attrs.debug;
  BindCopy(dst, dst_result, params);
  return ffi::Error::Success();
}

ffi::Error CheckCudaLimits(const CopyBlocksParams& params) {
  if (IsEmpty(params)) return ffi::Error::Success();
  const char* op = params.within_one ? "copy_blocks" : "swap_blocks";
  if (params.num_pairs > kMaxCudaPairs) {
    return MustError(op, "block_mapping",
                     "have at most " + std::to_string(kMaxCudaPairs) + " pairs",
                     std::to_string(params.num_pairs));
  }
  const int64_t bytes = SaturatingProduct(
      SaturatingProduct(params.outer_size, params.inner_size), params.run_size);
  if (bytes > kMaxCudaBlockBytes) {
    return MustError(op, params.within_one ? "cache" : "dst",
                     "have blocks of at most " +
                         std::to_string(kMaxCudaBlockBytes) + " bytes",
                     std::to_string(bytes));
  }
  return ffi::Error::Success();
}

}  // namespace xla_ops
