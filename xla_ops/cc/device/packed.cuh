// Arithmetic on 16-bit vectors, two elements at an instruction where the GPU
// has it.
//
// Tested through the kernels that use it.

#ifndef XLA_OPS_CC_DEVICE_PACKED_CUH_
#define XLA_OPS_CC_DEVICE_PACKED_CUH_

#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/vector.cuh"

namespace xla_ops {

// Two of T in a register, and whether the GPU multiplies and adds them at once.
// GPUs before 9.0 have no product of bf16.
template <typename T>
using Packed =
    std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#if __CUDA_ARCH__ >= 900
template <typename T>
constexpr bool kHasPacked = sizeof(T) == 2;
#else
template <typename T>
constexpr bool kHasPacked = std::is_same_v<T, __half>;
#endif

// Both of a pair, and the pair that floats round to.
__device__ __forceinline__ float2 ToFloats(__half2 x) {
  return __half22float2(x);
}
__device__ __forceinline__ float2 ToFloats(__nv_bfloat162 x) {
  return __bfloat1622float2(x);
}
template <typename T>
__device__ __forceinline__ Packed<T> FromFloats(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    return __floats2half2_rn(x, y);
  } else {
    return __floats2bfloat162_rn(x, y);
  }
}

// a[i] * b[i], rounded once: the bits that a product in fp32 rounds to, which
// is exact for 16-bit factors. kPacked: whether to use what the GPU has.
template <bool kPacked = true, typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Product(const Vector<T, kSize>& a,
                                                    const Vector<T, kSize>& b) {
  Vector<T, kSize> product;
  if constexpr (kPacked && kHasPacked<T> && kSize % 2 == 0) {
    using T2 = Packed<T>;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      reinterpret_cast<T2*>(&product)[i] =
          __hmul2_rn(reinterpret_cast<const T2*>(&a)[i],
                     reinterpret_cast<const T2*>(&b)[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      product[i] = FromFloat<T>(ToFloat(a[i]) * ToFloat(b[i]));
    }
  }
  return product;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_PACKED_CUH_
