// CPU handler of xla_ops.linear.
//
// A piece of work is a tile of kLinearTileColumns columns of out, for all
// rows. Pieces are spread over XLA's threads, which so read the weight once
// between them; a product's order of additions depends on neither them nor the
// other rows.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/grouped_matmul/linear.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_checks.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_tile.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_tile_simd.h"

namespace xla_ops {
namespace {

// Rows of a tile, whose sums a worker keeps on its stack.
constexpr int64_t kTileRows = 64;

// What every processor of this build has.
struct Sse {
  using Vector = __m128;
  static constexpr int kLanes = 4;
  static constexpr int kMaxRows = 4;
  static constexpr int Columns(int rows) {
    return rows == 1 ? 8 : rows == 2 ? 4 : 2;
  }

  static Vector Load(const float* from) { return _mm_loadu_ps(from); }
  template <typename T>
  static Vector Load(const T* from) {
    return _mm_setr_ps(ToFloat(from[0]), ToFloat(from[1]), ToFloat(from[2]),
                       ToFloat(from[3]));
  }
  static Vector Zero() { return _mm_setzero_ps(); }
  static Vector MultiplyAdd(Vector a, Vector b, Vector c) {
    return _mm_add_ps(_mm_mul_ps(a, b), c);
  }
  static float Sum(Vector v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
  }
};

// Columns [first, first + columns) of out.
template <typename T>
void WriteTile(const LinearParams& params, LinearTileKernel kernel,
               const float* input, int64_t first, int64_t columns) {
  float sums[kTileRows * kLinearTileColumns];
  LinearTile tile = {};
  tile.dtype = params.dtype;
  tile.columns = columns;
  tile.depth = params.depth;
  tile.weight = static_cast<const T*>(params.weight) + first * params.depth;
  tile.sums = sums;
  const T* bias = static_cast<const T*>(params.bias);
  for (int64_t row = 0; row < params.num_rows; row += kTileRows) {
    tile.rows = std::min(kTileRows, params.num_rows - row);
    tile.input = input + row * params.depth;
    kernel(tile);
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* from = sums + r * kLinearTileColumns;
      if (bias != nullptr) {
        for (int64_t c = 0; c < columns; ++c)
          from[c] += ToFloat(bias[first + c]);
      }
      T* out =
          static_cast<T*>(params.out) + (row + r) * params.num_columns + first;
      for (int64_t c = 0; c < columns; ++c) out[c] = FromFloat<T>(from[c]);
    }
  }
}

template <typename T>
ffi::Error Multiply(const LinearParams& params, ffi::ThreadPool& pool) {
  const int64_t depth = params.depth;
  const float* input = static_cast<const float*>(params.input);
  std::unique_ptr<float[]> widened;
  if constexpr (sizeof(T) < sizeof(float)) {
    const int64_t size = SaturatingProduct(params.num_rows, depth);
    widened.reset(new (std::nothrow) float[size]);
    if (widened == nullptr) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        "linear: out of host memory");
    }
    ParallelFor(pool, params.num_rows, depth, [&](int64_t row) {
      const T* from = static_cast<const T*>(params.input) + row * depth;
      float* to = widened.get() + row * depth;
      for (int64_t k = 0; k < depth; ++k) to[k] = ToFloat(from[k]);
    });
    input = widened.get();
  }
  const LinearTileKernel kernel = BestLinearTileKernel();
  const int64_t tiles =
      (params.num_columns + kLinearTileColumns - 1) / kLinearTileColumns;
  const int64_t cost =
      (params.num_rows + 1) * kLinearTileColumns * (depth / 16 + 1);
  ParallelFor(pool, tiles, cost, [&](int64_t i) {
    const int64_t first = i * kLinearTileColumns;
    WriteTile<T>(params, kernel, input, first,
                 std::min(kLinearTileColumns, params.num_columns - first));
  });
  return ffi::Error::Success();
}

ffi::Error Linear(const LinearParams& params, ffi::ThreadPool& pool) {
  if (params.num_rows == 0 || params.num_columns == 0) {
    return ffi::Error::Success();
  }
  return DispatchFloat(params.dtype, [&](auto dtype) {
    return Multiply<CpuType<dtype.value>>(params, pool);
  });
}

}  // namespace

void MultiplyTileSse(const LinearTile& tile) { MultiplyTile<Sse>(tile); }

bool CanRun(LinearTileKernel kernel) {
  if (kernel == MultiplyTileAvx512) return __builtin_cpu_supports("avx512f");
  if (kernel == MultiplyTileAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
  return true;
}

LinearTileKernel BestLinearTileKernel() {
  static const LinearTileKernel best = [] {
    if (CanRun(MultiplyTileAvx512)) return MultiplyTileAvx512;
    return CanRun(MultiplyTileAvx2) ? MultiplyTileAvx2 : MultiplyTileSse;
  }();
  return best;
}

XLA_OPS_CPU_HANDLER(linear, LinearBinding(), MakeLinearParams, Linear);

}  // namespace xla_ops
