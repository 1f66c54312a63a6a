// The pieces of the tensor-core attention kernel that work on one tile: its
// shape, copies to shared memory, products, masks and the online softmax.
// The kernel that strings them together is in attention_mma.cuh.
//
// Fragments: lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of
// every eight (xla_ops/cc/device/mma.cuh).

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_TILE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_TILE_CUH_

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// kHeadDim is the padded head_dim: 64, 128 or 256.
template <int kHeadDim, int kWarpsM>
struct MmaShape {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kTileRows = 16 * kWarpsM;
  static constexpr int kTileTokens = 64;
  // Tokens that one warp multiplies, and that one warp loads.
  static constexpr int kWarpTokens = kTileTokens / kWarpsN;
  static constexpr int kLoadTokens = kTileTokens / kWarps;
  static constexpr int kQueryBytes = kTileRows * kHeadDim * 2;
  static constexpr int kTileBytes = kTileTokens * kHeadDim * 2;
  // The warps' accumulators, merged through the same memory; rows are padded
  // by 32 bytes to spread them over the banks.
  static constexpr int kMergeStride = kHeadDim + 8;
  static constexpr int kMergeBytes =
      kWarpsN > 1 ? kWarps * 16 * kMergeStride * 4 : 0;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kTileBytes > kMergeBytes
                                          ? kQueryBytes + 2 * kTileBytes
                                          : kMergeBytes;
  // Query fragments stay in registers where they leave room for the
  // accumulator and matter to speed, else they are read for every tile;
  // decode waits for memory, and gains from more blocks.
  static constexpr bool kQueryInRegisters = kHeadDim <= 128 && kWarpsM > 1;
  // Blocks that a multiprocessor should hold, which bounds registers; the
  // numbers are the largest that do not spill inside the loop.
  static constexpr int kMinBlocks = kWarpsM > 1 ? (kHeadDim <= 64    ? 3
                                                   : kHeadDim <= 128 ? 2
                                                                     : 1)
                                                : (kHeadDim <= 64    ? 5
                                                   : kHeadDim <= 128 ? 4
                                                                     : 2);
};

#if XLA_OPS_HAS_MMA

// The state of the online softmax of a thread's two rows (g and g + 8) and
// its part of their output, unnormalised.
template <int kHeadDim>
struct MmaAccumulator {
  float out[kHeadDim / 8][4];
  float max[2];
  float sum[2];  // of this thread's columns only, until the end

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (auto& columns : out) {
#pragma unroll
      for (float& value : columns) value = 0.0f;
    }
    max[0] = max[1] = -CUDART_INF_F;
    sum[0] = sum[1] = 0.0f;
  }
};

// Starts the copy of the warp's 16 tokens of a K or V tile. Lane i (and
// i + 16) holds the cache offset of the warp's token i, -1 for zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void CopyTokens(const T* cache, uint32_t tile,
                                           int first_row, int64_t offset,
                                           int head_dim) {
  constexpr int kChunks = kHeadDim / kChunk;  // lanes for one token
  constexpr int kRows = 32 / kChunks;         // tokens at a time
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kChunks;
#pragma unroll
  for (int i = 0; i < 16; i += kRows) {
    const int row = i + lane / kChunks;
    const int64_t start = __shfl_sync(kFullWarp, offset, row);
    const bool valid = start >= 0 && chunk * kChunk < head_dim;
    CopyAsync(TileAddress<kHeadDim>(tile, first_row + row, chunk),
              valid ? cache + start + chunk * kChunk : cache, valid);
  }
}

// Fragment of query columns 16 k .. 16 k + 15 of the 16 rows from `row`.
template <int kHeadDim>
__device__ __forceinline__ void LoadQueryFragment(uint32_t query, int row,
                                                  int k,
                                                  uint32_t (&fragment)[4]) {
  const int lane = threadIdx.x % 32;
  LoadMatrices(TileAddress<kHeadDim>(query, row + lane % 16, 2 * k + lane / 16),
               fragment);
}

// scores = Q K^T for 16 rows and the kTokens tokens from `token`.
template <typename T, int kHeadDim, int kTokens, int kQueryFragments>
__device__ __forceinline__ void MultiplyKeys(
    const uint32_t (&query)[kQueryFragments][4], uint32_t query_tile,
    int query_row, uint32_t key_tile, int token,
    float (&scores)[kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (auto& columns : scores) {
#pragma unroll
    for (float& value : columns) value = 0.0f;
  }
  // Matrices 0, 1: tokens 0-7, lower and upper 8 columns; 2, 3: tokens 8-15.
  const int row = token + lane % 8 + (lane / 16) * 8;
  const int upper = (lane / 8) % 2;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[4];
    if constexpr (kQueryFragments > 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = query[k][i];
    } else {
      LoadQueryFragment<kHeadDim>(query_tile, query_row, k, a);
    }
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n) {
      uint32_t b[4];
      LoadMatrices(TileAddress<kHeadDim>(key_tile, row + 16 * n, 2 * k + upper),
                   b);
      Mma<T>(a, b[0], b[1], scores[2 * n]);
      Mma<T>(a, b[2], b[3], scores[2 * n + 1]);
    }
  }
}

// out += weights V for 16 rows and the kTokens tokens from `token`; the
// weights are rounded to T as they become operands.
template <typename T, int kHeadDim, int kTokens>
__device__ __forceinline__ void MultiplyValues(
    const float (&weights)[kTokens / 8][4], uint32_t value_tile, int token,
    float (&out)[kHeadDim / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    const uint32_t a[4] = {
        PackPair<T>(weights[2 * k][0], weights[2 * k][1]),
        PackPair<T>(weights[2 * k][2], weights[2 * k][3]),
        PackPair<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]),
        PackPair<T>(weights[2 * k + 1][2], weights[2 * k + 1][3])};
    const int row = token + 16 * k + lane % 16;
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      LoadMatricesTransposed(
          TileAddress<kHeadDim>(value_tile, row, 2 * n + lane / 16), b);
      Mma<T>(a, b[0], b[1], out[2 * n]);
      Mma<T>(a, b[2], b[3], out[2 * n + 1]);
    }
  }
}

// Turns scores into base-2 logits.
template <int kColumns>
__device__ __forceinline__ void ScaleScores(const AttentionArgs& args,
                                            float (&scores)[kColumns][4]) {
#pragma unroll
  for (auto& columns : scores) {
#pragma unroll
    for (float& value : columns) value *= args.scale;
  }
  if (args.soft_cap == 0.0f) return;
#pragma unroll
  for (auto& columns : scores) {
#pragma unroll
    for (float& value : columns) value = SoftCap(value, args.soft_cap);
  }
}

// Sets logits that a row may not see to -inf. Column c of the fragment is
// token `token` + c, its bit in `valid` says whether it exists; position[i]
// is the KV position of row g + 8 i.
template <int kColumns>
__device__ __forceinline__ void MaskScores(const AttentionArgs& args,
                                           int token, uint64_t valid,
                                           const int (&position)[2],
                                           float (&scores)[kColumns][4]) {
  const int column = 2 * (threadIdx.x % 4);
  valid >>= column;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int last = position[row] - token - column;
    const int first = args.sliding_window > 0 ? last - args.sliding_window + 1
                                              : -kColumns * 8;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = 8 * n + j;
        const bool seen = c <= last && c >= first && (valid >> c & 1);
        if (!seen) scores[n][2 * row + j] = -CUDART_INF_F;
      }
    }
  }
}

// Replaces logits by weights exp2(logit - max) and rescales what has been
// accumulated to the new maximum. The four lanes of a row agree on it.
template <int kHeadDim, int kColumns>
__device__ __forceinline__ void UpdateSoftmax(float (&scores)[kColumns][4],
                                              MmaAccumulator<kHeadDim>& acc) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float max = acc.max[row];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      max = fmaxf(max, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
    }
    max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 1));
    max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 2));
    const float shift = FiniteMax(max);
    const float rescale = Exp2(acc.max[row] - shift);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int j = 2 * row; j < 2 * row + 2; ++j) {
        scores[n][j] = Exp2(scores[n][j] - shift);
        sum += scores[n][j];
      }
    }
    acc.max[row] = max;
    acc.sum[row] = acc.sum[row] * rescale + sum;
#pragma unroll
    for (auto& columns : acc.out) {
      columns[2 * row] *= rescale;
      columns[2 * row + 1] *= rescale;
    }
  }
}

#endif  // XLA_OPS_HAS_MMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_TILE_CUH_
