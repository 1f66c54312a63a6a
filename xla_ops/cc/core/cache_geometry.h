// Where a KV cache lies in the buffer that it is a view of.
//
// XLA arrays have no strides, so a cache operand is a whole buffer and its
// view is described by attributes. Element (block, page offset, head, d) is
//   offset + block * block_stride + page_offset * page_stride
//          + head * head_stride + d
// elements into the buffer. NHD, HND and stacked caches all have this form.
//
// Tested by core_test.cc and by the tests of the ops with a cache.

#ifndef XLA_OPS_CC_CORE_CACHE_GEOMETRY_H_
#define XLA_OPS_CC_CORE_CACHE_GEOMETRY_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/cache_copy.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

// All in elements.
struct CacheGeometry {
  int64_t num_blocks;
  int64_t page_size;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
};

// Elements from the view's first to one past its last; zero for a view with
// no elements, -1 where that number does not fit in 63 bits. Sizes and
// strides must not be negative.
inline int64_t CacheExtent(const CacheGeometry& geometry, int64_t num_kv_heads,
                           int64_t head_dim) {
  const int64_t sizes[] = {geometry.num_blocks, geometry.page_size,
                           num_kv_heads, head_dim};
  const int64_t strides[] = {geometry.block_stride, geometry.page_stride,
                             geometry.head_stride, 1};
  int64_t extent = 1;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] == 0) return 0;
  }
  for (int i = 0; i < 4; ++i) {
    int64_t step;
    if (__builtin_mul_overflow(sizes[i] - 1, strides[i], &step) ||
        __builtin_add_overflow(extent, step, &extent)) {
      return -1;
    }
  }
  return extent;
}

// The attributes by themselves.
inline ffi::Error CheckGeometry(const char* op, const CacheGeometry& geometry) {
  const struct {
    const char* name;
    int64_t value;
  } kAttrs[] = {{"num_blocks", geometry.num_blocks},
                {"page_size", geometry.page_size},
                {"block_stride", geometry.block_stride},
                {"page_stride", geometry.page_stride},
                {"head_stride", geometry.head_stride}};
  for (const auto& attr : kAttrs) {
    XLA_OPS_RETURN_IF_ERROR(CheckAtLeast(op, attr.name, attr.value, 0));
  }
  // Slots are block * page_size + offset. With strides of zero a small
  // buffer could hold any number of them, so the bounds check is no bound.
  int64_t num_slots;
  if (__builtin_mul_overflow(geometry.num_blocks, geometry.page_size,
                             &num_slots)) {
    return MustError(op, "num_blocks", "give less than 2^63 slots",
                     std::to_string(geometry.num_blocks));
  }
  return ffi::Error::Success();
}

// That every element of the view lies inside the buffer. Call it after
// CheckGeometry. `offset_name` is the attribute that holds `offset`.
inline ffi::Error CheckCacheInBounds(const char* op, const char* argument,
                                     ffi::AnyBuffer buffer,
                                     const CacheGeometry& geometry,
                                     int64_t num_kv_heads, int64_t head_dim,
                                     const char* offset_name, int64_t offset) {
  XLA_OPS_RETURN_IF_ERROR(CheckAtLeast(op, offset_name, offset, 0));
  const int64_t extent = CacheExtent(geometry, num_kv_heads, head_dim);
  if (extent == 0) return ffi::Error::Success();
  const int64_t count = static_cast<int64_t>(buffer.element_count());
  int64_t end;
  if (extent < 0 || __builtin_add_overflow(offset, extent, &end)) {
    return MustError(op, argument, "hold its view (offset and strides)",
                     std::to_string(count) + " elements");
  }
  if (end <= count) return ffi::Error::Success();
  return MustError(op, argument,
                   "have at least " + std::to_string(end) + " elements",
                   std::to_string(count));
}

// Holds a cache's element type to vLLM's name for it, and sets `*cache_dtype`
// to what its elements are: `dtype`, that of the new keys or the query, or
// an fp8 type, which uint8 may stand for.
inline ffi::Error CheckCacheDType(const char* op, const char* argument,
                                  ffi::AnyBuffer buffer,
                                  std::string_view kv_cache_dtype, DType dtype,
                                  DType* cache_dtype) {
  if (kv_cache_dtype == "auto") {
    *cache_dtype = dtype;
    return CheckDType(op, argument, buffer, {dtype});
  }
  if (kv_cache_dtype == "fp8" || kv_cache_dtype == "fp8_e4m3") {
    *cache_dtype = DType::kF8E4M3FN;
  } else if (kv_cache_dtype == "fp8_e5m2") {
    *cache_dtype = DType::kF8E5M2;
  } else {
    return MustError(op, "kv_cache_dtype", "be auto, fp8, fp8_e4m3 or fp8_e5m2",
                     kv_cache_dtype);
  }
  return CheckDType(op, argument, buffer, {*cache_dtype, DType::kU8});
}

inline void AddCopy(xla::ffi::AnyBuffer from,
                    xla::ffi::Result<xla::ffi::AnyBuffer> to,
                    CacheCopies* copies) {
  copies->Add(from.untyped_data(), to->untyped_data(), from.size_bytes());
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_CACHE_GEOMETRY_H_
