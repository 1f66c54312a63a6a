// CPU kernels and handlers of int8_quant: rows spread over XLA's threads.

#include <cmath>
#include <cstdint>
#include <limits>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/quant.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant_checks.h"

namespace xla_ops {
namespace {

// Calls body(token, row, out_row) for each token.
template <typename Body>
void ForEachRow(const Int8QuantParams& params, ffi::ThreadPool& pool,
                const Body& body) {
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const int64_t size = params.hidden_size;
    ParallelFor(pool, params.num_tokens, size, [&](int64_t token) {
      body(token, static_cast<const T*>(params.input) + token * size,
           static_cast<int8_t*>(params.out) + token * size);
    });
  });
}

// `row` and `out`: [size], here and below.
template <typename T>
void WithZeroPoint(const T* row, int64_t size, float scale, int32_t azp,
                   int8_t* out) {
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < size; ++i) {
    out[i] = AddZeroPoint(ToInt32(ToFloat(row[i]) * inverse), azp);
  }
}

// Returns the scale.
template <typename T>
float Symmetric(const T* row, int64_t size, int8_t* out) {
  const float abs_max =
      AbsMax(size, [row](int64_t i) { return ToFloat(row[i]); });
  const float inverse = abs_max == 0.0f ? 0.0f : 127.0f / abs_max;
  for (int64_t i = 0; i < size; ++i) {
    out[i] = ToInt8(ToFloat(row[i]) * inverse);
  }
  return abs_max / 127.0f;
}

template <typename T>
void Asymmetric(const T* row, int64_t size, int8_t* out, float* scale,
                int32_t* azp) {
  float max = -std::numeric_limits<float>::infinity();
  float min = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < size; ++i) {
    const float x = ToFloat(row[i]);  // NaN loses both comparisons
    max = x > max ? x : max;
    min = x < min ? x : min;
  }
  const float step = max < min ? 0.0f : (max - min) / 255.0f;
  if (!(step > 0.0f)) {
    *scale = Symmetric(row, size, out);
    *azp = 0;
    return;
  }
  *scale = step;
  *azp = ToInt32(-128.0f - min / step);
  WithZeroPoint(row, size, step, *azp, out);
}

void StaticInt8Quant(const Int8QuantParams& params, ffi::ThreadPool& pool) {
  const float divisor = *params.scale;
  ForEachRow(params, pool, [&](int64_t, const auto* row, int8_t* out) {
    if (params.azp != nullptr) {
      WithZeroPoint(row, params.hidden_size, divisor, *params.azp, out);
      return;
    }
    for (int64_t i = 0; i < params.hidden_size; ++i) {
      out[i] = ToInt8(ToFloat(row[i]) / divisor);
    }
  });
}

void DynamicInt8Quant(const Int8QuantParams& params, ffi::ThreadPool& pool) {
  ForEachRow(params, pool, [&](int64_t token, const auto* row, int8_t* out) {
    params.scale_out[token] = Symmetric(row, params.hidden_size, out);
  });
}

void DynamicInt8AzpQuant(const Int8QuantParams& params, ffi::ThreadPool& pool) {
  ForEachRow(params, pool, [&](int64_t token, const auto* row, int8_t* out) {
    Asymmetric(row, params.hidden_size, out, &params.scale_out[token],
               &params.azp_out[token]);
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(static_scaled_int8_quant, StaticInt8QuantBinding(),
                    MakeStaticInt8QuantParams, StaticInt8Quant);
XLA_OPS_CPU_HANDLER(dynamic_scaled_int8_quant, DynamicInt8QuantBinding(),
                    MakeDynamicInt8QuantParams, DynamicInt8Quant);
XLA_OPS_CPU_HANDLER(dynamic_scaled_int8_azp_quant, DynamicInt8AzpQuantBinding(),
                    MakeDynamicInt8AzpQuantParams, DynamicInt8AzpQuant);

}  // namespace xla_ops
