// CPU kernel and handler of mine.scale_rows: rows, spread over XLA's threads.

#include <cstdint>

#include "scale_rows.h"
#include "scale_rows_checks.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"

namespace mine {
namespace {

// `input`, `out`: [columns]; `out` may be `input`.
template <typename T>
void ScaleRow(const T* input, int64_t columns, float scale, T* out) {
  for (int64_t i = 0; i < columns; ++i) {
    out[i] = xla_ops::FromFloat<T>(xla_ops::ToFloat(input[i]) * scale);
  }
}

void ScaleRows(const ScaleRowsParams& params, ffi::ThreadPool& pool) {
  xla_ops::DispatchFloat(params.dtype, [&](auto dtype) {
    using T = xla_ops::CpuType<dtype.value>;
    const int64_t columns = params.num_columns;
    xla_ops::ParallelFor(pool, params.num_rows, columns, [&](int64_t row) {
      ScaleRow(static_cast<const T*>(params.input) + row * columns, columns,
               params.scale[row], static_cast<T*>(params.out) + row * columns);
    });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(scale_rows, ScaleRowsBinding(), MakeScaleRowsParams,
                    ScaleRows);

}  // namespace mine
