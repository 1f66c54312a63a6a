// What CPU kernels share that write rows of keys and values into a paged cache.
// xla_ops/cc/device/cache_write.cuh is CUDA's.
//
// Tested through the CPU handlers of reshape_and_cache_flash and
// fused_qk_norm_rope_and_cache.

#ifndef XLA_OPS_CC_CORE_CACHE_WRITE_H_
#define XLA_OPS_CC_CORE_CACHE_WRITE_H_

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "xla_ops/cc/core/float.h"

namespace xla_ops {

// Says on stderr which tokens are skipped for a slot past the cache; negative
// slots are padding and no error.
inline void ReportSkippedSlots(const char* op, const int64_t* slot_mapping,
                               int64_t num_tokens, int64_t num_slots) {
  constexpr int kMaxReports = 8;
  int reports = 0;
  for (int64_t t = 0; t < num_tokens && reports < kMaxReports; ++t) {
    if (slot_mapping[t] < num_slots) continue;
    ++reports;
    std::fprintf(stderr,
                 "xla_ops: %s: slot_mapping[%lld] must be less than %lld, got "
                 "%lld; skipped\n",
                 op, static_cast<long long>(t),
                 static_cast<long long>(num_slots),
                 static_cast<long long>(slot_mapping[t]));
  }
}

// How one head's vector becomes cache elements; `scale` is read for fp8.
template <typename T, typename CacheT>
struct ToCache {
  static void Run(const T* from, int64_t size, float scale, CacheT* to) {
    for (int64_t d = 0; d < size; ++d) {
      to[d] = FromFloat<CacheT>(ToFloat(from[d]) / scale);
    }
  }
};

template <typename T>
struct ToCache<T, T> {
  static void Run(const T* from, int64_t size, float, T* to) {
    std::memcpy(to, from, static_cast<size_t>(size) * sizeof(T));
  }
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_CACHE_WRITE_H_
