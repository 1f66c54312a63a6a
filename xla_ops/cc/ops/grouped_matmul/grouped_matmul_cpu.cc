// CPU kernel and handler of xla_ops.grouped_matmul.
//
// A piece of work is a tile of kTileColumns columns of out, for all rows of one
// group: kTileRows of them at a time, over kTileDepth elements of the depth at
// a time, which are widened to fp32 once and multiplied from the first-level
// cache. Pieces are spread over XLA's threads.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_checks.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_rows.h"

namespace xla_ops {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kTileColumns = 32;
constexpr int64_t kTileDepth = 128;
constexpr int kLanes = 4;  // partial sums of a dot product

// One worker's memory, on its stack.
struct Scratch {
  float input[kTileRows * kTileDepth];
  float weight[kTileColumns * kTileDepth];
  float sums[kTileRows * kTileColumns];
};

// Adds the products of kRows rows and kColumns columns to `sums`. Partial sums
// vectorise; the compiler must not reorder a single one.
template <int kRows, int kColumns>
void Multiply(const Rows& a, int64_t row, const Rows& b, int64_t column,
              int64_t size, float* sums) {
  float lanes[kRows][kColumns][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        for (int lane = 0; lane < kLanes; ++lane) {
          lanes[r][c][lane] += a[row + r][i + lane] * b[column + c][i + lane];
        }
      }
    }
  }
  for (int lane = 0; i < size; ++i, ++lane) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        lanes[r][c][lane] += a[row + r][i] * b[column + c][i];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      const float* l = lanes[r][c];
      sums[(row + r) * kTileColumns + column + c] +=
          (l[0] + l[2]) + (l[1] + l[3]);
    }
  }
}

template <int kRows>
void MultiplyRows(const Rows& a, int64_t row, const Rows& b, int64_t columns,
                  int64_t size, float* sums) {
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    Multiply<kRows, 4>(a, row, b, column, size, sums);
  }
  for (; column < columns; ++column) {
    Multiply<kRows, 1>(a, row, b, column, size, sums);
  }
}

// Rows [begin, end) of out, columns [first, first + columns), of group `group`.
template <typename T>
void MultiplyTile(const GroupedMatmulParams& params, int64_t group,
                  int64_t begin, int64_t end, int64_t first, int64_t columns) {
  const int64_t depth = params.depth;
  const T* weight = static_cast<const T*>(params.weight) +
                    (group * params.num_columns + first) * depth;
  Scratch scratch;
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - row);
    const T* input = static_cast<const T*>(params.input) + row * depth;
    std::fill_n(scratch.sums, rows * kTileColumns, 0.0f);
    for (int64_t at = 0; at < depth; at += kTileDepth) {
      const int64_t size = std::min(kTileDepth, depth - at);
      const Rows a =
          Widen<kTileDepth>(input, rows, depth, at, size, scratch.input);
      const Rows b =
          Widen<kTileDepth>(weight, columns, depth, at, size, scratch.weight);
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) {
        MultiplyRows<2>(a, r, b, columns, size, scratch.sums);
      }
      if (r < rows) MultiplyRows<1>(a, r, b, columns, size, scratch.sums);
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* out =
          static_cast<T*>(params.out) + (row + r) * params.num_columns + first;
      const float* sums = scratch.sums + r * kTileColumns;
      for (int64_t c = 0; c < columns; ++c) out[c] = FromFloat<T>(sums[c]);
    }
  }
}

ffi::Error GroupedMatmul(const GroupedMatmulParams& params,
                         ffi::ThreadPool& pool) {
  if (params.num_rows == 0 || params.num_columns == 0) {
    return ffi::Error::Success();
  }
  const int64_t groups = params.num_groups;
  const std::unique_ptr<int64_t[]> offsets =
      AscendingOffsets(params.group_offsets, groups, params.num_rows);
  if (offsets == nullptr) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "grouped_matmul: out of host memory");
  }

  const int64_t row_bytes = params.num_columns * SizeOf(params.dtype);
  char* out = static_cast<char*>(params.out);
  std::fill_n(out, offsets[0] * row_bytes, char{0});
  std::fill_n(out + offsets[groups] * row_bytes,
              (params.num_rows - offsets[groups]) * row_bytes, char{0});

  const int64_t tiles = (params.num_columns + kTileColumns - 1) / kTileColumns;
  const int64_t average =
      (offsets[groups] - offsets[0]) / std::max<int64_t>(1, groups) + 1;
  const int64_t cost = average * kTileColumns * (params.depth / kLanes + 1);
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelFor(pool, groups * tiles, cost, [&](int64_t piece) {
      const int64_t group = piece / tiles;
      const int64_t first = piece % tiles * kTileColumns;
      MultiplyTile<T>(params, group, offsets[group], offsets[group + 1], first,
                      std::min(kTileColumns, params.num_columns - first));
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_OPS_CPU_HANDLER(grouped_matmul, GroupedMatmulBinding(),
                    MakeGroupedMatmulParams, GroupedMatmul);

}  // namespace xla_ops
