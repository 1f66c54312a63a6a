// Caches that a call updates, and that its caller has not aliased to their
// results: they are copied first. xla_ops/cc/device/cache_copy.h has it on
// CUDA. Free of FFI headers, so device code may include it.
//
// Tested through the handlers of reshape_and_cache_flash and
// fused_qk_norm_rope_and_cache.

#ifndef XLA_OPS_CC_CORE_CACHE_COPY_H_
#define XLA_OPS_CC_CORE_CACHE_COPY_H_

#include <cstddef>
#include <cstring>

namespace xla_ops {

// A cache whose result lies in another buffer than its argument.
struct CacheCopy {
  const void* from;
  void* to;
  size_t bytes;
};

// Of keys and values.
struct CacheCopies {
  CacheCopy copies[2];
  int count;

  const CacheCopy* begin() const { return copies; }
  const CacheCopy* end() const { return copies + count; }

  // Notes a cache, where it is not in its result already.
  void Add(const void* from, void* to, size_t bytes) {
    if (from != to && bytes > 0) copies[count++] = {from, to, bytes};
  }
};

inline void CopyCaches(const CacheCopies& copies) {
  for (const CacheCopy& copy : copies) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_CACHE_COPY_H_
