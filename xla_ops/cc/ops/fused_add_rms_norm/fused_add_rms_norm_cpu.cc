// CPU kernel and handler of xla_ops.fused_add_rms_norm: per row one pass for
// the sum of squares and one that writes; rows spread over XLA's threads.

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/row_math.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm_checks.h"

namespace xla_ops {
namespace {

template <typename T>
T Add(T x, T y) {
  return FromFloat<T>(ToFloat(x) + ToFloat(y));
}

// All pointers but `weight`: a row of [size]. Each element is read before
// it is written, so that `out` may be `input`, `residual_out` `residual`.
template <typename T>
void FusedAddRmsNormRow(const T* input, const T* residual, const T* weight,
                        int64_t size, float eps, T* out, T* residual_out) {
  const float scale = RmsNormScale(size, eps, [=](int64_t i) {
    return ToFloat(Add(input[i], residual[i]));
  });
  for (int64_t i = 0; i < size; ++i) {
    const T z = Add(input[i], residual[i]);
    const T normed = FromFloat<T>(ToFloat(z) * scale);
    residual_out[i] = z;
    out[i] = FromFloat<T>(ToFloat(normed) * ToFloat(weight[i]));
  }
}

void FusedAddRmsNorm(const FusedAddRmsNormParams& params,
                     ffi::ThreadPool& pool) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const int64_t size = params.hidden_size;
    ParallelFor(pool, params.num_tokens, size, [&](int64_t token) {
      const int64_t start = token * size;
      FusedAddRmsNormRow(static_cast<const T*>(params.input) + start,
                         static_cast<const T*>(params.residual) + start,
                         static_cast<const T*>(params.weight), size, params.eps,
                         static_cast<T*>(params.out) + start,
                         static_cast<T*>(params.residual_out) + start);
    });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(fused_add_rms_norm, FusedAddRmsNormBinding(),
                    MakeFusedAddRmsNormParams, FusedAddRmsNorm);

}  // namespace xla_ops
