// scale_rows on CUDA: a block a row, and more where there are few.

#include <algorithm>
#include <cstdint>

#include "scale_rows.h"
#include "scale_rows_launch.h"
#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"

namespace mine {
namespace {

constexpr int kThreads = 256;

// `input` and `out` may be one buffer: each element is written by the thread
// that reads it.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ScaleRowsKernel(const T* input,      // [num_rows, num_columns]
                    const float* scale,  // [num_rows]
                    T* out,              // [num_rows, num_columns]
                    int64_t num_columns) {
  const int64_t row = blockIdx.x;
  const float factor = scale[row];
  const int64_t step = int64_t{gridDim.y} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
       i < num_columns; i += step) {
    const int64_t at = row * num_columns + i;
    out[at] = xla_ops::FromFloat<T>(xla_ops::ToFloat(input[at]) * factor);
  }
}

}  // namespace

cudaError_t LaunchScaleRows(cudaStream_t stream,
                            const ScaleRowsParams& params) {
  if (params.num_rows == 0 || params.num_columns == 0) return cudaSuccess;
  const dim3 blocks(
      static_cast<unsigned>(params.num_rows),
      xla_ops::BlocksPerRow(xla_ops::CeilDivide(params.num_columns, kThreads),
                            params.num_rows, /*enough=*/1024));
  return xla_ops::DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return xla_ops::LaunchKernel<ScaleRowsKernel<T>>(
        stream, blocks, kThreads, static_cast<const T*>(params.input),
        params.scale, static_cast<T*>(params.out), params.num_columns);
  });
}

}  // namespace mine
