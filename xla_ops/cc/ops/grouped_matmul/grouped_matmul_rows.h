// What the CPU kernels of grouped_matmul and of its gradient share: the groups'
// bounds, and rows as fp32.
//
// Tested by grouped_matmul_test.cc.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_ROWS_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "xla_ops/cc/core/float.h"

namespace xla_ops {

// `group_offsets` [num_groups + 1], ascending and in bounds; null where the
// host has no memory for it.
inline std::unique_ptr<int64_t[]> AscendingOffsets(const int32_t* group_offsets,
                                                   int64_t num_groups,
                                                   int64_t num_rows) {
  std::unique_ptr<int64_t[]> offsets(new (std::nothrow)
                                         int64_t[num_groups + 1]);
  if (offsets == nullptr) return offsets;
  int64_t previous = 0;
  for (int64_t e = 0; e <= num_groups; ++e) {
    previous = std::clamp<int64_t>(group_offsets[e], previous, num_rows);
    offsets[e] = previous;
  }
  return offsets;
}

// Rows of fp32, `stride` elements apart.
struct Rows {
  const float* data;
  int64_t stride;

  const float* operator[](int64_t row) const { return data + row * stride; }
};

// Elements [at, at + size) of `count` rows of `depth` elements, as fp32: where
// they lie if they are that already, else in `scratch`, kStride apart.
template <int64_t kStride, typename T>
Rows Widen(const T* rows, int64_t count, int64_t depth, int64_t at,
           int64_t size, float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return {rows + at, depth};
  } else {
    for (int64_t row = 0; row < count; ++row) {
      const T* from = rows + row * depth + at;
      float* to = scratch + row * kStride;
      for (int64_t i = 0; i < size; ++i) to[i] = ToFloat(from[i]);
    }
    return {scratch, kStride};
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_ROWS_H_
