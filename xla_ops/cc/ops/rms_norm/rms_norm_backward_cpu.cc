// CPU kernel and handlers of rms_norm_backward: two passes over a row (both
// sums, then dx), parts spread over XLA's threads. A part has neighbouring
// rows, added up in order, so threads do not change a bit.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/row_math.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward_checks.h"

namespace xla_ops {
namespace {

// sum(grad * weight * row), as SumOfSquares (row_math.h) adds up.
template <typename T>
float SumOfProducts(const T* grad, const T* row, const T* weight,
                    int64_t size) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += ToFloat(grad[i + lane]) * ToFloat(weight[i + lane]) *
                     ToFloat(row[i + lane]);
    }
  }
  for (int lane = 0; i < size; ++i, ++lane) {
    lanes[lane] += ToFloat(grad[i]) * ToFloat(weight[i]) * ToFloat(row[i]);
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// `part`: to which the row's share in the weight's gradient is added, or null.
template <typename T>
void Row(const RmsNormBackwardParams& params, int64_t token, float* part) {
  const int64_t size = params.hidden_size;
  const int64_t start = token * size;
  const T* grad = static_cast<const T*>(params.grad) + start;
  const T* row = static_cast<const T*>(params.input) + start;
  const T* weight = static_cast<const T*>(params.weight);
  const T* added = static_cast<const T*>(params.added);
  T* dx = static_cast<T*>(params.dx) + start;
  const float scale = RmsNormScale(
      size, params.eps, [row](int64_t i) { return ToFloat(row[i]); });
  // In this order no square overflows that the result does not need.
  const float back = SumOfProducts(grad, row, weight, size) * scale /
                     static_cast<float>(size) * scale;
  for (int64_t i = 0; i < size; ++i) {
    const float g = ToFloat(grad[i]);
    const float x = ToFloat(row[i]);
    float d = scale * (g * ToFloat(weight[i]) - x * back);
    if (added != nullptr) d += ToFloat(added[start + i]);
    if (part != nullptr) part[i] += g * (x * scale);
    dx[i] = FromFloat<T>(d);
  }
}

void RmsNormBackward(const RmsNormBackwardParams& params,
                     ffi::ThreadPool& pool) {
  const int64_t size = params.hidden_size;
  if (size == 0) return;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    if (params.parts == nullptr) {
      ParallelFor(pool, params.num_tokens, size, [&](int64_t token) {
        Row<T>(params, token, /*part=*/nullptr);
      });
      return;
    }
    const int64_t rows =
        params.num_parts == 0
            ? 0
            : (params.num_tokens + params.num_parts - 1) / params.num_parts;
    ParallelFor(pool, params.num_parts, rows * size, [&](int64_t p) {
      float* part = params.parts + p * size;
      std::fill(part, part + size, 0.0f);
      const int64_t end = std::min(params.num_tokens, (p + 1) * rows);
      for (int64_t token = p * rows; token < end; ++token) {
        Row<T>(params, token, part);
      }
    });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(rms_norm_backward, RmsNormBackwardBinding(),
                    MakeRmsNormBackwardParams, RmsNormBackward);
XLA_OPS_CPU_HANDLER(rms_norm_backward_input, RmsNormBackwardInputBinding(),
                    MakeRmsNormBackwardInputParams, RmsNormBackward);

}  // namespace xla_ops
