// new_op on CUDA: bound by memory. A thread reads and writes 16 bytes at a
// time where both pointers are aligned to that, one element where not.
//
// Tested by tests/ops/test_new_op.py.

#include "xla_ops/cc/ops/new_op/new_op.h"

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/new_op/new_op_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// Blocks that fill any GPU; beyond it each thread does several vectors, so
// that fewer blocks come and go.
constexpr int64_t kMaxBlocks = 4096;

// Threads stride over the vectors of the flat tensor, then over the fewer
// than kSize elements after the last whole vector. `input` and `out` are
// aligned to a vector (checked by the launcher) and may be one buffer: each
// element is written by the thread that reads it.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    NewOpKernel(const T* input,  // [num_elements]
                T* out,          // [num_elements]
                int64_t num_elements, float scale) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t num_vectors = num_elements / kSize;
  for (int64_t v = thread; v < num_vectors; v += step) {
    Vector<T, kSize> x = LoadVector<kSize>(input + v * kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      x[i] = FromFloat<T>(ToFloat(x[i]) * scale);
    }
    StoreVector(out + v * kSize, x);
  }
  for (int64_t i = num_vectors * kSize + thread; i < num_elements; i += step) {
    out[i] = FromFloat<T>(ToFloat(input[i]) * scale);
  }
}

template <typename T, int kSize>
cudaError_t LaunchVectors(cudaStream_t stream, const NewOpParams& params) {
  constexpr int64_t kPerBlock = int64_t{kThreads} * kSize;
  const int64_t blocks =
      std::min(kMaxBlocks, CeilDivide(params.num_elements, kPerBlock));
  return LaunchKernel<NewOpKernel<T, kSize>>(
      stream, static_cast<unsigned>(blocks), kThreads,
      static_cast<const T*>(params.input), static_cast<T*>(params.out),
      params.num_elements, params.scale);
}

}  // namespace

cudaError_t LaunchNewOp(cudaStream_t stream, const NewOpParams& params) {
  if (params.num_elements == 0) return cudaSuccess;
  const bool wide = IsAligned(params.input, 16) && IsAligned(params.out, 16);
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return wide ? LaunchVectors<T, kWideSize<T>>(stream, params)
                : LaunchVectors<T, 1>(stream, params);
  });
}

}  // namespace xla_ops
