// Reductions over one row of floats on the CPU.
//
// Tested through the CPU handlers of the normalisation ops.

#ifndef XLA_OPS_CC_CORE_ROW_MATH_H_
#define XLA_OPS_CC_CORE_ROW_MATH_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace xla_ops {

// Sum of squares of row(i) for i in [0, size), where row(i) is a float.
//
// Independent partial sums: they vectorise without reordering a sum that the
// source gives an order to, and round less than one running sum does.
// Elements are widened in one loop and added up in another; compilers
// vectorise the two apart but not in one.
template <typename Row>
float SumOfSquares(int64_t size, const Row& row) {
  constexpr int kLanes = 16;
  constexpr int64_t kChunk = 256;
  float lanes[kLanes] = {};
  float chunk[kChunk];
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    const int64_t count = std::min(kChunk, size - begin);
    for (int64_t i = 0; i < count; ++i) chunk[i] = row(begin + i);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += chunk[i + lane] * chunk[i + lane];
      }
    }
    for (int lane = 0; i < count; ++i, ++lane) {
      lanes[lane] += chunk[i] * chunk[i];
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// 1 / sqrt(mean square + eps): what RMSNorm multiplies a row by.
template <typename Row>
float RmsNormScale(int64_t size, float eps, const Row& row) {
  const float mean = SumOfSquares(size, row) / static_cast<float>(size);
  return 1.0f / std::sqrt(mean + eps);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_ROW_MATH_H_
