// Quantisation to fp8 on CUDA; bound by memory, 16-byte loads.
//
// QuantizeKernel (device/quant.cuh)  a scale for all elements
// AbsMaxKernel                       that scale, from the elements
// PerTokenFp8QuantKernel             a scale a row, the row read once where
//                                    it fits in registers (device/row.cuh)
//
// Tested by tests/ops/test_fp8_quant.py.

#include "xla_ops/cc/ops/fp8_quant/fp8_quant.h"

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/quant.cuh"
#include "xla_ops/cc/device/row.cuh"
#include "xla_ops/cc/device/row_dispatch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant_launch.h"

namespace xla_ops {
namespace {

struct ByGivenScale {
  const float* scale;

  __device__ float Load() const { return 1.0f / *scale; }
  template <int kSize>
  __device__ Vector<uint8_t, kSize> Apply(const float (&x)[kSize],
                                          float inverse) const {
    float scaled[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) scaled[j] = x[j] * inverse;
    return PackFp8(scaled);
  }
};

constexpr int kAbsMaxThreads = 256;

// Raises *scale, which is zero at first, to absmax / 448. The bits of floats
// that are not negative are in the order of the numbers, so one integer
// maximum a block does, whatever the order of the blocks. Threads stride
// over vectors; the last `size` % kWidth elements are the first threads'.
template <int kWidth, typename T>
__global__ void __launch_bounds__(kAbsMaxThreads)
    AbsMaxKernel(const T* __restrict__ input, int64_t size, int* scale) {
  __shared__ WarpResults scratch;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t vectors = size / kWidth;
  float max = 0.0f;
  constexpr int kLoads = 4;  // in flight
  for (int64_t v = thread; v < vectors; v += kLoads * threads) {
    Vector<T, kWidth> x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t at = v + i * threads;
      if (at < vectors) x[i] = LoadVector<kWidth>(input + at * kWidth);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (v + i * threads >= vectors) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        max = fmaxf(max, fabsf(ToFloat(x[i][j])));
      }
    }
  }
  for (int64_t i = vectors * kWidth + thread; i < size; i += threads) {
    max = fmaxf(max, fabsf(ToFloat(input[i])));
  }
  max = BlockMax<kAbsMaxThreads / 32>(max, scratch);
  if (threadIdx.x == 0) atomicMax(scale, __float_as_int(max / kFp8Max));
}

// Threads as RowThreads has them; vectors are aligned (the launcher checks).
template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kMaxThreads, Plan::kMinBlocks)
    PerTokenFp8QuantKernel(const T* __restrict__ input,  // [num_rows, hidden]
                           const float* scale_ub,        // [1] or null
                           uint8_t* __restrict__ out,    // [num_rows, hidden]
                           float* scale_out,             // [num_rows]
                           int64_t num_rows, int64_t row_vectors) {
  constexpr int kWidth = Plan::kWidth;
  __shared__ WarpResults scratch;
  const RowThreads<Plan> row(num_rows, row_vectors);
  const int64_t start = row.Start(row_vectors);

  Vector<T, kWidth> x[Plan::kSlots];
  const auto load = [&](int i, int64_t v) {
    x[i] = LoadVector<kWidth>(input + start + v * kWidth);
  };
  if constexpr (Plan::kHeld) row.ForEach(load);
  float max = 0.0f;
  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) max = fmaxf(max, fabsf(ToFloat(x[i][j])));
    KeepPacked(x[i]);
  });
  const float scale = Fp8RowScale(row.Max(max, scratch), scale_ub);
  if (row.IsFirst()) scale_out[row.index()] = scale;
  const ScaleDiv<T> div(scale);

  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
    float values[kWidth];
    float scaled[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = ToFloat(x[i][j]);
    div.Divide(values, scaled);
    StoreGlobal(out + start + v * kWidth, PackFp8(scaled));
  });
}

template <typename T>
cudaError_t LaunchAbsMax(cudaStream_t stream, const T* input, int64_t size,
                         float* scale) {
  // Enough to fill any GPU; more only adds atomics.
  constexpr int64_t kMaxBlocks = 1024;
  const bool wide = IsAligned(input, 16);
  const int64_t step = kAbsMaxThreads * (wide ? kWideSize<T> : 1);
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(kMaxBlocks, CeilDivide(size, step)));
  auto* bits = reinterpret_cast<int*>(scale);
  return wide ? LaunchKernel<AbsMaxKernel<kWideSize<T>, T>>(
                    stream, blocks, kAbsMaxThreads, input, size, bits)
              : LaunchKernel<AbsMaxKernel<1, T>>(stream, blocks, kAbsMaxThreads,
                                                 input, size, bits);
}

template <typename T>
cudaError_t LaunchPerToken(cudaStream_t stream, const Fp8QuantParams& params,
                           int64_t first_row, int64_t num_rows) {
  const int64_t start = first_row * params.hidden_size;
  const T* input = static_cast<const T*>(params.input) + start;
  uint8_t* out = static_cast<uint8_t*>(params.out) + start;
  return DispatchRow<T>(
      num_rows, params.hidden_size,
      IsAligned(input, 16) && IsAligned(out, kWideSize<T>),
      [&](auto plan, const RowGrid& grid) {
        return LaunchKernel<PerTokenFp8QuantKernel<T, decltype(plan)>>(
            stream, grid.blocks, grid.threads, input, params.scale_ub, out,
            params.scale_out + first_row, num_rows, grid.row_vectors);
      });
}

cudaError_t LaunchByScale(cudaStream_t stream, const Fp8QuantParams& params,
                          const float* scale) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return LaunchQuantize(stream, static_cast<const T*>(params.input),
                          params.out, params.num_tokens * params.hidden_size,
                          ByGivenScale{scale});
  });
}

}  // namespace

cudaError_t LaunchStaticFp8Quant(cudaStream_t stream,
                                 const Fp8QuantParams& params) {
  return LaunchByScale(stream, params, params.scale);
}

cudaError_t LaunchDynamicFp8Quant(cudaStream_t stream,
                                  const Fp8QuantParams& params) {
  cudaError_t error =
      cudaMemsetAsync(params.scale_out, 0, sizeof(float), stream);
  const int64_t size = params.num_tokens * params.hidden_size;
  if (error != cudaSuccess || size == 0) return error;
  error = DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return LaunchAbsMax(stream, static_cast<const T*>(params.input), size,
                        params.scale_out);
  });
  if (error != cudaSuccess) return error;
  return LaunchByScale(stream, params, params.scale_out);
}

cudaError_t LaunchPerTokenFp8Quant(cudaStream_t stream,
                                   const Fp8QuantParams& params) {
  return ForEachGrid(params.num_tokens, 1, [&](int64_t row, int64_t rows) {
    return DispatchCudaFloat(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return LaunchPerToken<T>(stream, params, row, rows);
    });
  });
}

}  // namespace xla_ops
