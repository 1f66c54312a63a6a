// Residual addition and RMSNorm on CUDA. Bound by memory: two rows are read
// and two written, once each where a row fits in registers (device/row.cuh).
//
// Tested by tests/ops/test_fused_add_rms_norm.py.

#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm.h"

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/packed.cuh"
#include "xla_ops/cc/device/rms.cuh"
#include "xla_ops/cc/device/row.cuh"
#include "xla_ops/cc/device/row_dispatch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm_launch.h"

namespace xla_ops {
namespace {

// Of 8192 elements, at most, whose products are packed.
constexpr int64_t kPackedRows = 2048;

// Threads as RowThreads has them; vectors are aligned (the launcher checks).
// `out` may be `input` and `residual_out` `residual`: every element is
// written, after the row's reduction, by the thread that reads it.
// kPacked: whether the last products are of two elements at an instruction.
template <typename T, typename Plan, bool kPacked>
__global__ void __launch_bounds__(Plan::kMaxThreads, Plan::kMinBlocks)
    FusedAddRmsNormKernel(const T* input,                // [num_rows, hidden]
                          const T* residual,             // [num_rows, hidden]
                          const T* __restrict__ weight,  // [hidden]
                          T* out,                        // [num_rows, hidden]
                          T* residual_out,               // [num_rows, hidden]
                          int64_t num_rows, int64_t row_vectors,
                          const ExactDiv hidden_size, float eps) {
  constexpr int kWidth = Plan::kWidth;
  using V = Vector<T, kWidth>;
  __shared__ WarpResults scratch;
  const RowThreads<Plan> row(num_rows, row_vectors);
  const int64_t start = row.Start(row_vectors);

  V x[Plan::kSlots];
  V z[Plan::kSlots];
  const auto load = [&](int i, int64_t v) {
    x[i] = LoadVector<kWidth>(input + start + v * kWidth);
    z[i] = LoadVector<kWidth>(residual + start + v * kWidth);
  };
  const auto add = [&](int i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      z[i][j] = FromFloat<T>(ToFloat(x[i][j]) + ToFloat(z[i][j]));
    }
  };
  V w[Plan::kSlots];
  const auto load_weight = [&](int i, int64_t v) {
    w[i] = LoadEagerly<kWidth>(weight + v * kWidth);
  };
  // In loops of their own, so that all of a thread's loads are in flight.
  if constexpr (Plan::kHeld) row.ForEach(load);
  if constexpr (Plan::kLoadWeightsFirst) row.ForEach(load_weight);
  float sum = 0.0f;
  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
    add(i);
    sum += SumOfSquares(z[i]);
    KeepPacked(z[i]);
  });
  const float s = RootMeanSquareScale(row.Sum(sum, scratch), hidden_size, eps);

  if constexpr (Plan::kHeld && !Plan::kLoadWeightsFirst)
    row.ForEach(load_weight);
  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) {
      load(i, v);
      load_weight(i, v);
      add(i);
    }
    V normed;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      normed[j] = FromFloat<T>(ToFloat(z[i][j]) * s);
    }
    StoreGlobal(residual_out + start + v * kWidth, z[i]);
    StoreGlobal(out + start + v * kWidth, Product<kPacked>(normed, w[i]));
  });
}

template <typename T>
cudaError_t Launch(cudaStream_t stream, const FusedAddRmsNormParams& params,
                   int64_t first_row, int64_t num_rows) {
  const int64_t start = first_row * params.hidden_size;
  const T* input = static_cast<const T*>(params.input) + start;
  const T* residual = static_cast<const T*>(params.residual) + start;
  const T* weight = static_cast<const T*>(params.weight);
  T* out = static_cast<T*>(params.out) + start;
  T* residual_out = static_cast<T*>(params.residual_out) + start;
  const bool aligned = IsAligned(input, 16) && IsAligned(residual, 16) &&
                       IsAligned(weight, 16) && IsAligned(out, 16) &&
                       IsAligned(residual_out, 16);
  return DispatchRow<T>(
      num_rows, params.hidden_size, aligned,
      [&](auto plan, const RowGrid& grid) {
        using Plan = decltype(plan);
        const auto launch = [&](auto packed) {
          return LaunchKernel<
              FusedAddRmsNormKernel<T, Plan, decltype(packed)::value>>(
              stream, grid.blocks, grid.threads, input, residual, weight, out,
              residual_out, num_rows, grid.row_vectors,
              ExactDiv(params.hidden_size), params.eps);
        };
        // Where rows of 8192 fill the GPU many times over, memory is the limit
        // and fp32 products half a per cent faster.
        if constexpr (Plan::kWhole && Plan::kMaxThreads == 512) {
          if (num_rows > kPackedRows) return launch(std::false_type{});
        }
        return launch(std::true_type{});
      });
}

}  // namespace

cudaError_t LaunchFusedAddRmsNorm(cudaStream_t stream,
                                  const FusedAddRmsNormParams& params) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return cudaSuccess;
  return ForEachGrid(params.num_tokens, 1, [&](int64_t row, int64_t rows) {
    return DispatchCudaFloat(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return Launch<T>(stream, params, row, rows);
    });
  });
}

}  // namespace xla_ops
