// The gradients of the activations on CUDA: bound by memory. A thread reads a
// vector of the gradient and the elements of the input that it belongs to, and
// writes as many. Vectors have 16 bytes where size and alignment allow, one
// element where they do not.
//
// Tested by tests/gpu/check_gradients.py and
// tests/ops/test_activation_backward.py.

#include "xla_ops/cc/ops/activation/activation_backward.h"

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/activation/activation_backward_launch.h"
#include "xla_ops/cc/ops/activation/activation_gradient.h"
#include "xla_ops/cc/ops/activation/activation_math.cuh"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// Blocks that fill any GPU many times over; beyond it each thread does several
// vectors of its row.
constexpr int64_t kManyBlocks = 65536;

// Fast where the result is rounded to 16 bits (activation_math.cuh).
template <typename T>
struct CudaMath {
  __device__ __forceinline__ static float Sigmoid(float x) {
    return xla_ops::Sigmoid<T>(x);
  }
  __device__ __forceinline__ static float Tanh(float x) {
    return xla_ops::Tanh<T>(x);
  }
  __device__ __forceinline__ static float Erf(float x) { return erff(x); }
  __device__ __forceinline__ static float Exp(float x) {
    if constexpr (sizeof(T) == 4) return expf(x);
    return Exp2(kLog2E * x);
  }
};

// Where a gate is the neighbour of its value.
constexpr bool IsPaired(Activation activation) {
  return activation == Activation::kSwigluoaiAndMul;
}

// Threads: x and blockIdx.y run over the vectors of a row of `grad`, y and
// blockIdx.x over rows. Activations that need not know rows come as one. All
// pointers are aligned to a vector (checked by the launcher).
template <Activation kActivation, typename T, int kSize>
__global__ void __launch_bounds__(kThreads) ActivationBackwardKernel(
    const T* __restrict__ grad,   // [num_rows, size]
    const T* __restrict__ input,  // [num_rows, 2 * size] or [num_rows, size]
    T* __restrict__ dinput,       // as input
    int64_t num_rows, int64_t row_vectors,
    const ActivationConstants constants) {
  constexpr bool kGated = IsGated(kActivation);
  constexpr bool kPaired = IsPaired(kActivation);
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const int64_t size = row_vectors * kSize;
  const T* grads = grad + row * size;
  const int64_t start = row * size * (kGated ? 2 : 1);
  for (int64_t v = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
       v < row_vectors; v += int64_t{blockDim.x} * gridDim.y) {
    const int64_t first = start + v * kSize * (kPaired ? 2 : 1);
    const int64_t second = first + (kPaired ? kSize : size);
    const Vector<T, kSize> g = LoadEagerly<kSize>(grads + v * kSize);
    // Halves, or 2 * kSize elements of pairs.
    Vector<T, kSize> in[2];
    in[0] = LoadEagerly<kSize>(input + first);
    if constexpr (kGated) in[1] = LoadEagerly<kSize>(input + second);
    Vector<T, kSize> out[2];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const int x = kPaired ? 2 * j : j;
      const int y = kPaired ? 2 * j + 1 : kGated ? kSize + j : j;
      const InputGradient found = GradientOf<kActivation, CudaMath<T>>(
          ToFloat(g[j]), ToFloat(in[x / kSize][x % kSize]),
          ToFloat(in[y / kSize][y % kSize]), constants);
      out[x / kSize][x % kSize] = FromFloat<T>(found.dx);
      if constexpr (kGated) {
        out[y / kSize][y % kSize] = FromFloat<T>(found.dy);
      }
    }
    StoreGlobal(dinput + first, out[0]);
    if constexpr (kGated) StoreGlobal(dinput + second, out[1]);
  }
}

template <Activation kActivation, typename T, int kSize>
cudaError_t LaunchVectors(cudaStream_t stream,
                          const ActivationBackwardParams& params,
                          int64_t num_rows, int64_t size) {
  const int64_t row_vectors = size / kSize;
  const dim3 block = RowBlock(row_vectors, kThreads, kThreads);
  const int64_t inputs = IsGated(kActivation) ? 2 : 1;
  return ForEachGrid(num_rows, block.y, [&](int64_t first, int64_t rows) {
    const int64_t grid_x = CeilDivide(rows, block.y);
    const dim3 grid(
        static_cast<unsigned>(grid_x),
        BlocksPerRow(CeilDivide(row_vectors, block.x), grid_x, kManyBlocks));
    const int64_t at = first * size;
    return LaunchKernel<ActivationBackwardKernel<kActivation, T, kSize>>(
        stream, grid, block, static_cast<const T*>(params.grad) + at,
        static_cast<const T*>(params.input) + inputs * at,
        static_cast<T*>(params.dinput) + inputs * at, rows, row_vectors,
        params.constants);
  });
}

template <Activation kActivation, typename T>
cudaError_t Launch(cudaStream_t stream,
                   const ActivationBackwardParams& params) {
  constexpr int kSize = kWideSize<T>;
  const bool has_rows = IsGated(kActivation) && !IsPaired(kActivation);
  const int64_t rows = has_rows ? params.num_tokens : 1;
  const int64_t size = has_rows ? params.size : params.num_tokens * params.size;
  const bool wide = size % kSize == 0 && IsAligned(params.grad, 16) &&
                    IsAligned(params.input, 16) && IsAligned(params.dinput, 16);
  return wide ? LaunchVectors<kActivation, T, kSize>(stream, params, rows, size)
              : LaunchVectors<kActivation, T, 1>(stream, params, rows, size);
}

}  // namespace

cudaError_t LaunchActivationBackward(cudaStream_t stream,
                                     const ActivationBackwardParams& params) {
  if (params.num_tokens == 0 || params.size == 0) return cudaSuccess;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return DispatchActivation(params.activation, [&](auto activation) {
      return Launch<decltype(activation)::value, T>(stream, params);
    });
  });
}

}  // namespace xla_ops
