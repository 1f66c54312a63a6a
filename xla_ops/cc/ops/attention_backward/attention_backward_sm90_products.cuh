// What consumers of the Hopper kernels of attention's gradient share: products
// of tiles, and what is done to their results.
//
// Accumulators are as in xla_ops/cc/device/wgmma.cuh, keys by query rows.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_PRODUCTS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_PRODUCTS_CUH_

#include <cstdint>

#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_load.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_shape.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

__device__ __forceinline__ float2 LoadSharedPair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(address)
               : "memory");
  return pair;
}

// Starts d = A B^T of 64 rows of A, a tile of keys, and the rows of B.
template <typename T, typename Shape, int kSize>
__device__ __forceinline__ void StartKeyProduct(uint32_t a, uint32_t b,
                                                float (&d)[kSize]) {
  const uint64_t layout = DescriptorLayout(kAtomBytes, 16);
  FenceRegisters(d);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kPanels * 4; ++k) {
    const int panel = k / 4;
    const int step = k % 4 * 32;  // 16 columns within the panel
    WgmmaSS<T>(
        d, DescriptorAt(layout, a + panel * Shape::kKeyPanelBytes + step),
        DescriptorAt(layout, b + panel * Shape::kRowPanelBytes + step), k > 0);
  }
  WgmmaCommit();
}

// Starts sums += weights B for a tile B of query rows.
template <typename T, typename Shape, int kSize>
__device__ __forceinline__ void StartRowProduct(
    uint32_t (&weights)[Shape::kRows / 16][4], uint32_t b,
    float (&sums)[kSize]) {
  const uint64_t layout = DescriptorLayout(kAtomBytes, Shape::kRowPanelBytes);
  FenceRegisters(sums);
  FenceRegisters(weights);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kRows / 16; ++k) {
    WgmmaRS<T>(sums, weights[k], DescriptorAt(layout, b + k * 2 * kAtomBytes),
               true);
  }
  WgmmaCommit();
}

// Turns scores, 16 keys a warp by kRows query rows, into weights: `weights` are
// rounded for dv, scores become what ds is computed from. This thread's keys
// are `key` and the eighth after it, of the sequence; its query rows 8 n + 2
// (lane % 4) + 0 and 1, the first of which is at `position`. `masked`: not
// every row sees every key. lse is that of the rows, in shared memory.
template <typename T, int kRows, bool kTransform>
__device__ __forceinline__ void FindWeights(
    const AttentionArgs& args, int key, int num_keys, int position, bool masked,
    uint32_t lses, float alibi_slope, float (&scores)[kRows / 2],
    uint32_t (&weights)[kRows / 16][4]) {
  // A key is seen by rows [begin, end), counted from the thread's first.
  int begin[2] = {-kRows, -kRows};
  int end[2] = {kRows, kRows};
  if (masked) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own_key = key + 8 * i;
      if (args.window_right >= 0) {
        begin[i] = own_key - args.window_right - position;
      }
      if (args.window_left >= 0) {
        end[i] = own_key + args.window_left + 1 - position;
      }
      if (own_key >= num_keys) end[i] = -kRows;
    }
    if constexpr (!kTransform) {
      MaskScores(begin, end, [](int) { return true; }, scores);
    }
  }
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
#pragma unroll
    for (int n = 2 * k; n < 2 * k + 2; ++n) {
      const float2 lse = LoadSharedPair(lses + n * 32);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Weight pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = 8 * n + j;
          float& score = scores[4 * n + 2 * i + j];
          pair[j] = WeightOf<kTransform>(
              args, score, args.scale, j == 0 ? lse.x : lse.y, alibi_slope,
              fabsf(static_cast<float>(position + row - key - 8 * i)));
          if (kTransform && (row < begin[i] || row >= end[i])) {
            pair[j].value = 0.0f;
          }
          score = pair[j].value * pair[j].slope;
        }
        weights[k][n % 2 * 2 + i] = PackPair<T>(pair[0].value, pair[1].value);
      }
    }
  }
}

// Turns what FindWeights left into ds, rounded; `products` are grad_out.v.
template <typename T, int kRows>
__device__ __forceinline__ void FindChanges(
    uint32_t deltas, const float (&products)[kRows / 2],
    float (&scores)[kRows / 2], uint32_t (&changes)[kRows / 16][4]) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 delta = LoadSharedPair(deltas + n * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[4 * n + i] *=
          products[4 * n + i] - (i % 2 == 0 ? delta.x : delta.y);
    }
  }
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) PackWeights<T>(scores, k, changes[k]);
}

// Stores either to shared memory as [key, row], a panel of 64 rows after
// another. `key` is this thread's first in the tile, `first_row` the
// warpgroup's.
template <int kPanelBytes, int kSteps>
__device__ __forceinline__ void StoreKeysByRows(
    uint32_t target, int key, int first_row,
    const uint32_t (&values)[kSteps][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own_key = key + i % 2 * 8;
      const int piece = first_row / 8 + 2 * k + i / 2;
      asm volatile(
          "st.shared.b32 [%0], %1;\n" ::"r"(
              target + piece / 8 * kPanelBytes + own_key * kPanelRowBytes +
              ((piece % 8) ^ (own_key % 8)) * 16 + lane % 4 * 4),
          "r"(values[k][i])
          : "memory");
    }
  }
}

// Starts dq = ds K of 64 query rows, for ds [key, row] at `ds` and panels of K
// at `keys`.
template <typename T, typename Shape, int kSize>
__device__ __forceinline__ void StartQueryProduct(uint32_t ds, uint32_t keys,
                                                  float (&dq)[kSize]) {
  const uint64_t layout = DescriptorLayout(kAtomBytes, Shape::kKeyPanelBytes);
  FenceRegisters(dq);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kKeys / 16; ++k) {
    WgmmaSS<T, true, true>(dq, DescriptorAt(layout, ds + k * 2 * kAtomBytes),
                           DescriptorAt(layout, keys + k * 2 * kAtomBytes),
                           k > 0);
  }
  WgmmaCommit();
}

// Writes the thread's rows of dk and dv: `row` of the tile and the eighth
// after it, columns from `first_column` on.
template <typename T, int kSize>
__device__ __forceinline__ void StoreKeyGradients(
    const AttentionBackwardArgs& args, const BackwardSm90Work& work, int row,
    int first_column, const float (&dk)[kSize], const float (&dv)[kSize]) {
  const AttentionArgs& batch = args.batch;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + 8 * i >= work.tile.rows) continue;
    const int64_t start =
        (int64_t{work.tile.range.key_start + work.tile.first + row + 8 * i} *
             batch.num_kv_heads +
         work.kv_head) *
        batch.head_dim;
#pragma unroll
    for (int n = 0; n < kSize / 4; ++n) {
      const int column = first_column + 8 * n + threadIdx.x % 4 * 2;
      if (column >= batch.head_dim) break;
      StoreKeyPair<T>(args, args.dk, start + column,
                      dk[4 * n + 2 * i] * args.scale,
                      dk[4 * n + 2 * i + 1] * args.scale);
      StoreKeyPair<T>(args, args.dv, start + column, dv[4 * n + 2 * i],
                      dv[4 * n + 2 * i + 1]);
    }
  }
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_PRODUCTS_CUH_
