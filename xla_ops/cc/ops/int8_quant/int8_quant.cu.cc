// Quantisation to int8 on CUDA; bound by memory, 16-byte loads.
//
// QuantizeKernel (device/quant.cuh)  a given scale, with or without azp
// DynamicInt8QuantKernel             a scale a row, the row read once where
//                                    it fits in registers (device/row.cuh)
//
// Tested by tests/ops/test_int8_quant.py.

#include "xla_ops/cc/ops/int8_quant/int8_quant.h"

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/quant.cuh"
#include "xla_ops/cc/device/row.cuh"
#include "xla_ops/cc/device/row_dispatch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/int8_quant/int8_quant_launch.h"

namespace xla_ops {
namespace {

template <typename T>
struct Symmetric {
  const float* scale;

  __device__ ScaleDiv<T> Load() const { return ScaleDiv<T>(*scale); }
  template <int kSize>
  __device__ Vector<uint8_t, kSize> Apply(const float (&x)[kSize],
                                          const ScaleDiv<T>& div) const {
    float quotients[kSize];
    div.Divide(x, quotients);
    Vector<uint8_t, kSize> codes;
#pragma unroll
    for (int j = 0; j < kSize; ++j) codes[j] = ToInt8(quotients[j]);
    return codes;
  }
};

struct WithZeroPoint {
  const float* scale;
  const int32_t* azp;

  struct State {
    float inverse;
    int32_t azp;
  };
  __device__ State Load() const { return {1.0f / *scale, *azp}; }
  template <int kSize>
  __device__ Vector<uint8_t, kSize> Apply(const float (&x)[kSize],
                                          State state) const {
    Vector<uint8_t, kSize> codes;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      codes[j] = AddZeroPoint(ToInt32(x[j] * state.inverse), state.azp);
    }
    return codes;
  }
};

// Threads as RowThreads has them; vectors are aligned (the launcher checks).
template <typename T, typename Plan, bool kAzp>
__global__ void __launch_bounds__(Plan::kMaxThreads, Plan::kMinBlocks)
    DynamicInt8QuantKernel(const T* __restrict__ input,  // [num_rows, hidden]
                           uint8_t* __restrict__ out,    // [num_rows, hidden]
                           float* scale_out,             // [num_rows]
                           int32_t* azp_out,  // [num_rows]; with kAzp
                           int64_t num_rows, int64_t row_vectors) {
  constexpr int kWidth = Plan::kWidth;
  __shared__ WarpResults max_scratch;
  __shared__ WarpResults min_scratch;
  const RowThreads<Plan> row(num_rows, row_vectors);
  const int64_t start = row.Start(row_vectors);

  Vector<T, kWidth> x[Plan::kSlots];
  const auto load = [&](int i, int64_t v) {
    x[i] = LoadVector<kWidth>(input + start + v * kWidth);
  };
  if constexpr (Plan::kHeld) row.ForEach(load);
  // Of the magnitudes where symmetric, or of the numbers and, for their
  // minimum, of their negatives.
  float max = kAzp ? -CUDART_INF_F : 0.0f;
  float negative_min = -CUDART_INF_F;
  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float value = ToFloat(x[i][j]);
      if constexpr (kAzp) {
        max = fmaxf(max, value);
        negative_min = fmaxf(negative_min, -value);
      } else {
        max = fmaxf(max, fabsf(value));
      }
    }
    KeepPacked(x[i]);
  });
  max = row.Max(max, max_scratch);
  float scale = max / 127.0f;
  float factor = max == 0.0f ? 0.0f : 127.0f / max;
  int32_t azp = 0;
  bool symmetric = true;
  if constexpr (kAzp) {
    negative_min = row.Max(negative_min, min_scratch);
    const float min = -negative_min;
    const bool empty = max < min;  // no number in the row
    const float step = empty ? 0.0f : (max - min) / 255.0f;
    if (step > 0.0f) {
      symmetric = false;
      scale = step;
      factor = 1.0f / step;
      azp = ToInt32(-128.0f - min / step);
    } else {
      const float abs_max = empty ? 0.0f : fmaxf(fabsf(max), fabsf(min));
      scale = abs_max / 127.0f;
      factor = abs_max == 0.0f ? 0.0f : 127.0f / abs_max;
    }
  }
  if (row.IsFirst()) {
    scale_out[row.index()] = scale;
    if constexpr (kAzp) azp_out[row.index()] = azp;
  }

  row.ForEach([&](int i, int64_t v) {
    if constexpr (!Plan::kHeld) load(i, v);
    Vector<uint8_t, kWidth> codes;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float scaled = ToFloat(x[i][j]) * factor;
      codes[j] =
          symmetric ? ToInt8(scaled) : AddZeroPoint(ToInt32(scaled), azp);
    }
    StoreGlobal(out + start + v * kWidth, codes);
  });
}

template <bool kAzp, typename T>
cudaError_t LaunchDynamic(cudaStream_t stream, const Int8QuantParams& params,
                          int64_t first_row, int64_t num_rows) {
  const int64_t start = first_row * params.hidden_size;
  const T* input = static_cast<const T*>(params.input) + start;
  uint8_t* out = static_cast<uint8_t*>(params.out) + start;
  return DispatchRow<T>(
      num_rows, params.hidden_size,
      IsAligned(input, 16) && IsAligned(out, kWideSize<T>),
      [&](auto plan, const RowGrid& grid) {
        return LaunchKernel<DynamicInt8QuantKernel<T, decltype(plan), kAzp>>(
            stream, grid.blocks, grid.threads, input, out,
            params.scale_out + first_row,
            kAzp ? params.azp_out + first_row : nullptr, num_rows,
            grid.row_vectors);
      });
}

}  // namespace

cudaError_t LaunchStaticInt8Quant(cudaStream_t stream,
                                  const Int8QuantParams& params) {
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* input = static_cast<const T*>(params.input);
    const int64_t size = params.num_tokens * params.hidden_size;
    if (params.azp == nullptr) {
      return LaunchQuantize(stream, input, params.out, size,
                            Symmetric<T>{params.scale});
    }
    return LaunchQuantize(stream, input, params.out, size,
                          WithZeroPoint{params.scale, params.azp});
  });
}

cudaError_t LaunchDynamicInt8Quant(cudaStream_t stream,
                                   const Int8QuantParams& params) {
  return ForEachGrid(params.num_tokens, 1, [&](int64_t row, int64_t rows) {
    return DispatchCudaFloat(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return params.azp_out == nullptr
                 ? LaunchDynamic<false, T>(stream, params, row, rows)
                 : LaunchDynamic<true, T>(stream, params, row, rows);
    });
  });
}

}  // namespace xla_ops
