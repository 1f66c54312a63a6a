// Pieces of the mma.sync attention kernels that work on one tile: copies to
// shared memory, products and masks. The kernels that string them together are
// in attention_mma_decode.cuh and attention_mma_prefill.cuh.
//
// Fragments: lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of
// every eight (xla_ops/cc/device/mma.cuh).
//
// 8-bit keys and values are copied as they are and become fp16 on the way
// from shared memory to the fragments. ldmatrix moves pairs of bytes, so a
// lane gets other columns than of 16-bit elements, four neighbouring ones of
// each sixteen; that is made good where it costs nothing:
//   K  the columns of Q are permuted to match, as Q is stored (StoreQuery)
//   V  output columns are permuted: of columns 16 c .. 16 c + 15, fragment
//      2 c has the even ones and 2 c + 1 the odd ones (OutColumn, OutPair)

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_TILE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_TILE_CUH_

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/fp8.cuh"
#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// What a row of a tile needs beside its operands.
struct TileRow {
  TokenRange visible;
  int position;       // among the keys
  float alibi_slope;  // base 2
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

// The thread's `pair`th pair of neighbouring output columns begins here...
template <bool kFp8>
__device__ __forceinline__ int OutColumn(int pair) {
  const int t = threadIdx.x % 4;
  return kFp8 ? pair / 2 * 16 + 4 * t + pair % 2 * 2 : 8 * pair + 2 * t;
}

// ... and holds this, of row g + 8 `row`.
template <bool kFp8, int kColumns>
__device__ __forceinline__ float2 OutPair(const float (&out)[kColumns][4],
                                          int pair, int row) {
  if constexpr (kFp8) {
    const int even = pair / 2 * 2;
    const int j = 2 * row + pair % 2;
    return make_float2(out[even][j], out[even + 1][j]);
  } else {
    return make_float2(out[pair][2 * row], out[pair][2 * row + 1]);
  }
}

// Starts the copy of a warp's kTokens tokens of a K or V tile of kColumns
// 16-bit columns. Lane i % kTokens holds the offset in bytes of token i, -1
// for zeros; `row_bytes` are a token's.
template <int kColumns, int kTokens>
__device__ __forceinline__ void CopyTokens(const uint8_t* cache, uint32_t tile,
                                           int first_row, int64_t offset,
                                           int row_bytes) {
  constexpr int kChunks = kColumns / kChunk;  // lanes for one token
  constexpr int kRows = 32 / kChunks;         // tokens at a time
  const int lane = threadIdx.x % 32;
  const int column = lane % kChunks * 16;
  const bool in_row = column < row_bytes;
#pragma unroll
  for (int i = 0; i < kTokens; i += kRows) {
    const int row = i + lane / kChunks;
    const int64_t start = __shfl_sync(kFullWarp, offset, row);
    const bool valid = start >= 0 && in_row;
    CopyAsync(TileAddress<kColumns>(tile, first_row + row, lane % kChunks),
              valid ? cache + start + column : cache, valid);
  }
}

// Copies the query tile for 16-bit keys; rows past the end and columns past
// head_dim are zero.
template <typename T, int kHeadDim, int kTileRows>
__device__ __forceinline__ void CopyQuery(const AttentionArgs& args,
                                          const QueryTile& tile, int kv_head,
                                          uint32_t query_tile) {
  constexpr int kChunks = kHeadDim / kChunk;
  const T* query = static_cast<const T*>(args.query);
  for (int i = threadIdx.x; i < kTileRows * kChunks; i += blockDim.x) {
    const int row = i / kChunks;
    const int column = i % kChunks * kChunk;
    const bool valid = row < tile.num_rows && column < args.head_dim;
    const T* source =
        valid
            ? query + tile.Row(args, kv_head, row).Index(args) * args.head_dim +
                  column
            : query;
    CopyAsync(TileAddress<kHeadDim>(query_tile, row, i % kChunks), source,
              valid);
  }
}

// Stores the query tile for 8-bit keys: as fp16, columns permuted. A row of
// bf16, whose range fp16 has not, is divided by the power of two below its
// largest magnitude; what vanishes then is 2^-24 of that. row_scale[row] is
// the power.
template <int kHeadDim, int kTileRows>
__device__ __forceinline__ void StoreQuery(const AttentionArgs& args,
                                           const QueryTile& tile, int kv_head,
                                           uint8_t* query_tile,
                                           float* row_scale) {
  constexpr int kChunks = kHeadDim / kChunk;  // lanes of a row
  for (int i = threadIdx.x; i < kTileRows * kChunks; i += blockDim.x) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    Vector<uint32_t, 4> pairs = {};
    if (row < tile.num_rows && chunk * kChunk < args.head_dim) {
      pairs = LoadVector<4>(
          static_cast<const uint32_t*>(args.query) +
          (tile.Row(args, kv_head, row).Index(args) * args.head_dim +
           chunk * kChunk) /
              2);
    }
    float scale = 1.0f;
    if (args.dtype == DType::kBF16) {
      float values[8];
      uint32_t largest = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = __uint_as_float(pairs[j] << 16);
        values[2 * j + 1] = __uint_as_float(pairs[j] & 0xffff0000u);
        largest = max(largest, pairs[j] << 16 & 0x7fff0000u);
        largest = max(largest, pairs[j] & 0x7fff0000u);
      }
#pragma unroll
      for (int step = kChunks / 2; step > 0; step /= 2) {
        largest = max(largest, __shfl_xor_sync(kFullWarp, largest, step));
      }
      // The exponent alone, and its inverse; of zeros and the two ends of
      // the range, the next that has one.
      const uint32_t exponent =
          min(max(largest & 0x7f800000u, 0x00800000u), 0x7e800000u);
      scale = __uint_as_float(exponent);
      const float inverse = __uint_as_float(0x7f000000u - exponent);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[j] = PackPair<__half>(values[2 * j] * inverse,
                                    values[2 * j + 1] * inverse);
      }
    }
    if (chunk == 0) row_scale[row] = scale;
    // Columns 4 t, 4 t + 1 of each sixteen go to 2 t, 2 t + 1; columns
    // 4 t + 2, 4 t + 3 to 2 t + 8, 2 t + 9.
    const int first = chunk & ~1;
    const int half = chunk % 2 * 8;
    *reinterpret_cast<uint2*>(query_tile +
                              TileAddress<kHeadDim>(0, row, first) + half) =
        make_uint2(pairs[0], pairs[2]);
    *reinterpret_cast<uint2*>(query_tile +
                              TileAddress<kHeadDim>(0, row, first + 1) + half) =
        make_uint2(pairs[1], pairs[3]);
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

// The query operand of a warp, read as it is needed.
template <int kHeadDim>
struct QueryOperand {
  uint32_t tile;
  int row;

  __device__ __forceinline__ QueryOperand(uint32_t tile, int row)
      : tile(tile), row(row) {}

  __device__ __forceinline__ void Get(int k, uint32_t (&a)[4]) const {
    LoadQueryFragment<kHeadDim>(tile, row, k, a);
  }
};

// scores = Q K^T for 16 rows and the kTokens tokens from `token`.
template <typename T, int kHeadDim, int kTokens, typename Query>
__device__ __forceinline__ void MultiplyKeys(const Query& query,
                                             uint32_t key_tile, int token,
                                             float (&scores)[kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
  // Matrices 0, 1: tokens 0-7, lower and upper 8 columns; 2, 3: tokens 8-15.
  const int row = token + lane % 8 + (lane / 16) * 8;
  const int upper = (lane / 8) % 2;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[4];
    query.Get(k, a);
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

// The same for 8-bit keys.
template <__nv_fp8_interpretation_t kFormat, int kHeadDim, int kTokens,
          typename Query>
__device__ __forceinline__ void MultiplyKeysFp8(
    const Query& query, uint32_t key_tile, int token,
    float (&scores)[kTokens / 8][4]) {
  static_assert(kTokens == 16 || kTokens % 32 == 0);
  const int lane = threadIdx.x % 32;
  if constexpr (kTokens == 16) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; k += 2) {
      // Matrices 0, 1: the tokens' columns 16 k .. 16 k + 15; 2, 3: the next.
      uint32_t words[4];
      LoadMatrices(
          TileAddress<kHeadDim / 2>(key_tile, token + lane % 16, k + lane / 16),
          words);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        query.Get(k + i, a);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t word = words[2 * i + n];
          Mma<__half>(a, HalvesFromFp8<kFormat, 0, 1>(word),
                      HalvesFromFp8<kFormat, 2, 3>(word), scores[n]);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[4];
      query.Get(k, a);
#pragma unroll
      for (int n = 0; n < kTokens / 32; ++n) {
        // Matrix i: tokens 8 i .. 8 i + 7, sixteen columns.
        uint32_t words[4];
        LoadMatrices(
            TileAddress<kHeadDim / 2>(key_tile, token + 32 * n + lane, k),
            words);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Mma<__half>(a, HalvesFromFp8<kFormat, 0, 1>(words[i]),
                      HalvesFromFp8<kFormat, 2, 3>(words[i]),
                      scores[4 * n + i]);
        }
      }
    }
  }
}

// out += weights V for 16 rows and the kTokens tokens from `token`.
template <typename T, int kHeadDim, int kTokens>
__device__ __forceinline__ void MultiplyValues(
    const float (&weights)[kTokens / 8][4], uint32_t value_tile, int token,
    float (&out)[kHeadDim / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    uint32_t a[4];
    PackWeights<T>(Flat(weights), k, a);
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

// The same for 8-bit values.
template <__nv_fp8_interpretation_t kFormat, int kHeadDim, int kTokens>
__device__ __forceinline__ void MultiplyValuesFp8(
    const float (&weights)[kTokens / 8][4], uint32_t value_tile, int token,
    float (&out)[kHeadDim / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    uint32_t a[4];
    PackWeights<__half>(Flat(weights), k, a);
    const int row = token + 16 * k + lane % 16;
#pragma unroll
    for (int n = 0; n < kHeadDim / 32; ++n) {
      // Words 0 and 1: tokens 2 t, 2 t + 1 and 2 t + 8, 2 t + 9, columns 2 g
      // and 2 g + 1 of sixteen; 2 and 3: of the next sixteen.
      uint32_t words[4];
      LoadMatricesTransposed(
          TileAddress<kHeadDim / 2>(value_tile, row, 2 * n + lane / 16), words);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t lower = words[2 * i];
        const uint32_t upper = words[2 * i + 1];
        Mma<__half>(a, HalvesFromFp8<kFormat, 0, 2>(lower),
                    HalvesFromFp8<kFormat, 0, 2>(upper), out[4 * n + 2 * i]);
        Mma<__half>(a, HalvesFromFp8<kFormat, 1, 3>(lower),
                    HalvesFromFp8<kFormat, 1, 3>(upper),
                    out[4 * n + 2 * i + 1]);
      }
    }
  }
}

// a - b, of tokens that may lie past 2^31 and have become negative.
__device__ __forceinline__ int Distance(int a, int b) {
  return static_cast<int>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
}

// Turns scores into base-2 logits; column c of the fragment is token
// `token` + c, rows[8 * i] is that of row g + 8 i.
template <int kSize>
__device__ __forceinline__ void FinishScores(const AttentionArgs& args,
                                             const float (&scale)[2],
                                             const TileRow* rows, int token,
                                             float (&scores)[kSize]) {
  ScaleScores(scale, args.soft_cap, scores);
  if (args.alibi_slopes == nullptr) return;
  const int first = token + threadIdx.x % 4 * 2;
  AddAlibi({rows[0].alibi_slope, rows[8].alibi_slope},
           {static_cast<float>(Distance(rows[0].position, first)),
            static_cast<float>(Distance(rows[8].position, first))},
           scores);
}

// Sets logits that a row may not see to -inf. Column c of the fragment is
// token `token` + c, and its bit in `valid` says whether it exists.
template <int kSize>
__device__ __forceinline__ void MaskTokens(const TileRow* rows, int token,
                                           uint64_t valid,
                                           float (&scores)[kSize]) {
  const int column = threadIdx.x % 4 * 2;
  const int first = token + column;
  valid >>= column;
  MaskScores(
      {Distance(rows[0].visible.begin, first),
       Distance(rows[8].visible.begin, first)},
      {Distance(rows[0].visible.end, first),
       Distance(rows[8].visible.end, first)},
      [&](int c) { return (valid >> c & 1) != 0; }, scores);
}

// Writes two neighbouring elements of a row: to `out` or, of a split or a
// piece, to its partial result.
template <typename T, bool kFp8>
__device__ __forceinline__ void StorePair(const AttentionArgs& args,
                                          bool partial, int64_t out_row,
                                          int64_t partial_row, int column,
                                          float x, float y) {
  if (partial) {
    *reinterpret_cast<float2*>(args.partial_out + partial_row * args.head_dim +
                               column) = make_float2(x, y);
    return;
  }
  // The operands of 8-bit keys are fp16 whatever the query is.
  const uint32_t pair = kFp8 && args.dtype == DType::kBF16
                            ? PackPair<__nv_bfloat16>(x, y)
                            : PackPair<T>(x, y);
  reinterpret_cast<uint32_t*>(
      args.out)[(out_row * args.head_dim + column) / 2] = pair;
}

#endif  // XLA_OPS_HAS_MMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_TILE_CUH_
