// RMSNorm on CUDA. Bound by memory: a row is read once, where it fits in
// registers (device/row.cuh), and written once.
//
// Tested by tests/gpu/check_kernels.py and tests/ops/test_rms_norm.py.

#include "xla_ops/cc/ops/rms_norm/rms_norm.h"

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
#include "xla_ops/cc/ops/rms_norm/rms_norm_launch.h"

namespace xla_ops {
namespace {

// Of a usual length, at most, whose products are packed.
constexpr int64_t kPackedRows = 2048;

// Threads as RowThreads has them; vectors are aligned (the launcher checks).
// `out` may be `input`: every element is written, after the row's reduction,
// by the thread that reads it.
// kPacked: whether the last products are of two elements at an instruction.
template <typename T, typename Plan, bool kPacked>
__global__ void __launch_bounds__(Plan::kMaxThreads, Plan::kMinBlocks)
    RmsNormKernel(const T* input,                // [num_rows, hidden]
                  const T* __restrict__ weight,  // [hidden]
                  T* out,                        // [num_rows, hidden]
                  int64_t num_rows, int64_t row_vectors,
                  const ExactDiv hidden_size, float eps) {
  constexpr int kWidth = Plan::kWidth;
  __shared__ WarpResults scratch;
  const RowThreads<Plan> row(num_rows, row_vectors);
  const int64_t start = row.Start(row_vectors);

  Vector<T, kWidth> x[Plan::kSlots];
  const auto load = [&](int i, int64_t v) {
    x[i] = LoadVector<kWidth>(input + start + v * kWidth);
  };
  Vector<T, kWidth> w[Plan::kSlots];
  const auto load_weight = [&](int i, int64_t v) {
    w[i] = LoadEagerly<kWidth>(weight + v * kWidth);
  };
  // In loops of their own, so that all of a thread's loads are in flight.
  if constexpr (Plan::kHeld) row.ForEach(load);
  if constexpr (Plan::kLoadWeightsFirst) row.ForEach(load_weight);
  float sum = 0.0f;
  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
    sum += SumOfSquares(x[i]);
    KeepPacked(x[i]);
  });
  const float s = RootMeanSquareScale(row.Sum(sum, scratch), hidden_size, eps);

  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
    if constexpr (!Plan::kLoadWeightsFirst) load_weight(i, v);
    // The two roundings of the contract.
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      x[i][j] = FromFloat<T>(ToFloat(x[i][j]) * s);
    }
    StoreGlobal(out + start + v * kWidth, Product<kPacked>(x[i], w[i]));
  });
}

template <typename T>
cudaError_t Launch(cudaStream_t stream, const RmsNormParams& params,
                   int64_t first_row, int64_t num_rows) {
  const int64_t start = first_row * params.hidden_size;
  const T* input = static_cast<const T*>(params.input) + start;
  const T* weight = static_cast<const T*>(params.weight);
  T* out = static_cast<T*>(params.out) + start;
  const bool aligned =
      IsAligned(input, 16) && IsAligned(weight, 16) && IsAligned(out, 16);
  return DispatchRow<T>(
      num_rows, params.hidden_size, aligned,
      [&](auto plan, const RowGrid& grid) {
        using Plan = decltype(plan);
        const auto launch = [&](auto packed) {
          return LaunchKernel<RmsNormKernel<T, Plan, decltype(packed)::value>>(
              stream, grid.blocks, grid.threads, input, weight, out, num_rows,
              grid.row_vectors, ExactDiv(params.hidden_size), params.eps);
        };
        // Where rows of 4096 fill the GPU many times over, memory is the limit
        // and fp32 products a per cent faster.
        if constexpr (Plan::kWhole && Plan::kMaxThreads == 256) {
          if (num_rows > kPackedRows) return launch(std::false_type{});
        }
        return launch(std::true_type{});
      });
}

}  // namespace

cudaError_t LaunchRmsNorm(cudaStream_t stream, const RmsNormParams& params) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return cudaSuccess;
  return ForEachGrid(params.num_tokens, 1, [&](int64_t row, int64_t rows) {
    return DispatchCudaFloat(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return Launch<T>(stream, params, row, rows);
    });
  });
}

}  // namespace xla_ops
