// CPU kernel and handler of xla_ops.rms_norm: one row at a time, two passes
// over it (sum of squares, then scale), rows spread over XLA's threads.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_checks.h"

namespace xla_ops {
namespace {

// Independent partial sums: they vectorise without reordering a sum that the
// source gives an order to, and round less than one running sum does.
constexpr int kLanes = 16;
// Elements that are widened to fp32 in one loop and added up in another;
// compilers vectorise the two apart but not in one.
constexpr int64_t kChunk = 256;

// `row`: [size].
template <typename T>
float SumOfSquares(const T* row, int64_t size) {
  float lanes[kLanes] = {};
  float chunk[kChunk];
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    const int64_t count = std::min(kChunk, size - begin);
    for (int64_t i = 0; i < count; ++i) chunk[i] = ToFloat(row[begin + i]);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += chunk[i + lane] * chunk[i + lane];
      }
    }
    for (int lane = 0; i < count; ++i, ++lane) {
      lanes[lane] += chunk[i] * chunk[i];
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// `row`, `weight`, `out`: [size]; `out` may be `row`.
template <typename T>
void RmsNormRow(const T* row, const T* weight, int64_t size, float eps,
                T* out) {
  const float mean = SumOfSquares(row, size) / static_cast<float>(size);
  const float scale = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < size; ++i) {
    const T normed = FromFloat<T>(ToFloat(row[i]) * scale);
    out[i] = FromFloat<T>(ToFloat(normed) * ToFloat(weight[i]));
  }
}

ffi::Error RmsNormCpu(ffi::AnyBuffer input, ffi::AnyBuffer weight,
                      ffi::Result<ffi::AnyBuffer> out, float eps,
                      ffi::ThreadPool pool) {
  RmsNormParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeRmsNormParams(input, weight, out, eps, &params));
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return ffi::Error::Success();
  }
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    const int64_t size = params.hidden_size;
    ParallelFor(pool, params.num_tokens, size, [&](int64_t token) {
      RmsNormRow(static_cast<const T*>(params.input) + token * size,
                 static_cast<const T*>(params.weight), size, params.eps,
                 static_cast<T*>(params.out) + token * size);
    });
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_rms_norm_cpu(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_rms_norm_cpu, xla_ops::RmsNormCpu,
    xla_ops::RmsNormBinding().Ctx<xla::ffi::ThreadPool>());

XLA_OPS_EXPORT_HANDLERS({"xla_ops.rms_norm",
                         "Host",
                         {nullptr, nullptr, nullptr, xla_ops_rms_norm_cpu}})
