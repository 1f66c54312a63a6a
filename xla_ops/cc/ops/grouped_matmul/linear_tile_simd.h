// The body of linear's CPU kernels, for a set of vector instructions:
//
//   Vector, kLanes                a vector of fp32
//   Load(T*)                      kLanes elements, widened to fp32
//   Zero(), MultiplyAdd(a, b, c)  a b + c
//   Sum(vector)                   of its lanes
//   kMaxRows, Columns(rows)       rows and columns that its registers hold
//
// A file that is compiled for other instructions than the rest of the project
// includes this behind its #pragma GCC target, which then holds for the code
// below; for the same reason it calls nothing of other headers.
//
// The depth is the vectors' direction, as it is in memory; sums stay in
// registers over all of it. A weight is read from memory once, with its first
// rows, and from the first or second-level cache with the others.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_TILE_SIMD_H_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_TILE_SIMD_H_

#include <cstdint>

#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_tile.h"

namespace xla_ops {
namespace {

// The last elements, fewer than a vector, behind which are zeros.
template <typename Simd, typename T>
__attribute__((noinline)) typename Simd::Vector LoadPart(const T* from,
                                                         int64_t size) {
  T padded[Simd::kLanes] = {};
  for (int64_t i = 0; i < size; ++i) padded[i] = from[i];
  return Simd::Load(padded);
}

// sums of kRows rows and kColumns columns.
template <typename Simd, typename T, int kRows, int kColumns>
void MultiplyBlock(const float* input, const T* weight, int64_t depth,
                   float* sums) {
  using Vector = typename Simd::Vector;
  Vector lanes[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) lanes[r][c] = Simd::Zero();
  }
  int64_t k = 0;
  for (; k + Simd::kLanes <= depth; k += Simd::kLanes) {
    Vector w[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      w[c] = Simd::Load(weight + c * depth + k);
      // Of the block that comes next: rows are too short for the processor to
      // see where they lead.
      __builtin_prefetch(weight + (kColumns + c) * depth + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vector x = Simd::Load(input + r * depth + k);
      // In a register: each product would load it again.
      asm("" : "+v"(x));
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        lanes[r][c] = Simd::MultiplyAdd(x, w[c], lanes[r][c]);
      }
    }
  }
  if (k < depth) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector x = LoadPart<Simd>(input + r * depth + k, depth - k);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const Vector w = LoadPart<Simd>(weight + c * depth + k, depth - k);
        lanes[r][c] = Simd::MultiplyAdd(x, w, lanes[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      sums[r * kLinearTileColumns + c] = Simd::Sum(lanes[r][c]);
    }
  }
}

template <typename Simd, typename T, int kRows>
void MultiplyRows(const LinearTile& tile, int64_t row) {
  constexpr int kColumns = Simd::Columns(kRows);
  static_assert(kLinearTileColumns % kColumns == 0);
  const float* input = tile.input + row * tile.depth;
  const T* weight = static_cast<const T*>(tile.weight);
  float* sums = tile.sums + row * kLinearTileColumns;
  int64_t c = 0;
  for (; c + kColumns <= tile.columns; c += kColumns) {
    MultiplyBlock<Simd, T, kRows, kColumns>(input, weight + c * tile.depth,
                                            tile.depth, sums + c);
  }
  for (; c < tile.columns; ++c) {
    MultiplyBlock<Simd, T, kRows, 1>(input, weight + c * tile.depth, tile.depth,
                                     sums + c);
  }
}

// `rows` of kMaxRows or fewer.
template <typename Simd, typename T, int kRows = Simd::kMaxRows>
void MultiplyRowsOf(const LinearTile& tile, int64_t row, int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      MultiplyRowsOf<Simd, T, kRows - 1>(tile, row, rows);
      return;
    }
  }
  MultiplyRows<Simd, T, kRows>(tile, row);
}

template <typename Simd, typename T>
void MultiplyTile(const LinearTile& tile) {
  // Groups of rows as equal as can be.
  const int64_t groups = (tile.rows + Simd::kMaxRows - 1) / Simd::kMaxRows;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t begin = tile.rows * i / groups;
    const int64_t end = tile.rows * (i + 1) / groups;
    MultiplyRowsOf<Simd, T>(tile, begin, end - begin);
  }
}

template <typename Simd>
void MultiplyTile(const LinearTile& tile) {
  switch (tile.dtype) {
    case DType::kF16:
      return MultiplyTile<Simd, Half>(tile);
    case DType::kBF16:
      return MultiplyTile<Simd, BFloat16>(tile);
    default:
      return MultiplyTile<Simd, float>(tile);
  }
}

}  // namespace
}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_LINEAR_TILE_SIMD_H_
