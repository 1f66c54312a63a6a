// Rotary embedding of one head on the CPU, in the two forms that ops define.
// xla_ops/cc/device/rope.cuh is CUDA's.
//
// Tested through the CPU handlers of rotary_embedding, fused_qk_norm_rope and
// fused_qk_norm_rope_and_cache.

#ifndef XLA_OPS_CC_CORE_ROPE_MATH_H_
#define XLA_OPS_CC_CORE_ROPE_MATH_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/row_math.h"

namespace xla_ops {

// `positions`: [num_tokens] of `dtype`, kS64 or kS32.
inline int64_t PositionOf(const void* positions, DType dtype, int64_t token) {
  return dtype == DType::kS32 ? static_cast<const int32_t*>(positions)[token]
                              : static_cast<const int64_t*>(positions)[token];
}

// Norms and rotates a head in fp32, rounded once. `cos`: a row of the table,
// [head_dim], or null where the token is not rotated.
template <typename T, typename Table>
void NormAndRotateHead(int64_t head_dim, float eps, bool is_neox,
                       const T* weight, const Table* cos, T* head) {
  const int64_t pairs = head_dim / 2;
  const float scale = RmsNormScale(
      head_dim, eps, [head](int64_t d) { return ToFloat(head[d]); });
  const int64_t step = is_neox ? 1 : 2;
  const int64_t distance = is_neox ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    T* a = head + i * step;
    T* b = a + distance;
    const float x = ToFloat(*a) * (scale * ToFloat(weight[a - head]));
    const float y = ToFloat(*b) * (scale * ToFloat(weight[b - head]));
    const float c = cos != nullptr ? ToFloat(cos[i]) : 1.0f;
    const float s = cos != nullptr ? ToFloat(cos[pairs + i]) : 0.0f;
    *a = FromFloat<T>(x * c - y * s);
    *b = FromFloat<T>(y * c + x * s);
  }
}

// T(a * b), as a float.
template <typename T>
float RoundedProduct(T a, T b) {
  return ToFloat(FromFloat<T>(ToFloat(a) * ToFloat(b)));
}

// Rotates the first 2 * `pairs` elements of a head, each product and each sum
// rounded to T. `cos`, `sin`: [pairs], of T or float.
template <typename T, typename Table>
void RotateHead(T* head, const Table* cos, const Table* sin, int64_t pairs,
                bool is_neox) {
  const int64_t step = is_neox ? 1 : 2;
  const int64_t distance = is_neox ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    const T x = head[i * step];
    const T y = head[i * step + distance];
    const T c = FromFloat<T>(ToFloat(cos[i]));
    const T s = FromFloat<T>(ToFloat(sin[i]));
    head[i * step] = FromFloat<T>(RoundedProduct(x, c) - RoundedProduct(y, s));
    head[i * step + distance] =
        FromFloat<T>(RoundedProduct(y, c) + RoundedProduct(x, s));
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_ROPE_MATH_H_
