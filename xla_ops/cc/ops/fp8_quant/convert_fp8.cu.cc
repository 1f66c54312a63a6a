// Conversion to and from fp8 on CUDA: bound by memory. A thread reads or writes
// 16 bytes of the side that is not fp8.
//
// Tested by tests/gpu/check_elementwise.py and tests/ops/test_convert_fp8.py.

#include "xla_ops/cc/ops/fp8_quant/convert_fp8.h"

#include <cstdint>
#include <cstring>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/fp8.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/quant.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;

// For QuantizeKernel (device/quant.cuh). Unlike the quantising ops' NaN stays.
template <typename T, __nv_fp8_interpretation_t kFormat>
struct ToFp8ByScale {
  float scale;

  __device__ ScaleDiv<T> Load() const { return ScaleDiv<T>(scale); }
  template <int kSize>
  __device__ Vector<uint8_t, kSize> Apply(const float (&x)[kSize],
                                          const ScaleDiv<T>& div) const {
    float scaled[kSize];
    div.Divide(x, scaled);
    Vector<uint8_t, kSize> codes;
    if constexpr (kSize % 2 == 0) {
      auto* pairs = reinterpret_cast<uint16_t*>(codes.data);
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        pairs[i] = ToFp8Pair<kFormat>(scaled[2 * i], scaled[2 * i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) codes[i] = ToFp8<kFormat>(scaled[i]);
    }
    return codes;
  }
};

template <__nv_fp8_interpretation_t kFormat>
__device__ __forceinline__ float2 FloatsFromFp8(uint32_t pair) {
  const uint32_t halves = HalvesFromFp8<kFormat, 0, 1>(pair);
  __half2 values;
  memcpy(&values, &halves, sizeof(values));
  return __half22float2(values);
}

// A thread has kWidth elements, the last thread maybe less. Vectors are aligned
// (checked by the launcher).
template <typename T, __nv_fp8_interpretation_t kFormat, int kWidth>
__global__ void __launch_bounds__(kThreads)
    FromFp8Kernel(const uint8_t* __restrict__ src, T* __restrict__ dst,
                  int64_t size, float scale) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if constexpr (kWidth > 1) {
    if (at + kWidth <= size) {
      const Vector<uint8_t, kWidth> codes = LoadVector<kWidth>(src + at);
      Vector<T, kWidth> values;
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        const float2 pair =
            FloatsFromFp8<kFormat>(codes[i] | uint32_t{codes[i + 1]} << 8);
        values[i] = FromFloat<T>(pair.x * scale);
        values[i + 1] = FromFloat<T>(pair.y * scale);
      }
      StoreGlobal(dst + at, values);
      return;
    }
  }
  for (int64_t i = at; i < size && i < at + kWidth; ++i) {
    dst[i] = FromFloat<T>(FloatsFromFp8<kFormat>(src[i]).x * scale);
  }
}

template <typename T, __nv_fp8_interpretation_t kFormat, int kWidth>
cudaError_t LaunchFromFp8(cudaStream_t stream, const ConvertFp8Params& params) {
  constexpr int64_t kStep = int64_t{kThreads} * kWidth;
  return ForEachGrid(params.size, kStep, [&](int64_t first, int64_t count) {
    return LaunchKernel<FromFp8Kernel<T, kFormat, kWidth>>(
        stream, static_cast<unsigned>(CeilDivide(count, kStep)), kThreads,
        static_cast<const uint8_t*>(params.src) + first,
        static_cast<T*>(params.dst) + first, count, params.scale);
  });
}

template <__nv_fp8_interpretation_t kFormat>
cudaError_t Launch(cudaStream_t stream, const ConvertFp8Params& params) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.to_fp8) {
      return LaunchQuantize(stream, static_cast<const T*>(params.src),
                            params.dst, params.size,
                            ToFp8ByScale<T, kFormat>{params.scale});
    }
    constexpr int kWidth = kWideSize<T>;
    const bool wide =
        IsAligned(params.src, kWidth) && IsAligned(params.dst, 16);
    return wide ? LaunchFromFp8<T, kFormat, kWidth>(stream, params)
                : LaunchFromFp8<T, kFormat, 1>(stream, params);
  });
}

}  // namespace

cudaError_t LaunchConvertFp8(cudaStream_t stream,
                             const ConvertFp8Params& params) {
  return params.fp8_dtype == DType::kF8E5M2 ? Launch<__NV_E5M2>(stream, params)
                                            : Launch<__NV_E4M3>(stream, params);
}

}  // namespace xla_ops
