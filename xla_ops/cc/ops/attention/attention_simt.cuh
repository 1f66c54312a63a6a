// Paged attention without tensor cores: fp32, GPUs older than compute
// capability 8.0, and operands that are not aligned to 16 bytes.
//
// A warp works on one packed query row; the four warps of a block have
// neighbouring rows of one sequence and KV head, so that K and V that one
// reads are in the L1 cache for the others. Eight lanes share a token: each
// holds every eighth piece of head_dim, so a warp has four tokens in hand,
// and each group of eight keeps its own online softmax until the end.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SIMT_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SIMT_CUH_

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

struct SimtShape {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileRows = kWarps;
  static constexpr int kLanes = 8;             // for one token
  static constexpr int kTokens = 32 / kLanes;  // in a warp at a time
};

// Reads kWideSize<T> elements as floats. kAligned: by one 16-byte load.
template <bool kAligned, typename T>
__device__ __forceinline__ void LoadFloats(const T* source, float* target) {
  constexpr int kSize = kWideSize<T>;
  if constexpr (kAligned) {
    const Vector<T, kSize> wide = LoadVector<kSize>(source);
#pragma unroll
    for (int i = 0; i < kSize; ++i) target[i] = ToFloat(wide[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) target[i] = ToFloat(source[i]);
  }
}

// Grid: x query tiles, y KV heads, z splits. kHeadDim is the padded
// head_dim, 64, 128 or 256.
template <typename T, int kHeadDim, bool kAligned>
__global__ void __launch_bounds__(SimtShape::kThreads, 2)
    AttentionSimtKernel(const __grid_constant__ AttentionArgs args) {
  constexpr int kLanes = SimtShape::kLanes;
  constexpr int kTokens = SimtShape::kTokens;
  constexpr int kSize = kWideSize<T>;
  constexpr int kPieces = kHeadDim / (kLanes * kSize);
  constexpr int kElements = kPieces * kSize;  // of head_dim, a lane
  __shared__ TileSearch search;
  QueryTile tile;
  if (!FindQueryTile(args, SimtShape::kTileRows,
                     int64_t{gridDim.x} - 1 - blockIdx.x, search, &tile)) {
    return;
  }
  const int row = threadIdx.x / 32;
  if (row >= tile.num_rows) return;
  const int kv_head = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int piece = lane % kLanes;
  const int subwarp = lane / kLanes;
  const int64_t out_row = tile.OutRow(args, kv_head, row);

  float query[kElements];
  float acc[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) query[i] = acc[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = (i * kLanes + piece) * kSize;
    if (column < args.head_dim) {
      LoadFloats<kAligned>(
          static_cast<const T*>(args.query) + out_row * args.head_dim + column,
          query + i * kSize);
    }
  }

  const int context = ContextLength(args, tile.seq);
  const int64_t position = tile.Position(args, context, row);
  const TokenRange visible = VisibleTokens(args, context, position, position);
  const TokenRange split =
      SplitRange(visible.end - visible.begin, args.num_splits, blockIdx.z);
  const int32_t* table = args.block_tables + max(tile.seq, 0) * args.max_blocks;

  float max = -CUDART_INF_F;
  float sum = 0.0f;
  // All lanes make the same number of turns, since they shuffle.
  const int turns = (split.end - split.begin + kTokens - 1) / kTokens;
  for (int turn = 0; turn < turns; ++turn) {
    const int index = split.begin + turn * kTokens + subwarp;
    int64_t offset = -1;
    if (index < split.end) {
      offset = TokenOffset(
          args, FindToken(args, table, visible, visible.begin + index),
          kv_head);
    }
    float key[kElements];
    float value[kElements];
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = (i * kLanes + piece) * kSize;
      if (offset >= 0 && column < args.head_dim) {
        LoadFloats<kAligned>(
            static_cast<const T*>(args.key_cache) + offset + column,
            key + i * kSize);
        LoadFloats<kAligned>(
            static_cast<const T*>(args.value_cache) + offset + column,
            value + i * kSize);
      } else {
#pragma unroll
        for (int j = i * kSize; j < (i + 1) * kSize; ++j) {
          key[j] = value[j] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) score += query[i] * key[i];
    score = WarpSum(score, kLanes) * args.scale;
    if (args.soft_cap != 0.0f) score = SoftCap(score, args.soft_cap);
    if (offset < 0) score = -CUDART_INF_F;

    const float new_max = fmaxf(max, score);
    const float rescale = Exp2(max - FiniteMax(new_max));
    const float weight = Exp2(score - FiniteMax(new_max));
    max = new_max;
    sum = sum * rescale + weight;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      acc[i] = acc[i] * rescale + weight * value[i];
    }
  }

  // Merge the four groups of lanes; a butterfly leaves the sum in all.
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
    const float other = __shfl_xor_sync(kFullWarp, max, step);
    const float new_max = fmaxf(max, other);
    const float rescale = Exp2(max - FiniteMax(new_max));
    max = new_max;
    sum *= rescale;
    sum += __shfl_xor_sync(kFullWarp, sum, step);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      acc[i] *= rescale;
      acc[i] += __shfl_xor_sync(kFullWarp, acc[i], step);
    }
  }
  if (subwarp != 0) return;

  if (args.partial_out != nullptr) {
    const int64_t partial_row =
        int64_t{blockIdx.z} * args.num_tokens * args.num_heads + out_row;
    if (piece == 0) {
      args.partial_max[partial_row] = max;
      args.partial_sum[partial_row] = sum;
    }
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      const int column = (i / kSize * kLanes + piece) * kSize + i % kSize;
      if (column < args.head_dim) {
        *reinterpret_cast<float4*>(args.partial_out +
                                   partial_row * args.head_dim + column) =
            make_float4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
      }
    }
    return;
  }
  // Compared with zero exactly: a NaN sum has to reach the output.
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* out = static_cast<T*>(args.out) + out_row * args.head_dim;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = (i * kLanes + piece) * kSize;
    if (column >= args.head_dim) break;
    Vector<T, kSize> result;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      result[j] = FromFloat<T>(acc[i * kSize + j] * inverse);
    }
    if constexpr (kAligned) {
      StoreVector(out + column, result);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) out[column + j] = result[j];
    }
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SIMT_CUH_
