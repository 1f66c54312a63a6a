// Activations gated by the other half of their row, on CUDA: bound by memory. A
// thread reads a vector of each half, 16 bytes where size and alignment allow
// and one element where they do not, and writes one vector. The others are in
// activation_flat.cu.cc.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_activation.py.

#include "xla_ops/cc/ops/activation/activation.h"

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/occupancy.h"
#include "xla_ops/cc/device/packed.cuh"
#include "xla_ops/cc/device/quant.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/activation/activation_launch.h"
#include "xla_ops/cc/ops/activation/activation_math.cuh"

namespace xla_ops {
namespace {

// Of a block, at most. A block a row, whose threads have the row's vectors on
// the way at once, was the fastest on an H100.
constexpr int kThreads = 512;
// Of a block that has several short rows, or where there are few elements.
constexpr int kSmallThreads = 256;
constexpr int64_t kFewVectors = int64_t{1} << 18;
// Blocks that fill any GPU many times over; beyond it each thread does several
// vectors of its row, so that fewer blocks come and go.
constexpr int64_t kManyBlocks = 16384;

template <Activation kActivation, typename T>
__device__ __forceinline__ float Activate(float x, float threshold) {
  if constexpr (kActivation == Activation::kGeluAndMul) {
    return x * 0.5f * (1.0f + erff(x * 0.70710678f));
  } else if constexpr (kActivation == Activation::kGeluTanhAndMul) {
    const float inner = 0.79788456f * (x + 0.044715f * (x * x * x));
    return 0.5f * x * (1.0f + tanhf(inner));
  } else if constexpr (kActivation == Activation::kFatreluAndMul) {
    return x > threshold ? x : 0.0f;
  } else {
    return Swish<T>(x, 1.0f);
  }
}

// The two roundings of the contract.
template <Activation kActivation, typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Gate(const Vector<T, kSize>& x,
                                                 const Vector<T, kSize>& y,
                                                 float threshold) {
  if constexpr (kActivation == Activation::kMulAndSilu) {
    return Gate<Activation::kSiluAndMul>(y, x, threshold);
  } else {
    Vector<T, kSize> activated;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      activated[j] =
          FromFloat<T>(Activate<kActivation, T>(ToFloat(x[j]), threshold));
    }
    return Product(activated, y);
  }
}

// Threads: x and blockIdx.y run over the vectors of a row, kVectors for each
// thread, again and again if kLoops, y and blockIdx.x over rows. All pointers
// are aligned to a vector (checked by the launcher).
template <Activation kActivation, typename T, int kSize, int kVectors,
          bool kLoops>
__global__ void __launch_bounds__(kThreads,
                                  MinBlocks(kVectors == 1 ? 3 : 2, kThreads))
    ActivationKernel(const T* __restrict__ input,      // [num_rows, 2 * size]
                     const float* __restrict__ scale,  // [1] or null
                     float threshold,                  // of fatrelu
                     void* __restrict__ out,           // [num_rows, size]
                     int64_t num_rows, int64_t row_vectors) {
  constexpr bool kQuant = kActivation == Activation::kSiluAndMulQuant;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const int64_t size = row_vectors * kSize;
  const T* gate = input + row * 2 * size;
  const T* up = gate + size;
  float inverse_scale = 1.0f;
  if constexpr (kQuant) inverse_scale = 1.0f / *scale;
  // A row that one pass does is short.
  using Index = std::conditional_t<kLoops, int64_t, int>;
  const Index vectors = static_cast<Index>(row_vectors);
  const Index threads = blockDim.x;
  const Index step = threads * static_cast<Index>(gridDim.y);
  Index first = static_cast<Index>(blockIdx.y) * threads +
                static_cast<Index>(threadIdx.x);
  for (; first < vectors; first += kVectors * step) {
    Vector<T, kSize> x[kVectors];
    Vector<T, kSize> y[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const Index v = first + i * step;
      if (i > 0 && v >= vectors) break;
      x[i] = LoadEagerly<kSize>(gate + v * kSize);
      y[i] = LoadEagerly<kSize>(up + v * kSize);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const Index v = first + i * step;
      if (i > 0 && v >= vectors) break;
      const Vector<T, kSize> result = Gate<kActivation>(x[i], y[i], threshold);
      if constexpr (kQuant) {
        float values[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          values[j] = ToFloat(result[j]) * inverse_scale;
        }
        StoreGlobal(static_cast<uint8_t*>(out) + row * size + v * kSize,
                    PackFp8(values));
      } else {
        StoreGlobal(static_cast<T*>(out) + row * size + v * kSize, result);
      }
    }
    if constexpr (!kLoops) return;
  }
}

template <Activation kActivation, typename T, int kSize, int kVectors>
cudaError_t LaunchVectors(cudaStream_t stream, const ActivationParams& params,
                          int max_threads) {
  constexpr bool kQuant = kActivation == Activation::kSiluAndMulQuant;
  const int64_t row_vectors = params.size / kSize;
  const int64_t needed = CeilDivide(row_vectors, kVectors);
  const dim3 block = RowBlock(needed, max_threads, kSmallThreads);
  return ForEachGrid(
      params.num_tokens, block.y, [&](int64_t first, int64_t rows) {
        const int64_t grid_x = CeilDivide(rows, block.y);
        const dim3 grid(
            static_cast<unsigned>(grid_x),
            BlocksPerRow(CeilDivide(needed, block.x), grid_x, kManyBlocks));
        const int64_t out_bytes = kQuant ? 1 : sizeof(T);
        const auto launch = [&](auto loops) {
          return LaunchKernel<ActivationKernel<kActivation, T, kSize, kVectors,
                                               decltype(loops)::value>>(
              stream, grid, block,
              static_cast<const T*>(params.input) + first * 2 * params.size,
              params.scale, params.constants.threshold,
              static_cast<char*>(params.out) + first * params.size * out_bytes,
              rows, row_vectors);
        };
        // Others are as fast with the loop, or faster.
        if constexpr (kSize > 1 && kVectors == 1) {
          if (needed <= block.x && block.x > kSmallThreads) {
            return launch(std::false_type{});
          }
        }
        return launch(std::true_type{});
      });
}

template <Activation kActivation>
cudaError_t Launch(cudaStream_t stream, const ActivationParams& params) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kSize = kWideSize<T>;
    const int64_t out_bytes = params.scale != nullptr ? kSize : 16;
    if (params.size % kSize != 0 || !IsAligned(params.input, 16) ||
        !IsAligned(params.out, out_bytes)) {
      return LaunchVectors<kActivation, T, 1, 1>(stream, params, kSmallThreads);
    }
    const int64_t row_vectors = params.size / kSize;
    if (params.num_tokens < kFewVectors / row_vectors) {
      return LaunchVectors<kActivation, T, kSize, 1>(stream, params,
                                                     kSmallThreads);
    }
    if (row_vectors <= kThreads) {
      return LaunchVectors<kActivation, T, kSize, 1>(stream, params, kThreads);
    }
    return LaunchVectors<kActivation, T, kSize, 2>(stream, params, kThreads);
  });
}

}  // namespace

cudaError_t LaunchActivation(cudaStream_t stream,
                             const ActivationParams& params) {
  if (params.num_tokens == 0 || params.size == 0) return cudaSuccess;
  switch (params.activation) {
    case Activation::kSiluAndMul:
      return Launch<Activation::kSiluAndMul>(stream, params);
    case Activation::kMulAndSilu:
      return Launch<Activation::kMulAndSilu>(stream, params);
    case Activation::kGeluAndMul:
      return Launch<Activation::kGeluAndMul>(stream, params);
    case Activation::kGeluTanhAndMul:
      return Launch<Activation::kGeluTanhAndMul>(stream, params);
    case Activation::kSiluAndMulQuant:
      return Launch<Activation::kSiluAndMulQuant>(stream, params);
    case Activation::kFatreluAndMul:
      return Launch<Activation::kFatreluAndMul>(stream, params);
    default:
      return LaunchFlatActivation(stream, params);
  }
}

}  // namespace xla_ops
