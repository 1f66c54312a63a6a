// CPU kernel and handler of xla_ops.grouped_matmul_backward_weight.
//
// A piece of work is a tile of kTileColumns by kTileDepth elements of a group's
// matrix: kTileRows rows of the group at a time are widened to fp32 once, their
// products are added up in registers, and those sums in the first-level cache.
// Pieces are spread over XLA's threads.

#include <algorithm>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight_checks.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_rows.h"

namespace xla_ops {
namespace {

constexpr int64_t kTileColumns = 32;  // of grad
constexpr int64_t kTileDepth = 64;    // of input
constexpr int64_t kTileRows = 32;

// One worker's memory, on its stack.
struct Scratch {
  float grad[kTileRows * kTileColumns];
  float input[kTileRows * kTileDepth];
  float sums[kTileColumns * kTileDepth];
};

// Adds the products of kColumns columns of `grad` and kDepth of `input` over
// `rows` rows to `sums`, kTileDepth a column.
template <int kColumns, int kDepth>
void Multiply(const Rows& grad, int64_t column, const Rows& input, int64_t at,
              int64_t rows, float* sums) {
  float products[kColumns][kDepth] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const float* g = grad[row] + column;
    const float* x = input[row] + at;
    for (int c = 0; c < kColumns; ++c) {
      for (int k = 0; k < kDepth; ++k) products[c][k] += g[c] * x[k];
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    float* sum = sums + (column + c) * kTileDepth + at;
    for (int k = 0; k < kDepth; ++k) sum[k] += products[c][k];
  }
}

template <int kColumns>
void MultiplyColumns(const Rows& grad, int64_t column, const Rows& input,
                     int64_t depth, int64_t rows, float* sums) {
  int64_t at = 0;
  for (; at + 8 <= depth; at += 8) {
    Multiply<kColumns, 8>(grad, column, input, at, rows, sums);
  }
  for (; at < depth; ++at) {
    Multiply<kColumns, 1>(grad, column, input, at, rows, sums);
  }
}

// Columns [first, first + columns) by depths [at, at + depth) of the matrix of
// group `group`, whose rows are [begin, end).
template <typename T>
void MultiplyTile(const GroupedMatmulBackwardWeightParams& params,
                  int64_t group, int64_t begin, int64_t end, int64_t first,
                  int64_t columns, int64_t at, int64_t depth) {
  const T* grad = static_cast<const T*>(params.grad);
  const T* input = static_cast<const T*>(params.input);
  Scratch scratch;
  std::fill_n(scratch.sums, columns * kTileDepth, 0.0f);
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - row);
    const Rows g =
        Widen<kTileColumns>(grad + row * params.num_columns, rows,
                            params.num_columns, first, columns, scratch.grad);
    const Rows x = Widen<kTileDepth>(input + row * params.depth, rows,
                                     params.depth, at, depth, scratch.input);
    int64_t column = 0;
    for (; column + 4 <= columns; column += 4) {
      MultiplyColumns<4>(g, column, x, depth, rows, scratch.sums);
    }
    for (; column < columns; ++column) {
      MultiplyColumns<1>(g, column, x, depth, rows, scratch.sums);
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    const float* sums = scratch.sums + c * kTileDepth;
    T* out = static_cast<T*>(params.dweight) +
             (group * params.num_columns + first + c) * params.depth + at;
    for (int64_t k = 0; k < depth; ++k) out[k] = FromFloat<T>(sums[k]);
  }
}

ffi::Error GroupedMatmulBackwardWeight(
    const GroupedMatmulBackwardWeightParams& params, ffi::ThreadPool& pool) {
  const int64_t groups = params.num_groups;
  const std::unique_ptr<int64_t[]> offsets =
      AscendingOffsets(params.group_offsets, groups, params.num_rows);
  if (offsets == nullptr) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "grouped_matmul_backward_weight: out of host memory");
  }
  const int64_t column_tiles =
      (params.num_columns + kTileColumns - 1) / kTileColumns;
  const int64_t depth_tiles = (params.depth + kTileDepth - 1) / kTileDepth;
  const int64_t tiles = column_tiles * depth_tiles;
  const int64_t average =
      (offsets[groups] - offsets[0]) / std::max<int64_t>(1, groups) + 1;
  const int64_t cost = average * kTileColumns * kTileDepth / 4;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelFor(pool, groups * tiles, cost, [&](int64_t piece) {
      const int64_t group = piece / tiles;
      const int64_t first = piece % tiles / depth_tiles * kTileColumns;
      const int64_t at = piece % depth_tiles * kTileDepth;
      MultiplyTile<T>(params, group, offsets[group], offsets[group + 1], first,
                      std::min(kTileColumns, params.num_columns - first), at,
                      std::min(kTileDepth, params.depth - at));
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_OPS_CPU_HANDLER(grouped_matmul_backward_weight,
                    GroupedMatmulBackwardWeightBinding(),
                    MakeGroupedMatmulBackwardWeightParams,
                    GroupedMatmulBackwardWeight);

}  // namespace xla_ops
