// The arithmetic of RMSNorm, in the form in which kernels of rows (row.cuh)
// need it. xla_ops/cc/core/row_math.h is the CPU's.
//
// Tested through the kernels that use it.

#ifndef XLA_OPS_CC_DEVICE_RMS_CUH_
#define XLA_OPS_CC_DEVICE_RMS_CUH_

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/vector.cuh"

namespace xla_ops {

template <typename T, int kSize>
__device__ __forceinline__ float SumOfSquares(const Vector<T, kSize>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum += ToFloat(x[j]) * ToFloat(x[j]);
  return sum;
}

// 1 / sqrt(sum / hidden_size + eps), the mean within a unit of its last
// place: every thread waits here, so exact division would show.
__device__ __forceinline__ float RootMeanSquareScale(
    float sum, const ExactDiv& hidden_size, float eps) {
  const float sums[1] = {sum};
  float mean[1];
  hidden_size.Divide(sums, mean);
  return rsqrtf(mean[0] + eps);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_RMS_CUH_
