// Attention without tensor cores: fp32, GPUs older than compute capability
// 8.0, and operands that are not aligned to 16 bytes.
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
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/fp8.cuh"
#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

struct SimtShape {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileRows = kWarps;
  static constexpr int kLanes = 8;             // for one token
  static constexpr int kTokens = 32 / kLanes;  // in a warp at a time
};

// Reads a piece of a key or value; bytes are 8-bit floats.
template <typename KV>
__device__ __forceinline__ void LoadKvPiece(const AttentionArgs& args,
                                            const KV* source,
                                            float (&piece)[kPiece]) {
  if constexpr (std::is_same_v<KV, uint8_t>) {
    Vector<uint8_t, kPiece> bytes;
    if (args.aligned) {
      bytes = LoadVector<kPiece>(source);
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) bytes[i] = source[i];
    }
    const auto& words = reinterpret_cast<const uint32_t (&)[kPiece / 4]>(bytes);
#pragma unroll
    for (int i = 0; i < kPiece / 2; ++i) {
      const uint32_t word = words[i / 2] >> i % 2 * 16;
      const uint32_t halves = args.e5m2 ? HalvesFromFp8<__NV_E5M2, 0, 1>(word)
                                        : HalvesFromFp8<__NV_E4M3, 0, 1>(word);
      const float2 pair =
          __half22float2(reinterpret_cast<const __half2&>(halves));
      piece[2 * i] = pair.x;
      piece[2 * i + 1] = pair.y;
    }
  } else {
    LoadPiece(source, args.aligned, piece);
  }
}

// KV is the type of keys and values: query's, or uint8_t for 8-bit floats.
// Grid: x query tiles, y KV heads, z splits. kHeadDim is the padded
// head_dim, 64, 128 or 256.
template <typename KV, int kHeadDim>
__global__ void __launch_bounds__(SimtShape::kThreads, 2)
    AttentionSimtKernel(const __grid_constant__ AttentionArgs args) {
  constexpr int kLanes = SimtShape::kLanes;
  constexpr int kTokens = SimtShape::kTokens;
  constexpr int kPieces = kHeadDim / (kLanes * kPiece);
  __shared__ TileSearch search;
  QueryTile tile;
  if (!FindQueryTile<SimtShape::kTileRows, SimtShape::kWarps>(
          args, static_cast<int>(gridDim.x - 1 - blockIdx.x), search, &tile)) {
    return;
  }
  const int row = threadIdx.x / 32;
  if (row >= tile.num_rows) return;
  const int kv_head = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int piece = lane % kLanes;
  const int subwarp = lane / kLanes;
  const QueryRow query_row = tile.Row(args, kv_head, row);
  const int64_t out_row = query_row.Index(args);
  const KV* keys = static_cast<const KV*>(args.key);
  const KV* values = static_cast<const KV*>(args.value);

  float query[kPieces][kPiece] = {};
  float acc[kPieces][kPiece] = {};
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = (i * kLanes + piece) * kPiece;
    if (column < args.head_dim) {
      LoadQueryPiece(args, out_row * args.head_dim + column, query[i]);
    }
  }

  const int position = tile.Position(args, row);
  const TokenRange visible =
      VisibleTokens(args, tile.kv_len, position, position);
  const TokenRange split =
      SplitRange(visible.end - visible.begin, args.num_splits, blockIdx.z);
  const int32_t* table = args.block_table + max(tile.seq, 0) * args.max_blocks;
  const float scale = args.scale * KvScale<0>(args, tile.seq, kv_head);
  const float slope = AlibiSlope(args, tile.seq, query_row.head);

  float max = -CUDART_INF_F;
  float sum = 0.0f;
  // All lanes make the same number of turns, since they shuffle. Unsigned, for
  // a range may end at 2^31 - 1, and the last turn runs past it.
  const uint32_t split_end = split.end;
  const uint32_t turns = (split_end - split.begin + kTokens - 1) / kTokens;
  for (uint32_t turn = 0; turn < turns; ++turn) {
    const uint32_t index = split.begin + turn * kTokens + subwarp;
    const uint32_t token = visible.begin + index;
    int64_t offset = -1;
    if (index < split_end) {
      offset = TokenOffset(args, FindToken(args, tile, table, visible, token),
                           kv_head);
    }
    float key[kPieces][kPiece] = {};
    float value[kPieces][kPiece] = {};
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = (i * kLanes + piece) * kPiece;
      if (offset >= 0 && column < args.head_dim) {
        LoadKvPiece(args, keys + offset + column, key[i]);
        LoadKvPiece(args, values + offset + column, value[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) score += query[i][j] * key[i][j];
    }
    score = WarpSum(score, kLanes) * scale;
    if (args.soft_cap != 0.0f) score = SoftCap(score, args.soft_cap);
    if (args.alibi_slopes != nullptr) {
      const int distance = static_cast<int>(position - token);
      score -= slope * fabsf(static_cast<float>(distance));
    }
    if (offset < 0) score = -CUDART_INF_F;

    const float new_max = fmaxf(max, score);
    const float rescale = Exp2(max - FiniteMax(new_max));
    const float weight = Exp2(score - FiniteMax(new_max));
    max = new_max;
    sum = sum * rescale + weight;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        acc[i][j] = acc[i][j] * rescale + weight * value[i][j];
      }
    }
  }

  LetNextKernelStart();  // the one that combines splits
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
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        acc[i][j] *= rescale;
        acc[i][j] += __shfl_xor_sync(kFullWarp, acc[i][j], step);
      }
    }
  }
  if (subwarp != 0) return;

  const int64_t partial_row =
      int64_t{blockIdx.z} * args.num_tokens * args.num_heads + out_row;
  const float factor =
      KvScale<1>(args, tile.seq, kv_head) *
      EndOrSplitRow(args, query_row, partial_row, max, sum, piece == 0);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = (i * kLanes + piece) * kPiece;
    if (column >= args.head_dim) break;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) acc[i][j] *= factor;
    if (args.partial_out != nullptr) {
      float* partial = args.partial_out + partial_row * args.head_dim + column;
#pragma unroll
      for (int j = 0; j < kPiece; j += 4) {
        *reinterpret_cast<float4*>(partial + j) =
            make_float4(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]);
      }
    } else {
      StoreOut(args, out_row * args.head_dim + column, acc[i]);
    }
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SIMT_CUH_
