// CPU kernel and handler of xla_ops.rms_norm: one row at a time, two passes
// over it (sum of squares, then scale), rows spread over XLA's threads.

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/row_math.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_checks.h"

namespace xla_ops {
namespace {

// `row`, `weight`, `out`: [size]; `out` may be `row`.
template <typename T>
void RmsNormRow(const T* row, const T* weight, int64_t size, float eps,
                T* out) {
  const float scale =
      RmsNormScale(size, eps, [row](int64_t i) { return ToFloat(row[i]); });
  for (int64_t i = 0; i < size; ++i) {
    const T normed = FromFloat<T>(ToFloat(row[i]) * scale);
    out[i] = FromFloat<T>(ToFloat(normed) * ToFloat(weight[i]));
  }
}

void RmsNorm(const RmsNormParams& params, ffi::ThreadPool& pool) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const int64_t size = params.hidden_size;
    ParallelFor(pool, params.num_tokens, size, [&](int64_t token) {
      RmsNormRow(static_cast<const T*>(params.input) + token * size,
                 static_cast<const T*>(params.weight), size, params.eps,
                 static_cast<T*>(params.out) + token * size);
    });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(rms_norm, RmsNormBinding(), MakeRmsNormParams, RmsNorm);

}  // namespace xla_ops
