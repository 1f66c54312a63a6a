// RMSNorm and quantisation on CUDA. Bound by memory: a row is read once,
// where it fits in registers (device/row.cuh), and leaves as one byte an
// element.
//
// Tested by tests/ops/test_rms_norm_quant.py.

#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant.h"

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/packed.cuh"
#include "xla_ops/cc/device/quant.cuh"
#include "xla_ops/cc/device/rms.cuh"
#include "xla_ops/cc/device/row.cuh"
#include "xla_ops/cc/device/row_dispatch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant_launch.h"

namespace xla_ops {
namespace {

enum class Quant { kStaticFp8, kDynamicFp8, kDynamicInt8 };

// Rows of 8192 16-bit elements get 256 threads of four vectors: blocks of 512
// leave a multiprocessor idle while they wait for each other. But few rows,
// where one load waits for another, are done sooner by 512, and 256 have no
// registers for what a dynamic scale and a residual keep.
template <typename T, Quant kQuant, bool kResidual>
constexpr bool kAlways =
    sizeof(T) == 2 && kQuant == Quant::kStaticFp8 && !kResidual;
template <typename T, Quant kQuant, bool kResidual>
constexpr bool kByRows =
    sizeof(T) == 2 && (kQuant == Quant::kStaticFp8) == kResidual;
constexpr int64_t kManyRows = 1024;

// One set of rows; names and shapes as in RmsNormQuantParams.
template <typename T>
struct Rows {
  const T* input;
  const T* residual;
  const T* weight;
  const float* scale;
  const float* scale_ub;
  uint8_t* out;
  float* scale_out;
  T* residual_out;
  int64_t num_rows;
  int64_t row_vectors;
  ExactDiv hidden_size;
  float eps;
};

// Threads as RowThreads has them; vectors are aligned (the launcher checks).
// `residual_out` may be `residual`: it is written in the last pass, each
// element by the thread that reads it.
template <typename T, typename Plan, Quant kQuant, bool kResidual>
__global__ void __launch_bounds__(Plan::kMaxThreads,
                                  kResidual || kQuant != Quant::kStaticFp8
                                      ? Plan::kMinLargeBlocks
                                      : Plan::kMinBlocks)
    RmsNormQuantKernel(const Rows<T> rows) {
  constexpr int kWidth = Plan::kWidth;
  constexpr bool kDynamic = kQuant != Quant::kStaticFp8;
  using V = Vector<T, kWidth>;
  __shared__ WarpResults sum_scratch;
  __shared__ WarpResults max_scratch;
  const RowThreads<Plan> row(rows.num_rows, rows.row_vectors);
  const int64_t start = row.Start(rows.row_vectors);

  V x[Plan::kSlots];
  V r[kResidual ? Plan::kSlots : 1];
  const auto load = [&](int i, int64_t v) {
    x[i] = LoadVector<kWidth>(rows.input + start + v * kWidth);
    if constexpr (kResidual) {
      r[i] = LoadVector<kWidth>(rows.residual + start + v * kWidth);
    }
  };
  // x of the contract.
  const auto value = [&](int i, int j) {
    float exact = ToFloat(x[i][j]);
    if constexpr (kResidual) {
      exact += ToFloat(r[i][j]);
      if constexpr (!kDynamic) exact = ToFloat(FromFloat<T>(exact));
    }
    return exact;
  };
  V w[Plan::kSlots];
  const auto load_weight = [&](int i, int64_t v) {
    w[i] = LoadEagerly<kWidth>(rows.weight + v * kWidth);
  };
  if constexpr (Plan::kHeld) row.ForEach(load);
  if constexpr (Plan::kLoadWeightsFirst) row.ForEach(load_weight);
  // The long rows' bits must not depend on their number, so that 256 threads
  // add up as 512 do (LaunchRows).
  constexpr int kSums = kByRows<T, kQuant, kResidual> && Plan::kWhole &&
                                Plan::kMaxThreads == 256 && Plan::kSlots == 4
                            ? 2
                            : 1;
  float sums[kSums] = {};
  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
    float part = 0.0f;  // a sum a vector, so that they do not wait
#pragma unroll
    for (int j = 0; j < kWidth; ++j) part += value(i, j) * value(i, j);
    sums[i % kSums] += part;
    KeepPacked(x[i]);
    if constexpr (kResidual) KeepPacked(r[i]);
  });
  float sum;
  if constexpr (kSums == 2) {
    sum = row.Sum(sums, sum_scratch);
  } else {
    sum = row.Sum(sums[0], sum_scratch);
  }
  const float s = RootMeanSquareScale(sum, rows.hidden_size, rows.eps);

  // Turns x[i] into y of the contract and r[i] into the rounded sum.
  const auto normalize = [&](int i, int64_t v) {
    if constexpr (!Plan::kLoadWeightsFirst) load_weight(i, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float exact = value(i, j);
      if constexpr (kResidual) r[i][j] = FromFloat<T>(exact);
      x[i][j] = FromFloat<T>(exact * s);
    }
    x[i] = Product(x[i], w[i]);
  };
  float scale = 1.0f;
  if constexpr (kDynamic) {
    float max = 0.0f;
    row.ForEach([&](int i, int64_t v) {
      if constexpr (!Plan::kHeld) load(i, v);
      normalize(i, v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        max = fmaxf(max, fabsf(ToFloat(x[i][j])));
      }
      KeepPacked(x[i]);
      if constexpr (kResidual) KeepPacked(r[i]);
    });
    max = row.Max(max, max_scratch);
    scale = kQuant == Quant::kDynamicFp8 ? Fp8RowScale(max, rows.scale_ub)
                                         : fmaxf(max / 127.0f, kMinInt8Scale);
    if (row.IsFirst()) rows.scale_out[row.index()] = scale;
  } else {
    scale = *rows.scale;
  }
  const ScaleDiv<T> div(scale);
  const float inverse = 1.0f / scale;

  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
    if constexpr (!Plan::kHeld || !kDynamic) normalize(i, v);
    float y[kWidth];
    float scaled[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) y[j] = ToFloat(x[i][j]);
    if constexpr (kQuant == Quant::kDynamicFp8) {
      div.Divide(y, scaled);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) scaled[j] = y[j] * inverse;
    }
    Vector<uint8_t, kWidth> codes;
    if constexpr (kQuant == Quant::kDynamicInt8) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) codes[j] = ToInt8(scaled[j]);
    } else {
      codes = PackFp8(scaled);
    }
    StoreGlobal(rows.out + start + v * kWidth, codes);
    if constexpr (kResidual) {
      StoreGlobal(rows.residual_out + start + v * kWidth, r[i]);
    }
  });
}

template <Quant kQuant, bool kResidual, typename T>
cudaError_t LaunchRows(cudaStream_t stream, Rows<T> rows, int64_t hidden_size) {
  const bool aligned =
      IsAligned(rows.input, 16) && IsAligned(rows.residual, 16) &&
      IsAligned(rows.weight, 16) && IsAligned(rows.residual_out, 16) &&
      IsAligned(rows.out, kWideSize<T>);
  const auto launch = [&](auto plan, const RowGrid& grid) {
    rows.row_vectors = grid.row_vectors;
    return LaunchKernel<
        RmsNormQuantKernel<T, decltype(plan), kQuant, kResidual>>(
        stream, grid.blocks, grid.threads, rows);
  };
  constexpr int kUsualThreads = 256;
  constexpr int kLongThreads = kAlways<T, kQuant, kResidual> ? 256 : 512;
  if constexpr (kByRows<T, kQuant, kResidual>) {
    if (rows.num_rows >= kManyRows) {
      return DispatchRow<T, kUsualThreads, 256>(rows.num_rows, hidden_size,
                                                aligned, launch);
    }
  }
  return DispatchRow<T, kUsualThreads, kLongThreads>(rows.num_rows, hidden_size,
                                                     aligned, launch);
}

template <bool kResidual, typename T>
cudaError_t Launch(cudaStream_t stream, const RmsNormQuantParams& params,
                   int64_t first_row, int64_t num_rows) {
  const int64_t start = first_row * params.hidden_size;
  Rows<T> rows = {};
  rows.input = static_cast<const T*>(params.input) + start;
  if constexpr (kResidual) {
    rows.residual = static_cast<const T*>(params.residual) + start;
    rows.residual_out = static_cast<T*>(params.residual_out) + start;
  }
  rows.weight = static_cast<const T*>(params.weight);
  rows.scale = params.scale;
  rows.scale_ub = params.scale_ub;
  rows.out = static_cast<uint8_t*>(params.out) + start;
  rows.num_rows = num_rows;
  rows.hidden_size = ExactDiv(params.hidden_size);
  rows.eps = params.eps;
  if (params.scale != nullptr) {
    return LaunchRows<Quant::kStaticFp8, kResidual>(stream, rows,
                                                    params.hidden_size);
  }
  rows.scale_out = params.scale_out + first_row;
  if (params.quant_dtype == DType::kF8E4M3FN) {
    return LaunchRows<Quant::kDynamicFp8, kResidual>(stream, rows,
                                                     params.hidden_size);
  }
  return LaunchRows<Quant::kDynamicInt8, kResidual>(stream, rows,
                                                    params.hidden_size);
}

}  // namespace

cudaError_t LaunchRmsNormQuant(cudaStream_t stream,
                               const RmsNormQuantParams& params) {
  return ForEachGrid(params.num_tokens, 1, [&](int64_t row, int64_t rows) {
    return DispatchCudaFloat(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return params.residual == nullptr
                 ? Launch<false, T>(stream, params, row, rows)
                 : Launch<true, T>(stream, params, row, rows);
    });
  });
}

}  // namespace xla_ops
