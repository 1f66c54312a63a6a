// The pieces of the tensor-core attention kernel for prefill that work on one
// tile: its shape, copies to shared memory and products. The kernel that
// strings them together is in attention_mma_prefill.cuh, what it shares with
// the one for decode in attention_mma_tile.cuh.
//
// Products are written as pipelines: a fragment is loaded some products ahead
// of its use. The compiler, left alone, loads all that a step needs, waits, and
// multiplies.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_PREFILL_TILE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_PREFILL_TILE_CUH_

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_mma_tile.cuh"

namespace xla_ops {

// kFp8: 8-bit keys and values. kHeadDim is the padded head_dim: 64, 128 or
// 256. kRows: query rows of a block, kMmaManyRows or kMmaFewRows.
template <bool kFp8, int kHeadDim, int kRows>
struct MmaPrefillShape {
  static constexpr int kTileRows = kRows;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kRows / (16 * kWarps);  // of 16, a warp
  static_assert(kRowTiles == 1 || (kRowTiles == 2 && kHeadDim <= 128),
                "the results of a warp's rows have to fit in registers");
  // Shared memory: the query tile, then stages of a K and a V tile. A block
  // has 99 KB on the smaller GPUs of a generation (8.6, 8.9, 12.0); on 8.0,
  // two blocks should fit in 164 KB. Two stages gain where they fit, but with
  // 128 rows of head_dim 128 (benchmarks/NOTES.md); for 64 rows there, even
  // those of 48 tokens.
  static constexpr bool kNarrow = !kFp8 && kHeadDim == 128 && kRowTiles == 1;
  static constexpr int kTileTokens = kNarrow ? 48 : 64;
  static constexpr int kLoadTokens = kTileTokens / kWarps;  // of a warp
  static constexpr int kKvColumns = kFp8 ? kHeadDim / 2 : kHeadDim;
  static constexpr int kQueryBytes = kTileRows * kHeadDim * 2;
  static constexpr int kTileBytes = kTileTokens * kKvColumns * 2;
  static constexpr int kStages =
      kNarrow || kHeadDim == 64 || (kFp8 && kHeadDim == 128) ? 2 : 1;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kAlign = 2 * kHeadDim;  // to rows, for TileStep
  static constexpr int kSharedBytes =
      kAlign + kQueryBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= 97 * 1024);
  // Query fragments stay in registers where those have room, else they are read
  // for every tile.
  static constexpr bool kQueryInRegisters =
      kHeadDim == 64 || (kHeadDim == 128 && kRowTiles == 1);
  // Blocks that a multiprocessor should hold, which bounds registers.
  static constexpr int kMinBlocks = kHeadDim == 64 && kRowTiles == 1 ? 3 : 2;
};

#if XLA_OPS_HAS_MMA

// As CopyTokens (attention_mma_tile.cuh) with eight lanes a token, each for
// every eighth chunk of it: as many lines of memory at a time, and an eighth to
// a half of the addresses. Worth it where the tile's tokens all exist, as in
// prefill they mostly do.
template <int kColumns, int kTokens>
__device__ __forceinline__ void CopyTokenLines(const uint8_t* cache,
                                               uint32_t tile, int first_row,
                                               int64_t offset, int row_bytes) {
  constexpr int kChunks = kColumns / kChunk;
  constexpr int kLanes = kChunks < 8 ? kChunks : 8;  // for one token
  constexpr int kRows = 32 / kLanes;                 // tokens at a time
  static_assert(kTokens % kRows == 0);
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kLanes;
  const bool whole =
      __all_sync(kFullWarp, offset >= 0) && row_bytes == kChunks * 16;
  const auto copy = [&](auto copy_chunk) {
#pragma unroll
    for (int i = 0; i < kTokens; i += kRows) {
      const int row = i + lane / kLanes;
      const int64_t start = __shfl_sync(kFullWarp, offset, row);
      const uint8_t* source = cache + start + chunk * 16;
#pragma unroll
      for (int j = 0; j < kChunks; j += kLanes) {
        copy_chunk(TileAddress<kColumns>(tile, first_row + row, chunk + j),
                   source + j * 16, start >= 0 && (chunk + j) * 16 < row_bytes);
      }
    }
  };
  if (whole) {
    copy([](uint32_t target, const uint8_t* source, bool) {
      CopyAsync(target, source);
    });
  } else {
    copy([&](uint32_t target, const uint8_t* source, bool valid) {
      CopyAsync(target, valid ? source : cache, valid);
    });
  }
}

// Which of a tile's tokens exist, from the warps that load kTokens each.
template <int kWarps, int kTokens>
struct TokenBits {
  static constexpr uint32_t kMask = (uint32_t{1} << kTokens) - 1;
  // Bits of no token are set.
  alignas(8) uint16_t bits[kWarps];

  __device__ __forceinline__ void Set(int warp, uint32_t exist) {
    bits[warp] = static_cast<uint16_t>(exist | ~kMask);
  }
  __device__ __forceinline__ bool All() const {
    uint64_t all = ~uint64_t{0};
#pragma unroll
    for (int i = 0; i < kWarps / 4; ++i) {
      all &= reinterpret_cast<const uint64_t*>(bits)[i];
    }
    return all == ~uint64_t{0};
  }
  __device__ __forceinline__ uint64_t Get() const {
    uint64_t all = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      all |= uint64_t{bits[i] & kMask} << (i * kTokens);
    }
    return all;
  }
};

// Walks over chunks and rows of a tile of kColumns 16-bit columns that is
// aligned to a row: `lane` is the address of a row and of chunk 0 or 1 there,
// `chunk` an even number of chunks to move (any, from chunk 0) and `rows` a
// multiple of eight. One instruction, or none.
template <int kColumns>
__device__ __forceinline__ uint32_t TileStep(uint32_t lane, int chunk,
                                             int rows) {
  return (lane ^ (chunk * 16)) + rows * kColumns * 2;
}

// The query operand of a warp's kRowTiles times 16 rows: held in registers, or
// read as it is needed.
template <int kHeadDim, bool kInRegisters, int kRowTiles>
struct QueryRows {
  uint32_t lane;
  uint32_t fragments[kInRegisters ? kHeadDim / 16 : 1][kRowTiles][4];

  __device__ __forceinline__ QueryRows(uint32_t tile, int row)
      : lane(TileAddress<kHeadDim>(tile, row + threadIdx.x % 16,
                                   threadIdx.x % 32 / 16)) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) Load(k, fragments[k]);
    }
  }

  __device__ __forceinline__ void Load(int k,
                                       uint32_t (&a)[kRowTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      LoadMatrices(TileStep<kHeadDim>(lane, 2 * k, 16 * m), a[m]);
    }
  }

  // Calls multiply(k, a) for each k, with a's loading one k ahead.
  template <typename F>
  __device__ __forceinline__ void ForEach(F&& multiply) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        multiply(k, fragments[k], [] {});
      }
    } else {
      uint32_t a[2][kRowTiles][4];
      Load(0, a[0]);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        multiply(k, a[k % 2], [&] {
          if (k + 1 < kHeadDim / 16) Load(k + 1, a[(k + 1) % 2]);
        });
      }
    }
  }
};

// scores = Q K^T for the warp's rows and a tile of kTokens tokens.
template <typename T, int kHeadDim, int kTokens, int kRowTiles, typename Query>
__device__ __forceinline__ void MultiplyKeyTile(
    const Query& query, uint32_t key_tile,
    float (&scores)[kRowTiles][kTokens / 8][4]) {
  constexpr int kTokenSteps = kTokens / 16;
  constexpr int kSteps = kHeadDim / 16 * kTokenSteps;
  constexpr int kAhead = 1;
  const int lane = threadIdx.x % 32;
  // Matrices 0, 1: tokens 0-7, lower and upper 8 columns; 2, 3: tokens 8-15.
  const uint32_t first =
      TileAddress<kHeadDim>(key_tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t b[kAhead + 1][4];
  const auto load = [&](int step) {
    if (step >= kSteps) return;
    LoadMatrices(TileStep<kHeadDim>(first, step / kTokenSteps * 2,
                                    step % kTokenSteps * 16),
                 b[step % (kAhead + 1)]);
  };
#pragma unroll
  for (int step = 0; step < kAhead; ++step) load(step);
  query.ForEach(
      [&](int k, const uint32_t (&a)[kRowTiles][4], auto&& load_next) {
#pragma unroll
        for (int n = 0; n < kTokenSteps; ++n) {
          const int step = k * kTokenSteps + n;
          load(step + kAhead);
          if (n == kTokenSteps / 2 - 1) load_next();
          const uint32_t (&now)[4] = b[step % (kAhead + 1)];
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            Mma<T>(a[m], now[0], now[1], scores[m][2 * n]);
            Mma<T>(a[m], now[2], now[3], scores[m][2 * n + 1]);
          }
        }
      });
}

// The same for 8-bit keys.
template <__nv_fp8_interpretation_t kFormat, int kHeadDim, int kTokens,
          int kRowTiles, typename Query>
__device__ __forceinline__ void MultiplyKeyTileFp8(
    const Query& query, uint32_t key_tile,
    float (&scores)[kRowTiles][kTokens / 8][4]) {
  static_assert(kTokens % 32 == 0);
  constexpr int kTokenSteps = kTokens / 32;
  constexpr int kSteps = kHeadDim / 16 * kTokenSteps;
  const int lane = threadIdx.x % 32;
  const uint32_t first = TileAddress<kHeadDim / 2>(key_tile, lane, 0);
  uint32_t words[2][4];
  // Matrix i: tokens 8 i .. 8 i + 7, sixteen columns.
  const auto load = [&](int step) {
    if (step >= kSteps) return;
    LoadMatrices(TileStep<kHeadDim / 2>(first, step / kTokenSteps,
                                        step % kTokenSteps * 32),
                 words[step % 2]);
  };
  load(0);
  query.ForEach([&](int k, const uint32_t (&a)[kRowTiles][4],
                    auto&& load_next) {
#pragma unroll
    for (int n = 0; n < kTokenSteps; ++n) {
      const int step = k * kTokenSteps + n;
      load(step + 1);
      if (n == 0) load_next();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = HalvesFromFp8<kFormat, 0, 1>(words[step % 2][i]);
        const uint32_t high = HalvesFromFp8<kFormat, 2, 3>(words[step % 2][i]);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          Mma<__half>(a[m], low, high, scores[m][4 * n + i]);
        }
      }
    }
  });
}

// UpdateSoftmax with maxima that lag behind (kMaxLag). After the first tiles
// they seldom follow, and false says for the whole warp that `rescale` is 1.
template <int kSize>
__device__ __forceinline__ bool UpdateSoftmaxLazily(float factor,
                                                    float (&scores)[kSize],
                                                    float (&max)[2],
                                                    float (&sum)[2],
                                                    float (&rescale)[2]) {
  float top[2];
  bool follow[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    top[row] = RowMax(row, max[row], scores);
    // Not where both are -inf.
    follow[row] = (top[row] - max[row]) * factor > kMaxLag;
  }
  const bool any = __any_sync(kFullWarp, follow[0] || follow[1]);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float new_max = follow[row] ? top[row] : max[row];
    rescale[row] = follow[row]
                       ? Exp2(max[row] * factor - FiniteMax(new_max) * factor)
                       : 1.0f;
    max[row] = new_max;
    WeighRow(row, factor, max[row], rescale[row], sum[row], scores);
  }
  return any;
}

// Rounds weights to T, as the products below take them.
template <typename T, int kCount>
__device__ __forceinline__ void PackAll(const float (&weights)[2 * kCount][4],
                                        uint32_t (&packed)[kCount][4]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) PackWeights<T>(Flat(weights), k, packed[k]);
}

// out += weights V for the warp's rows and a tile of kTokens tokens.
template <typename T, int kHeadDim, int kTokens, int kRowTiles>
__device__ __forceinline__ void MultiplyValueTile(
    const uint32_t (&weights)[kRowTiles][kTokens / 16][4], uint32_t value_tile,
    MmaAccumulator<kHeadDim> (&acc)[kRowTiles]) {
  constexpr int kColumnSteps = kHeadDim / 16;
  constexpr int kSteps = kTokens / 16 * kColumnSteps;
  constexpr int kAhead = 1;
  const int lane = threadIdx.x % 32;
  const uint32_t first =
      TileAddress<kHeadDim>(value_tile, lane % 16, lane / 16);
  uint32_t b[kAhead + 1][4];
  const auto load = [&](int step) {
    if (step >= kSteps) return;
    LoadMatricesTransposed(TileStep<kHeadDim>(first, step % kColumnSteps * 2,
                                              step / kColumnSteps * 16),
                           b[step % (kAhead + 1)]);
  };
#pragma unroll
  for (int step = 0; step < kAhead; ++step) load(step);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load(step + kAhead);
    const int k = step / kColumnSteps;
    const int n = step % kColumnSteps;
    const uint32_t (&now)[4] = b[step % (kAhead + 1)];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      Mma<T>(weights[m][k], now[0], now[1], acc[m].out[2 * n]);
      Mma<T>(weights[m][k], now[2], now[3], acc[m].out[2 * n + 1]);
    }
  }
}

// The same for 8-bit values.
template <__nv_fp8_interpretation_t kFormat, int kHeadDim, int kTokens,
          int kRowTiles>
__device__ __forceinline__ void MultiplyValueTileFp8(
    const uint32_t (&weights)[kRowTiles][kTokens / 16][4], uint32_t value_tile,
    MmaAccumulator<kHeadDim> (&acc)[kRowTiles]) {
  constexpr int kColumnSteps = kHeadDim / 32;
  constexpr int kSteps = kTokens / 16 * kColumnSteps;
  const int lane = threadIdx.x % 32;
  const uint32_t first =
      TileAddress<kHeadDim / 2>(value_tile, lane % 16, lane / 16);
  // Words 0 and 1: tokens 2 t, 2 t + 1 and 2 t + 8, 2 t + 9, columns 2 g and
  // 2 g + 1 of sixteen; 2 and 3: of the next sixteen.
  uint32_t words[2][4];
  const auto load = [&](int step) {
    if (step >= kSteps) return;
    LoadMatricesTransposed(
        TileStep<kHeadDim / 2>(first, step % kColumnSteps * 2,
                               step / kColumnSteps * 16),
        words[step % 2]);
  };
  load(0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load(step + 1);
    const int k = step / kColumnSteps;
    const int n = step % kColumnSteps;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t lower = words[step % 2][2 * i];
      const uint32_t upper = words[step % 2][2 * i + 1];
      const uint32_t even[2] = {HalvesFromFp8<kFormat, 0, 2>(lower),
                                HalvesFromFp8<kFormat, 0, 2>(upper)};
      const uint32_t odd[2] = {HalvesFromFp8<kFormat, 1, 3>(lower),
                               HalvesFromFp8<kFormat, 1, 3>(upper)};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Mma<__half>(weights[m][k], even[0], even[1], acc[m].out[4 * n + 2 * i]);
        Mma<__half>(weights[m][k], odd[0], odd[1],
                    acc[m].out[4 * n + 2 * i + 1]);
      }
    }
  }
}

#endif  // XLA_OPS_HAS_MMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_MMA_PREFILL_TILE_CUH_
