// Operand checks of copy_blocks, for every platform.

#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"

#include <string>

#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_checks.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "copy_blocks";

}  // namespace

ffi::Error MakeCopyBlocksParams(ffi::AnyBuffer cache,
                                ffi::AnyBuffer block_mapping,
                                ffi::Result<ffi::AnyBuffer> cache_result,
                                const CopyBlocksAttrs& attrs,
                                CopyBlocksParams* params) {
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "cache", cache,
                 {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3FN,
                  DType::kF8E5M2, DType::kS8, DType::kU8}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOp, "block_mapping", block_mapping, {DType::kS64}));
  XLA_OPS_RETURN_IF_ERROR(
      CheckShape(kOp, "block_mapping", block_mapping, {"num_pairs", 2}));
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
  *params = CopyBlocksParams{};
  params->num_pairs = block_mapping.dimensions()[0];
  params->num_blocks = attrs.num_blocks;
  params->block_stride = attrs.block_stride * bytes;
  params->outer_size = attrs.page_size;
  params->outer_stride = attrs.page_stride * bytes;
  params->inner_size = attrs.num_kv_heads;
  params->inner_stride = attrs.head_stride * bytes;
  params->run_size = attrs.head_dim * bytes;
  params->cache = static_cast<char*>(cache_result->untyped_data());
  if (!IsEmpty(*params)) params->cache += attrs.offset * bytes;
  params->block_mapping =
      static_cast<const int64_t*>(block_mapping.untyped_data());
  params->debug = attrs.debug;
  if (cache.untyped_data() != cache_result->untyped_data()) {
    params->copy_from = cache.untyped_data();
    params->copy_to = cache_result->untyped_data();
    params->copy_size = static_cast<int64_t>(cache.size_bytes());
  }
  return ffi::Error::Success();
}

ffi::Error CheckCudaLimits(const CopyBlocksParams& params) {
  if (IsEmpty(params)) return ffi::Error::Success();
  if (params.num_pairs > kMaxCudaPairs) {
    return MustError(kOp, "block_mapping",
                     "have at most " + std::to_string(kMaxCudaPairs) + " pairs",
                     std::to_string(params.num_pairs));
  }
  const int64_t bytes = SaturatingProduct(
      SaturatingProduct(params.outer_size, params.inner_size), params.run_size);
  if (bytes > kMaxCudaBlockBytes) {
    return MustError(kOp, "cache",
                     "have blocks of at most " +
                         std::to_string(kMaxCudaBlockBytes) + " bytes",
                     std::to_string(bytes));
  }
  return ffi::Error::Success();
}

}  // namespace xla_ops
