// The gradients of the activations on CUDA: bound by memory. A thread reads a
// vector of the gradient and the elements of the input that it belongs to, and
// writes as many. Vectors have 16 bytes where size and alignment allow, one
// element where they do not.
//
// Tested by tests/gpu/check_gradients.py and
// tests/ops/test_activation_backward.py.

#include "xla_ops/cc/ops/activation/activation_backward.h"

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/occupancy.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/activation/activation_backward_launch.h"
#include "xla_ops/cc/ops/activation/activation_gradient.h"
#include "xla_ops/cc/ops/activation/activation_math.cuh"

namespace xla_ops {
namespace {

// Of a block, at most. Rows of 512 vectors or more get large blocks.
constexpr int kThreads = 512;
constexpr int kSmallThreads = 256;
constexpr int64_t kFewVectors = int64_t{1} << 18;
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

// For each multiprocessor: as many as leave a thread registers for its vectors.
template <Activation kActivation, int kVectors, bool kLoops>
constexpr int kMinBlocks = MinBlocks(kLoops                 ? 1
                                     : kVectors > 1         ? 2
                                     : IsGated(kActivation) ? 3
                                                            : 4,
                                     kThreads);

// Where a gate is the neighbour of its value.
constexpr bool IsPaired(Activation activation) {
  return activation == Activation::kSwigluoaiAndMul;
}

// Threads: x and blockIdx.y run over the vectors of a row of `grad`, kVectors
// for each thread, again and again if kLoops, y and blockIdx.x over rows.
// Activations that need not know rows come as one. All pointers are aligned to
// a vector (checked by the launcher).
template <Activation kActivation, typename T, int kSize, int kVectors,
          bool kLoops>
__global__ void __launch_bounds__(kThreads,
                                  kMinBlocks<kActivation, kVectors, kLoops>)
    ActivationBackwardKernel(
        const T* __restrict__ grad,   // [num_rows, size]
        const T* __restrict__ input,  // [num_rows, 2 * size] or as grad
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
  // Where the vectors of a pair, or halves, begin.
  const auto first_of = [&](int64_t v) {
    return start + v * kSize * (kPaired ? 2 : 1);
  };
  const int64_t to_second = kPaired ? kSize : size;
  using V = Vector<T, kSize>;
  const int64_t step = int64_t{blockDim.x} * gridDim.y;
  int64_t v = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  for (; v < row_vectors; v += kVectors * step) {
    V g[kVectors];
    // Halves, or 2 * kSize elements of pairs.
    V in[kVectors][2];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i > 0 && v + i * step >= row_vectors) break;
      const T* x = input + first_of(v + i * step);
      g[i] = LoadEagerly<kSize>(grads + (v + i * step) * kSize);
      in[i][0] = LoadEagerly<kSize>(x);
      if constexpr (kGated) in[i][1] = LoadEagerly<kSize>(x + to_second);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i > 0 && v + i * step >= row_vectors) break;
      V out[2];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int x = kPaired ? 2 * j : j;
        const int y = kPaired ? 2 * j + 1 : kGated ? kSize + j : j;
        const InputGradient found = GradientOf<kActivation, CudaMath<T>>(
            ToFloat(g[i][j]), ToFloat(in[i][x / kSize][x % kSize]),
            ToFloat(in[i][y / kSize][y % kSize]), constants);
        out[x / kSize][x % kSize] = FromFloat<T>(found.dx);
        if constexpr (kGated) {
          out[y / kSize][y % kSize] = FromFloat<T>(found.dy);
        }
      }
      T* dx = dinput + first_of(v + i * step);
      StoreGlobal(dx, out[0]);
      if constexpr (kGated) StoreGlobal(dx + to_second, out[1]);
    }
    if constexpr (!kLoops) return;
  }
}

template <Activation kActivation, typename T, int kSize, int kVectors>
cudaError_t LaunchVectors(cudaStream_t stream,
                          const ActivationBackwardParams& params,
                          int64_t num_rows, int64_t size, int max_threads) {
  const int64_t row_vectors = size / kSize;
  const int64_t needed = CeilDivide(row_vectors, kVectors);
  const dim3 block = RowBlock(needed, max_threads, kSmallThreads);
  const int64_t inputs = IsGated(kActivation) ? 2 : 1;
  return ForEachGrid(num_rows, block.y, [&](int64_t first, int64_t rows) {
    const int64_t grid_x = CeilDivide(rows, block.y);
    const dim3 grid(
        static_cast<unsigned>(grid_x),
        BlocksPerRow(CeilDivide(needed, block.x), grid_x, kManyBlocks));
    const int64_t at = first * size;
    const auto launch = [&](auto loops) {
      return LaunchKernel<ActivationBackwardKernel<
          kActivation, T, kSize, kVectors, decltype(loops)::value>>(
          stream, grid, block, static_cast<const T*>(params.grad) + at,
          static_cast<const T*>(params.input) + inputs * at,
          static_cast<T*>(params.dinput) + inputs * at, rows, row_vectors,
          params.constants);
    };
    if constexpr (kSize > 1) {
      if (needed <= int64_t{block.x} * grid.y) {
        return launch(std::false_type{});
      }
    }
    return launch(std::true_type{});
  });
}

template <Activation kActivation, typename T>
cudaError_t Launch(cudaStream_t stream,
                   const ActivationBackwardParams& params) {
  constexpr int kSize = kWideSize<T>;
  constexpr bool kHasRows = IsGated(kActivation) && !IsPaired(kActivation);
  const int64_t rows = kHasRows ? params.num_tokens : 1;
  const int64_t size = kHasRows ? params.size : params.num_tokens * params.size;
  const bool wide = size % kSize == 0 && IsAligned(params.grad, 16) &&
                    IsAligned(params.input, 16) && IsAligned(params.dinput, 16);
  const auto launch = [&](auto width, auto vectors, int max_threads) {
    return LaunchVectors<kActivation, T, decltype(width)::value,
                         decltype(vectors)::value>(stream, params, rows, size,
                                                   max_threads);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Wide = std::integral_constant<int, kSize>;
  if (!wide) return launch(One{}, One{}, kSmallThreads);
  if constexpr (kHasRows) {
    // A GPU that few vectors do not fill would be less full.
    const int64_t row_vectors = size / kSize;
    if (rows >= kFewVectors / row_vectors && row_vectors > kThreads) {
      return launch(Wide{}, Two{}, kThreads);
    }
  }
  const bool few = params.num_tokens * params.size < kFewVectors * kSize;
  return launch(Wide{}, One{}, few ? kSmallThreads : kThreads);
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
