// CPU kernels and handlers of fp8_quant: rows spread over XLA's threads.

#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/quant.h"
#include "xla_ops/cc/core/registry.h"
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

ffi::Error StaticCpu(ffi::AnyBuffer input, ffi::AnyBuffer scale,
                     ffi::Result<ffi::AnyBuffer> out, ffi::ThreadPool pool) {
  Fp8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeStaticFp8QuantParams(input, scale, out, &params));
  QuantizeAll(params, *params.scale, pool);
  return ffi::Error::Success();
}

ffi::Error DynamicCpu(ffi::AnyBuffer input, ffi::Result<ffi::AnyBuffer> out,
                      ffi::Result<ffi::AnyBuffer> scale,
                      ffi::ThreadPool pool) {
  Fp8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeDynamicFp8QuantParams(input, out, scale, &params));
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
  return ffi::Error::Success();
}

ffi::Error PerTokenCpu(ffi::AnyBuffer input, ffi::RemainingArgs optional,
                       ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> scale,
                       ffi::ThreadPool pool) {
  Fp8QuantParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakePerTokenFp8QuantParams(input, optional, out, scale, &params));
  ForEachRow(params, pool,
             [&](int, int64_t token, const auto* row, Float8E4M3FN* out) {
               const float scale = Fp8RowScale(
                   RowAbsMax(row, params.hidden_size), params.scale_ub);
               params.scale_out[token] = scale;
               for (int64_t i = 0; i < params.hidden_size; ++i) {
                 out[i] = ToFp8(ToFloat(row[i]) / scale);
               }
             });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_static_scaled_fp8_quant_cpu(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_dynamic_scaled_fp8_quant_cpu(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_dynamic_per_token_scaled_fp8_quant_cpu(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_static_scaled_fp8_quant_cpu, xla_ops::StaticCpu,
    xla_ops::StaticFp8QuantBinding().Ctx<xla::ffi::ThreadPool>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_dynamic_scaled_fp8_quant_cpu, xla_ops::DynamicCpu,
    xla_ops::DynamicFp8QuantBinding().Ctx<xla::ffi::ThreadPool>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_dynamic_per_token_scaled_fp8_quant_cpu, xla_ops::PerTokenCpu,
    xla_ops::PerTokenFp8QuantBinding().Ctx<xla::ffi::ThreadPool>());

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.static_scaled_fp8_quant",
     "Host",
     {nullptr, nullptr, nullptr, xla_ops_static_scaled_fp8_quant_cpu}},
    {"xla_ops.dynamic_scaled_fp8_quant",
     "Host",
     {nullptr, nullptr, nullptr, xla_ops_dynamic_scaled_fp8_quant_cpu}},
    {"xla_ops.dynamic_per_token_scaled_fp8_quant",
     "Host",
     {nullptr, nullptr, nullptr,
      xla_ops_dynamic_per_token_scaled_fp8_quant_cpu}})
