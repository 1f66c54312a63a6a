// Activations that need not know rows, on CUDA: those without a gate, and
// swigluoai_and_mul, whose pairs are neighbours. Bound by memory: a thread
// reads 16 bytes and writes what they become.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_activation.py.

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/packed.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/activation/activation.h"
#include "xla_ops/cc/ops/activation/activation_launch.h"
#include "xla_ops/cc/ops/activation/activation_math.cuh"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ __forceinline__ float Rounded(float x) {
  return ToFloat(FromFloat<T>(x));
}

// What the tanh of gelu_new and gelu_fast is taken of.
template <Activation kActivation, typename T>
__device__ __forceinline__ float GeluInner(float x) {
  if constexpr (kActivation == Activation::kGeluNew) {
    const float cube = Rounded<T>(Rounded<T>(x * x) * x);
    return 0.79788456f * Rounded<T>(x + Rounded<T>(0.044715f * cube));
  } else {
    const float square = Rounded<T>(Rounded<T>(0.044715f * x) * x);
    return Rounded<T>(0.79788456f * x) * Rounded<T>(1.0f + square);
  }
}

template <Activation kActivation, typename T>
__device__ __forceinline__ float ActivateAlone(float x) {
  if constexpr (kActivation == Activation::kGeluQuick) {
    return Swish<T>(x, 1.702f);
  } else {
    const float inner = Rounded<T>(GeluInner<kActivation, T>(x));
    const float tanh = Rounded<T>(Tanh<T>(inner));
    return Rounded<T>(0.5f * x) * Rounded<T>(1.0f + tanh);
  }
}

// x * factor, by a factor of fp32.
template <typename T>
__device__ __forceinline__ Packed<T> Scaled(Packed<T> x, float factor) {
  const float2 both = ToFloats(x);
  return FromFloats<T>(both.x * factor, both.y * factor);
}

// Two elements of gelu_new or gelu_fast. Packed arithmetic too rounds every
// product and sum once, to the bits of ActivateAlone: fp32 has more than twice
// the bits of T and two. Single roundings took four times as long as memory.
template <Activation kActivation, typename T>
__device__ __forceinline__ Packed<T> ActivatePair(Packed<T> x) {
  constexpr float kCubed = 0.044715f;
  constexpr float kScale = 0.79788456f;
  const Packed<T> one = FromFloats<T>(1.0f, 1.0f);
  Packed<T> inner;
  if constexpr (kActivation == Activation::kGeluNew) {
    const Packed<T> cube = __hmul2_rn(__hmul2_rn(x, x), x);
    inner = Scaled<T>(__hadd2_rn(x, Scaled<T>(cube, kCubed)), kScale);
  } else {
    const Packed<T> square = __hmul2_rn(Scaled<T>(x, kCubed), x);
    inner = __hmul2_rn(Scaled<T>(x, kScale), __hadd2_rn(one, square));
  }
  const float2 both = ToFloats(inner);
  const Packed<T> tanh = FromFloats<T>(Tanh<T>(both.x), Tanh<T>(both.y));
  const Packed<T> half = FromFloats<T>(0.5f, 0.5f);
  return __hmul2_rn(__hmul2_rn(half, x), __hadd2_rn(one, tanh));
}

// Comparisons that NaN passes by.
template <typename T>
__device__ __forceinline__ float SwigluOai(
    float gate, float up, const ActivationConstants& constants) {
  const float limit = constants.limit;
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return (up + 1.0f) * (gate * Sigmoid<T>(gate * constants.alpha));
}

// Elements of the input for each of the result.
template <Activation kActivation>
constexpr int kInputs = IsGated(kActivation) ? 2 : 1;

template <Activation kActivation, typename T>
__device__ __forceinline__ T Element(const T* x,  // [kInputs]
                                     const ActivationConstants& constants) {
  if constexpr (IsGated(kActivation)) {
    return FromFloat<T>(SwigluOai<T>(ToFloat(x[0]), ToFloat(x[1]), constants));
  } else {
    return FromFloat<T>(ActivateAlone<kActivation, T>(ToFloat(x[0])));
  }
}

template <Activation kActivation, typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> Elements(
    const Vector<T, kInputs<kActivation> * kWidth>& x,
    const ActivationConstants& constants) {
  constexpr bool kRoundsSteps = kActivation == Activation::kGeluNew ||
                                kActivation == Activation::kGeluFast;
  Vector<T, kWidth> result;
  if constexpr (kRoundsSteps && kHasPacked<T> && kWidth % 2 == 0) {
    using T2 = Packed<T>;
#pragma unroll
    for (int j = 0; j < kWidth / 2; ++j) {
      reinterpret_cast<T2*>(&result)[j] =
          ActivatePair<kActivation, T>(reinterpret_cast<const T2*>(&x)[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      result[j] = Element<kActivation>(&x[kInputs<kActivation> * j], constants);
    }
  }
  return result;
}

// A thread has kWidth elements of `out`, the last thread maybe less. Vectors
// are aligned (checked by the launcher). `out` may be `input` where there is no
// gate: a thread reads its elements before it writes.
template <Activation kActivation, typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    FlatActivationKernel(const T* input,  // [kInputs * size]
                         T* out,          // [size]
                         int64_t size, const ActivationConstants constants) {
  constexpr int kIn = kInputs<kActivation>;
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (kWidth > 1 && at + kWidth <= size) {
    const Vector<T, kIn * kWidth> x =
        LoadVector<kIn * kWidth>(input + kIn * at);
    StoreGlobal(out + at, Elements<kActivation, T, kWidth>(x, constants));
    return;
  }
  for (int64_t i = at; i < size && i < at + kWidth; ++i) {
    T x[kIn];
#pragma unroll
    for (int j = 0; j < kIn; ++j) x[j] = input[kIn * i + j];
    out[i] = Element<kActivation>(x, constants);
  }
}

template <Activation kActivation, typename T, int kWidth>
cudaError_t LaunchWidth(cudaStream_t stream, const ActivationParams& params) {
  constexpr int64_t kStep = int64_t{kThreads} * kWidth;
  const T* input = static_cast<const T*>(params.input);
  T* out = static_cast<T*>(params.out);
  return ForEachGrid(
      params.num_tokens * params.size, kStep,
      [&](int64_t first, int64_t count) {
        return LaunchKernel<FlatActivationKernel<kActivation, T, kWidth>>(
            stream, static_cast<unsigned>(CeilDivide(count, kStep)), kThreads,
            input + kInputs<kActivation> * first, out + first, count,
            params.constants);
      });
}

template <Activation kActivation>
cudaError_t Launch(cudaStream_t stream, const ActivationParams& params) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = kWideSize<T> / kInputs<kActivation>;
    const bool wide = IsAligned(params.input, 16) &&
                      IsAligned(params.out, kWidth * sizeof(T));
    return wide ? LaunchWidth<kActivation, T, kWidth>(stream, params)
                : LaunchWidth<kActivation, T, 1>(stream, params);
  });
}

}  // namespace

cudaError_t LaunchFlatActivation(cudaStream_t stream,
                                 const ActivationParams& params) {
  switch (params.activation) {
    case Activation::kSwigluoaiAndMul:
      return Launch<Activation::kSwigluoaiAndMul>(stream, params);
    case Activation::kGeluNew:
      return Launch<Activation::kGeluNew>(stream, params);
    case Activation::kGeluFast:
      return Launch<Activation::kGeluFast>(stream, params);
    case Activation::kGeluQuick:
      return Launch<Activation::kGeluQuick>(stream, params);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace xla_ops
