// Quantisation on CUDA; xla_ops/cc/core/quant.h says what it means and
// computes the same to the last bit on the CPU.
//
// Tested through the kernels of the quantising ops.

#ifndef XLA_OPS_CC_DEVICE_QUANT_CUH_
#define XLA_OPS_CC_DEVICE_QUANT_CUH_

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/core/quant_constants.h"
#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/fp8.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/vector.cuh"

namespace xla_ops {

// fminf() drops a NaN operand, so NaN becomes 448.
__device__ __forceinline__ float ClampToFp8(float x) {
  return fmaxf(-kFp8Max, fminf(x, kFp8Max));
}

template <int kSize>
__device__ __forceinline__ Vector<uint8_t, kSize> PackFp8(
    const float (&x)[kSize]) {
  Vector<uint8_t, kSize> packed;
  if constexpr (kSize % 2 == 0) {
    auto* pairs = reinterpret_cast<uint16_t*>(packed.data);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      pairs[i] =
          ToFp8Pair<__NV_E4M3>(ClampToFp8(x[2 * i]), ClampToFp8(x[2 * i + 1]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      packed[i] = ToFp8<__NV_E4M3>(ClampToFp8(x[i]));
    }
  }
  return packed;
}

// The conversions round to nearest even and saturate; NaN becomes 0.
__device__ __forceinline__ uint8_t ToInt8(float x) {
  uint32_t bits;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return static_cast<uint8_t>(bits);
}

__device__ __forceinline__ int32_t ToInt32(float x) {
  return __float2int_rn(x);
}

// Sum and result saturate: |azp| may be up to 2^31.
__device__ __forceinline__ uint8_t AddZeroPoint(int32_t x, int32_t azp) {
  const int64_t sum = int64_t{x} + azp;
  return static_cast<uint8_t>(sum < -128 ? -128 : sum > 127 ? 127 : sum);
}

__device__ __forceinline__ float Fp8RowScale(float abs_max,
                                             const float* upper_bound) {
  if (upper_bound != nullptr) abs_max = fminf(abs_max, *upper_bound);
  return fmaxf(abs_max / kFp8Max, kMinFp8Scale);
}

// Divides elements of T, as floats, by one scale.
template <typename T>
class ScaleDiv {
 public:
  __device__ explicit ScaleDiv(float scale) : scale_(scale), div_(scale) {}

  template <int kSize>
  __device__ __forceinline__ void Divide(const float (&x)[kSize],
                                         float (&out)[kSize]) const {
    if constexpr (sizeof(T) < 4) {
      div_.Divide(x, out);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) out[i] = x[i] / scale_;
    }
  }

 private:
  float scale_;
  ExactDiv div_;
};

// out[i] = map.Apply(in[i]) for `size` elements, kVectors vectors a thread; the
// last one may have less. `Map` is copied to every thread; Load() returns what
// Apply() needs beside the vector.
template <int kWidth, int kVectors, typename T, typename Map>
__global__ void __launch_bounds__(256)
    QuantizeKernel(const T* __restrict__ in, uint8_t* __restrict__ out,
                   int64_t size, const Map map) {
  const int64_t first =
      (int64_t{blockIdx.x} * kVectors * blockDim.x + threadIdx.x) * kWidth;
  const int64_t step = int64_t{blockDim.x} * kWidth;
  Vector<T, kWidth> x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * step;
    if (at + kWidth <= size) x[i] = LoadEagerly<kWidth>(in + at);
  }
  const auto state = map.Load();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * step;
    if (at + kWidth <= size) {
      float values[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = ToFloat(x[i][j]);
      StoreGlobal(out + at, map.Apply(values, state));
    } else {
      for (int64_t j = at; j < size; ++j) {
        const float value[1] = {ToFloat(in[j])};
        StoreGlobal(out + j, map.Apply(value, state));
      }
    }
  }
}

// Queues QuantizeKernel for any size and alignment.
template <typename T, typename Map>
cudaError_t LaunchQuantize(cudaStream_t stream, const T* in, void* out,
                           int64_t size, const Map& map) {
  constexpr int kThreads = 256;
  constexpr int kWidth = kWideSize<T>;
  auto* bytes = static_cast<uint8_t*>(out);
  const auto launch = [&](auto width, auto vectors) {
    constexpr int kSize = decltype(width)::value;
    constexpr int kVectors = decltype(vectors)::value;
    const int64_t step = int64_t{kThreads} * kSize * kVectors;
    return ForEachGrid(size, step, [&](int64_t first, int64_t count) {
      return LaunchKernel<QuantizeKernel<kSize, kVectors, T, Map>>(
          stream, static_cast<unsigned>(CeilDivide(count, step)), kThreads,
          in + first, bytes + first, count, map);
    });
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Wide = std::integral_constant<int, kWidth>;
  if (!IsAligned(in, 16) || !IsAligned(out, kWidth))
    return launch(One{}, One{});
  // Two loads in flight are faster where blocks fill a large GPU twice over,
  // and slower where they leave multiprocessors without one.
  constexpr int64_t kManyElements = int64_t{1} << 23;
  return size < kManyElements ? launch(Wide{}, One{}) : launch(Wide{}, Two{});
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_QUANT_CUH_
