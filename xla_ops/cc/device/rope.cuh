// Rotary embedding of a head's pairs, in the two forms that ops define:
//
//   NormAndRotate()                  all of it in fp32, norm included, rounded
//                                    once
//   RotateVector(), RotateHalves()   each product and each sum rounded to the
//                                    tensor's type
//
// Tested through fused_qk_norm_rope and rotary_embedding by
// tests/gpu/check_elementwise.py, fused_qk_norm_rope_and_cache by
// tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_DEVICE_ROPE_CUH_
#define XLA_OPS_CC_DEVICE_ROPE_CUH_

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/packed.cuh"
#include "xla_ops/cc/device/vector.cuh"

namespace xla_ops {

__device__ __forceinline__ int64_t LoadPosition(const void* positions,
                                                bool are_32_bits,
                                                int64_t token) {
  return are_32_bits ? static_cast<const int32_t*>(positions)[token]
                     : static_cast<const int64_t*>(positions)[token];
}

template <typename T>
__device__ __forceinline__ void Rotate(float x, float y, float cos, float sin,
                                       T* a, T* b) {
  *a = FromFloat<T>(x * cos - y * sin);
  *b = FromFloat<T>(y * cos + x * sin);
}

// A thread's part of what belongs to a head of 2 * `pairs` elements, in each
// half of it: `low` from element `at` on and `high` from `pairs` + `at` on.
template <typename T, int kSize>
struct Halves {
  Vector<T, kSize> low;
  Vector<T, kSize> high;

  __device__ static __forceinline__ Halves Load(const T* head, int at,
                                                int pairs) {
    return {LoadEagerly<kSize>(head + at),
            LoadEagerly<kSize>(head + pairs + at)};
  }
};

// The angles of such a part: in NeoX's order low[i] and high[i] are a pair, in
// GPT-J's each vector holds whole pairs, those of `low` come first here.
template <typename Table, int kSize, bool kNeox>
struct Angles {
  Vector<Table, kSize> cos;
  Vector<Table, kSize> sin;

  // `row`: [2 * pairs] of the table.
  __device__ static __forceinline__ Angles Load(const Table* row, int at,
                                                int pairs) {
    if constexpr (kNeox) {
      return {LoadEagerly<kSize>(row + at),
              LoadEagerly<kSize>(row + pairs + at)};
    } else {
      Angles angles;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Table* first = row + (half * pairs + at) / 2;
        const auto c = LoadVector<kSize / 2>(first);
        const auto s = LoadVector<kSize / 2>(first + pairs);
#pragma unroll
        for (int i = 0; i < kSize / 2; ++i) {
          angles.cos[half * kSize / 2 + i] = c[i];
          angles.sin[half * kSize / 2 + i] = s[i];
        }
      }
      return angles;
    }
  }

  // Of no rotation.
  __device__ static __forceinline__ Angles None() {
    Angles angles;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      angles.cos[i] = FromFloat<Table>(1.0f);
      angles.sin[i] = FromFloat<Table>(0.0f);
    }
    return angles;
  }
};

template <bool kNeox, int kSize, typename T, typename Table>
__device__ __forceinline__ void NormAndRotate(
    const Halves<T, kSize>& weight, float scale,
    const Angles<Table, kSize, kNeox>& angles, Halves<T, kSize>& x) {
  float normed[2 * kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    normed[i] = ToFloat(x.low[i]) * (scale * ToFloat(weight.low[i]));
    normed[kSize + i] = ToFloat(x.high[i]) * (scale * ToFloat(weight.high[i]));
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float c = ToFloat(angles.cos[i]);
    const float s = ToFloat(angles.sin[i]);
    if constexpr (kNeox) {
      Rotate(normed[i], normed[kSize + i], c, s, &x.low[i], &x.high[i]);
    } else {
      const int a = 2 * i % kSize;
      Vector<T, kSize>& half = 2 * i < kSize ? x.low : x.high;
      Rotate(normed[2 * i], normed[2 * i + 1], c, s, &half[a], &half[a + 1]);
    }
  }
}

// The same of pair `i` of a head, whose weight and row of the table (null where
// it is not rotated) are not loaded yet: elements `a` and `b` of `x`, which may
// be where the results go.
template <typename T, typename Table>
__device__ __forceinline__ void NormAndRotatePair(const T* x, const T* weight,
                                                  float scale, const Table* row,
                                                  int i, int pairs, int a,
                                                  int b, T* new_a, T* new_b) {
  const float u = ToFloat(x[a]) * (scale * ToFloat(weight[a]));
  const float v = ToFloat(x[b]) * (scale * ToFloat(weight[b]));
  const float c = row != nullptr ? ToFloat(row[i]) : 1.0f;
  const float s = row != nullptr ? ToFloat(row[pairs + i]) : 0.0f;
  Rotate(u, v, c, s, new_a, new_b);
}

// T(a * b), as a float. __fmul_rn keeps fp32 products from being fused with
// the addition: the contract rounds them.
template <typename T>
__device__ __forceinline__ float RoundedProduct(T a, T b) {
  return ToFloat(FromFloat<T>(__fmul_rn(ToFloat(a), ToFloat(b))));
}

template <typename T>
__device__ __forceinline__ void RotateRounded(T cos, T sin, T* x, T* y) {
  const T new_x =
      FromFloat<T>(RoundedProduct(*x, cos) - RoundedProduct(*y, sin));
  *y = FromFloat<T>(RoundedProduct(*y, cos) + RoundedProduct(*x, sin));
  *x = new_x;
}

// Rotates every pair. Packed arithmetic too rounds every product and sum once,
// to the same bits.
template <typename T, int kPairs>
__device__ __forceinline__ void RotateVector(const Vector<T, kPairs>& cos,
                                             const Vector<T, kPairs>& sin,
                                             Vector<T, kPairs>* x,
                                             Vector<T, kPairs>* y) {
  if constexpr (kHasPacked<T> && kPairs % 2 == 0) {
    using T2 = Packed<T>;
#pragma unroll
    for (int i = 0; i < kPairs / 2; ++i) {
      const T2 c = reinterpret_cast<const T2*>(&cos)[i];
      const T2 s = reinterpret_cast<const T2*>(&sin)[i];
      T2& a = reinterpret_cast<T2*>(x)[i];
      T2& b = reinterpret_cast<T2*>(y)[i];
      const T2 new_a = __hsub2_rn(__hmul2_rn(a, c), __hmul2_rn(b, s));
      b = __hadd2_rn(__hmul2_rn(b, c), __hmul2_rn(a, s));
      a = new_a;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      RotateRounded(cos[i], sin[i], &(*x)[i], &(*y)[i]);
    }
  }
}

// Entries of the table, rounded to T where it has floats.
template <int kPairs, typename T, typename Table>
__device__ __forceinline__ Vector<T, kPairs> LoadTable(const Table* entries) {
  const Vector<Table, kPairs> loaded = LoadVector<kPairs>(entries);
  Vector<T, kPairs> rounded;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    rounded[i] = FromFloat<T>(ToFloat(loaded[i]));
  }
  return rounded;
}

// A part of a head, rotated by rounded steps.
template <bool kNeox, int kSize, typename T, typename Table>
__device__ __forceinline__ void RotateHalves(
    const Angles<Table, kSize, kNeox>& angles, Halves<T, kSize>& x) {
  Vector<T, kSize> cos;
  Vector<T, kSize> sin;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    cos[i] = FromFloat<T>(ToFloat(angles.cos[i]));
    sin[i] = FromFloat<T>(ToFloat(angles.sin[i]));
  }
  if constexpr (kNeox) {
    RotateVector(cos, sin, &x.low, &x.high);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int a = 2 * i % kSize;
      Vector<T, kSize>& half = 2 * i < kSize ? x.low : x.high;
      RotateRounded(cos[i], sin[i], &half[a], &half[a + 1]);
    }
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_ROPE_CUH_
