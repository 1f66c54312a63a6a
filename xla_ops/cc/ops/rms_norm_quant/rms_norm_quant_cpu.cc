// CPU kernel and handlers of rms_norm_quant: per row a pass for the sum of
// squares, one that normalises into scratch memory and one that quantises;
// rows spread over XLA's threads.

#include <cmath>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/quant.h"
#include "xla_ops/cc/core/row_math.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant_checks.h"

namespace xla_ops {
namespace {

// Writes y of the contract to `y` and the rounded sum to residual_out.
template <typename T>
void NormalizeRow(const RmsNormQuantParams& params, int64_t token, float* y) {
  const int64_t size = params.hidden_size;
  const T* input = static_cast<const T*>(params.input) + token * size;
  const T* weight = static_cast<const T*>(params.weight);
  const bool rounds_sum = params.scale != nullptr;
  // x of the contract, before it is normalised in place.
  if (params.residual == nullptr) {
    for (int64_t i = 0; i < size; ++i) y[i] = ToFloat(input[i]);
  } else {
    const T* residual = static_cast<const T*>(params.residual) + token * size;
    T* sum = static_cast<T*>(params.residual_out) + token * size;
    for (int64_t i = 0; i < size; ++i) {
      const float exact = ToFloat(input[i]) + ToFloat(residual[i]);
      sum[i] = FromFloat<T>(exact);
      y[i] = rounds_sum ? ToFloat(sum[i]) : exact;
    }
  }
  const float s =
      RmsNormScale(size, params.eps, [y](int64_t i) { return y[i]; });
  for (int64_t i = 0; i < size; ++i) {
    const T normed = FromFloat<T>(y[i] * s);
    y[i] = ToFloat(FromFloat<T>(ToFloat(normed) * ToFloat(weight[i])));
  }
}

// `y`: [hidden_size]; `codes`: the row's place in the result.
void QuantizeRow(const RmsNormQuantParams& params, int64_t token,
                 const float* y) {
  const int64_t size = params.hidden_size;
  void* codes = static_cast<char*>(params.out) + token * size;
  auto* fp8 = static_cast<Float8E4M3FN*>(codes);
  if (params.scale != nullptr) {
    const float inverse = 1.0f / *params.scale;
    for (int64_t i = 0; i < size; ++i) fp8[i] = ToFp8(y[i] * inverse);
    return;
  }
  const float abs_max = AbsMax(size, [y](int64_t i) { return y[i]; });
  if (params.quant_dtype == DType::kF8E4M3FN) {
    const float scale = Fp8RowScale(abs_max, params.scale_ub);
    params.scale_out[token] = scale;
    for (int64_t i = 0; i < size; ++i) fp8[i] = ToFp8(y[i] / scale);
    return;
  }
  const float scale = std::fmax(abs_max / 127.0f, kMinInt8Scale);
  params.scale_out[token] = scale;
  const float inverse = 1.0f / scale;
  auto* int8 = static_cast<int8_t*>(codes);
  for (int64_t i = 0; i < size; ++i) int8[i] = ToInt8(y[i] * inverse);
}

void RmsNormQuant(const RmsNormQuantParams& params, ffi::ThreadPool& pool) {
  const int64_t size = params.hidden_size;
  std::vector<std::vector<float>> scratch(
      NumWorkers(pool, params.num_tokens, size), std::vector<float>(size));
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelForWithWorker(pool, params.num_tokens, size,
                          [&](int worker, int64_t token) {
                            float* y = scratch[worker].data();
                            NormalizeRow<T>(params, token, y);
                            QuantizeRow(params, token, y);
                          });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(rms_norm_static_fp8_quant, RmsNormStaticFp8QuantBinding(),
                    MakeRmsNormStaticFp8QuantParams, RmsNormQuant);
XLA_OPS_CPU_HANDLER(fused_add_rms_norm_static_fp8_quant,
                    FusedAddRmsNormStaticFp8QuantBinding(),
                    MakeFusedAddRmsNormStaticFp8QuantParams, RmsNormQuant);
XLA_OPS_CPU_HANDLER(rms_norm_dynamic_per_token_quant,
                    RmsNormDynamicPerTokenQuantBinding(),
                    MakeRmsNormDynamicPerTokenQuantParams, RmsNormQuant);
XLA_OPS_CPU_HANDLER(fused_add_rms_norm_dynamic_per_token_quant,
                    FusedAddRmsNormDynamicPerTokenQuantBinding(),
                    MakeFusedAddRmsNormDynamicPerTokenQuantParams,
                    RmsNormQuant);

}  // namespace xla_ops
