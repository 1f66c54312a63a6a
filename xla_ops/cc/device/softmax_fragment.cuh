// The online softmax of a warp's scores as the tensor cores leave them.
//
// Lane 4 g + t of a warp holds of rows g and g + 8, its rows 0 and 1, columns
// 8 n + 2 t + j:
//   scores[4 n + 2 row + j],   n from 0 on, j 0 or 1
// which is the accumulator of mma.m16n8k16, n after n, and of wgmma alike. The
// four lanes of a quad hold the same two rows.
//
// Tested through the attention kernels by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_DEVICE_SOFTMAX_FRAGMENT_CUH_
#define XLA_OPS_CC_DEVICE_SOFTMAX_FRAGMENT_CUH_

#include <math_constants.h>

#include <climits>
#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/softmax.cuh"

namespace xla_ops {

// The accumulators of mma.m16n8k16 as one fragment.
template <int kCount>
__device__ __forceinline__ float (
    &Flat(float (&fragments)[kCount][4]))[4 * kCount] {
  return reinterpret_cast<float (&)[4 * kCount]>(fragments[0][0]);
}
template <int kCount>
__device__ __forceinline__ const float (
    &Flat(const float (&fragments)[kCount][4]))[4 * kCount] {
  return reinterpret_cast<const float (&)[4 * kCount]>(fragments[0][0]);
}

__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Multiplies by a row's scale, and caps where `cap_log2` is not zero: see
// SoftCap, whose argument a score then is.
template <int kSize>
__device__ __forceinline__ void ScaleScores(const float (&scale)[2],
                                            float cap_log2,
                                            float (&scores)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) scores[i] *= scale[i / 2 % 2];
  if (cap_log2 == 0.0f) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) scores[i] = SoftCap(scores[i], cap_log2);
}

// ALiBi: subtracts slope * |distance|. `distance` is from the token of the
// thread's first column to the row's position, `slope` in base 2.
template <int kSize>
__device__ __forceinline__ void AddAlibi(const float (&slope)[2],
                                         const float (&distance)[2],
                                         float (&scores)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int row = i / 2 % 2;
    const int column = i / 4 * 8 + i % 2;
    scores[i] -= slope[row] * fabsf(distance[row] - column);
  }
}

// Sets scores to -inf of columns outside a row's [begin, end), or for which
// `exists(column)` is false. Columns count from the thread's first one, so
// that they are constants.
template <int kSize, typename Exists>
__device__ __forceinline__ void MaskScores(const int (&begin)[2],
                                           const int (&end)[2],
                                           const Exists& exists,
                                           float (&scores)[kSize]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int n = 0; n < kSize / 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * n + j;
        const bool seen =
            column >= begin[row] && column < end[row] && exists(column);
        if (!seen) scores[4 * n + 2 * row + j] = -CUDART_INF_F;
      }
    }
  }
}

// The rows' maxima: of `max` and of the scores.
template <int kSize>
__device__ __forceinline__ float RowMax(int row, float max,
                                        const float (&scores)[kSize]) {
#pragma unroll
  for (int n = 0; n < kSize / 4; ++n) {
    max =
        fmaxf(max, fmaxf(scores[4 * n + 2 * row], scores[4 * n + 2 * row + 1]));
  }
  return QuadMax(max);
}

// Replaces a row's scores by weights exp2(factor * (score - max)), and adds
// them to `sum` after it is multiplied by `rescale`.
template <int kSize>
__device__ __forceinline__ void WeighRow(int row, float factor, float max,
                                         float rescale, float& sum,
                                         float (&scores)[kSize]) {
  const float shift = FiniteMax(max) * factor;
  // Two sums, for additions wait for one another.
  float even = 0.0f;
  float odd = 0.0f;
#pragma unroll
  for (int n = 0; n < kSize / 4; ++n) {
    float& x = scores[4 * n + 2 * row];
    float& y = scores[4 * n + 2 * row + 1];
    x = Exp2(fmaf(x, factor, -shift));
    y = Exp2(fmaf(y, factor, -shift));
    even += x;
    odd += y;
  }
  sum = sum * rescale + (even + odd);
}

// Replaces scores by weights exp2(factor * (score - maximum)), factor > 0, and
// brings the rows' maxima and sums up to date. `max` is that of the whole rows
// and of scores without the factor, `sum` of this thread's columns only.
// `rescale` is what the results so far have to be multiplied by.
template <int kSize>
__device__ __forceinline__ void UpdateSoftmax(float factor,
                                              float (&scores)[kSize],
                                              float (&max)[2], float (&sum)[2],
                                              float (&rescale)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float new_max = RowMax(row, max[row], scores);
    rescale[row] = Exp2(max[row] * factor - FiniteMax(new_max) * factor);
    max[row] = new_max;
    WeighRow(row, factor, new_max, rescale[row], sum[row], scores);
  }
}

// Where maxima lag behind: they follow where weights would exceed 2^8, which
// neither sums nor weights of fp16 mind (values beyond 1e36 would overflow
// sooner by as much).
constexpr float kMaxLag = 8.0f;

// The online softmax of two rows whose maxima lag behind: weights are
// exp2(x - base) of x = factor * score, factor > 0, and `base` follows the
// rows' maxima as kMaxLag has it. After the first tiles that is rare. So the
// common way holds a comparison and no exchange between lanes; a branch leads
// to the other.
//
// The common way subtracts `shift`, the base, before it knows whether the base
// has to follow, and what the base then is far above would be rounded away:
// so a base far below zero is no shift, and its rows take the branch.
struct LaggingSoftmax {
  static constexpr float kDeep = 256.0f;

  // The base of a row is shift + deep, of which one is zero; both are while all
  // its scores were -inf.
  float shift[2] = {0.0f, 0.0f};
  float deep[2] = {0.0f, 0.0f};  // below -kDeep
  float sum[2] = {0.0f, 0.0f};   // of this thread's columns
  // The bits of the largest x - shift that passes: of kMaxLag, or less than any
  // while a row has no shift.
  int limit = INT_MIN;

  // Replaces scores by weights. True, of the whole warp: the results so far
  // have to be multiplied by `rescale`.
  template <int kSize>
  __device__ __forceinline__ bool Update(float factor, float (&scores)[kSize],
                                         float (&rescale)[2]) {
    static_assert(kSize % 4 == 0);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      scores[i] = fmaf(scores[i], factor, -shift[i / 2 % 2]);
    }
    // Above a positive number, floats are in the order of their bits, and all
    // others, but for some NaN, lie below it. Three operands an instruction.
    int top[2] = {INT_MIN, INT_MIN};
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        top[row] = __vimax3_s32(top[row], __float_as_int(scores[i + 2 * row]),
                                __float_as_int(scores[i + 2 * row + 1]));
      }
    }
    // Not >, for -0.0f is INT_MIN.
    const bool follows = __any_sync(kFullWarp, max(top[0], top[1]) >= limit);
    if (__builtin_expect(follows, 0)) Follow(scores, rescale);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // Two sums, for additions wait for one another.
      float even = 0.0f;
      float odd = 0.0f;
#pragma unroll
      for (int n = 0; n < kSize / 4; ++n) {
        float& x = scores[4 * n + 2 * row];
        float& y = scores[4 * n + 2 * row + 1];
        x = Exp2(x);
        y = Exp2(y);
        even += x;
        odd += y;
      }
      sum[row] += even + odd;
    }
    return follows;
  }

  // The row's maximum for EndSoftmax and its like, which is -inf of a row
  // without weights. `total` is the row's sum.
  __device__ __forceinline__ float Max(int row, float total) const {
    return total == 0.0f ? -CUDART_INF_F : shift[row] + deep[row];
  }

 private:
  template <int kSize>
  __device__ __forceinline__ void Follow(float (&scores)[kSize],
                                         float (&rescale)[2]) {
    bool all_shifted = true;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float max = RowMax(row, -CUDART_INF_F, scores);
      // Compared with zero exactly: a NaN sum has seen something.
      const bool unseen = QuadSum(sum[row]) == 0.0f;
      const bool follow = max - deep[row] > (unseen ? -CUDART_INF_F : kMaxLag);
      const float step = follow ? max : deep[row];
      rescale[row] = unseen ? 1.0f : Exp2(deep[row] - step);
      sum[row] *= rescale[row];
      const float base = shift[row] + step;
      const bool is_deep = base < -kDeep;
      shift[row] = is_deep ? 0.0f : base;
      deep[row] = is_deep ? base : 0.0f;
#pragma unroll
      for (int n = 0; n < kSize / 4; ++n) {
        scores[4 * n + 2 * row] -= step;
        scores[4 * n + 2 * row + 1] -= step;
      }
      all_shifted = all_shifted && (follow || !unseen) && !is_deep;
    }
    limit = all_shifted ? __float_as_int(kMaxLag) : INT_MIN;
  }
};

// Multiplies the results so far, laid out as scores are.
template <int kSize>
__device__ __forceinline__ void Rescale(const float (&rescale)[2],
                                        float (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] *= rescale[i / 2 % 2];
}

// Rounds the weights of columns 16 k .. 16 k + 15 to T, as the first operand
// of the product with V.
template <typename T, int kSize>
__device__ __forceinline__ void PackWeights(const float (&weights)[kSize],
                                            int k, uint32_t (&operand)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    operand[i] =
        PackPair<T>(weights[8 * k + 2 * i], weights[8 * k + 2 * i + 1]);
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_DEVICE_SOFTMAX_FRAGMENT_CUH_
