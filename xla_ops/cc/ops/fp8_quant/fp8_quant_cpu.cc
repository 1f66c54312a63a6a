// CPU kernels and handlers of fp8_quant: rows spread over XLA's threads.

#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/quant.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant_checks.h"

namespace xla_ops {
namespace {

// Calls body(worker, token, row, out_row) for each token.
template <typename Body>
void ForEachRow(const Fp8QuantParams& params, ffi::ThreadPool& pool,
                const Body& body) {
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const int64_t size = params.hidden_size;
    ParallelForWithWorker(
        pool, params.num_tokens, size, [&](int worker, int64_t token) {
          body(worker, token,
               static_cast<const T*>(params.input) + token * size,
               static_cast<Float8E4M3FN*>(params.out) + token * size);
        });
  });
}

template <typename T>
float RowAbsMax(const T* row, int64_t size) {
  return AbsMax(size, [row](int64_t i) { return ToFloat(row[i]); });
}

void QuantizeAll(const Fp8QuantParams& params, float scale,
                 ffi::ThreadPool& pool) {
  const float inverse = 1.0f / scale;
  ForEachRow(params, pool,
             [&](int, int64_t, const auto* row, Float8E4M3FN* out) {
               for (int64_t i = 0; i < params.hidden_size; ++i) {
                 out[i] = ToFp8(ToFloat(row[i]) * inverse);
               }
             });
}

void StaticFp8Quant(const Fp8QuantParams& params, ffi::ThreadPool& pool) {
  QuantizeAll(params, *params.scale, pool);
}

void DynamicFp8Quant(const Fp8QuantParams& params, ffi::ThreadPool& pool) {
  std::vector<float> largest(
      NumWorkers(pool, params.num_tokens, params.hidden_size), 0.0f);
  ForEachRow(params, pool,
             [&](int worker, int64_t, const auto* row, Float8E4M3FN*) {
               const float max = RowAbsMax(row, params.hidden_size);
               if (max > largest[worker]) largest[worker] = max;
             });
  const float abs_max =
      AbsMax(largest.size(), [&](int64_t i) { return largest[i]; });
  *params.scale_out = abs_max / kFp8Max;
  QuantizeAll(params, *params.scale_out, pool);
}

void PerTokenFp8Quant(const Fp8QuantParams& params, ffi::ThreadPool& pool) {
  ForEachRow(params, pool,
             [&](int, int64_t token, const auto* row, Float8E4M3FN* out) {
               const float scale = Fp8RowScale(
                   RowAbsMax(row, params.hidden_size), params.scale_ub);
               params.scale_out[token] = scale;
               for (int64_t i = 0; i < params.hidden_size; ++i) {
                 out[i] = ToFp8(ToFloat(row[i]) / scale);
               }
             });
}

}  // namespace

XLA_OPS_CPU_HANDLER(static_scaled_fp8_quant, StaticFp8QuantBinding(),
                    MakeStaticFp8QuantParams, StaticFp8Quant);
XLA_OPS_CPU_HANDLER(dynamic_scaled_fp8_quant, DynamicFp8QuantBinding(),
                    MakeDynamicFp8QuantParams, DynamicFp8Quant);
XLA_OPS_CPU_HANDLER(dynamic_per_token_scaled_fp8_quant,
                    PerTokenFp8QuantBinding(), MakePerTokenFp8QuantParams,
                    PerTokenFp8Quant);

}  // namespace xla_ops
