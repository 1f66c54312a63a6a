// The gradient of RMSNorm on CUDA. Bound by memory: the rows of gradient and
// input are read once, where they fit in registers (device/row.cuh), and dx is
// written once. A block takes every so-manieth row and keeps its part of the
// weight's gradient in registers, so that it writes one row of parts for many
// of dx, in an order that depends on nothing else.
//
// Tested by tests/gpu/check_kernels.py and tests/ops/test_rms_norm_backward.py.

#include "xla_ops/cc/ops/rms_norm/rms_norm_backward.h"

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/rms.cuh"
#include "xla_ops/cc/device/row.cuh"
#include "xla_ops/cc/device/row_dispatch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward_launch.h"

namespace xla_ops {
namespace {

// Of a block that has several rows (DispatchRow), at most.
constexpr int kSharedThreads = 256;

// Writes a thread's sums, one row a block: `part` is its row of parts.
template <int kWidth>
__device__ __forceinline__ void StoreSums(const float (&sums)[kWidth],
                                          float* part) {
  static_assert(kWidth % 4 == 0);
#pragma unroll
  for (int j = 0; j < kWidth; j += 4) {
    const Vector<float, 4> four = {sums[j], sums[j + 1], sums[j + 2],
                                   sums[j + 3]};
    StoreGlobal(part + j, four);
  }
}

// Threads as RowThreads has them; vectors are aligned (the launcher checks).
// Block b has rows b, b + gridDim.x, ... of blockDim.y each. kParts: gridDim.x
// is the number of parts.
template <typename T, typename Plan, bool kParts>
__global__ void __launch_bounds__(Plan::kMaxThreads, Plan::kMinLargeBlocks)
    RmsNormBackwardKernel(
        const T* __restrict__ grad,    // [num_rows, hidden]
        const T* __restrict__ input,   // [num_rows, hidden]
        const T* __restrict__ weight,  // [hidden]
        const T* __restrict__ added,   // [num_rows, hidden] or null
        T* __restrict__ dx,            // [num_rows, hidden]
        float* __restrict__ parts,     // [gridDim.x, hidden] or null
        int64_t num_rows, int64_t row_vectors, const ExactDiv hidden_size,
        float inverse_size, float eps) {
  constexpr int kWidth = Plan::kWidth;
  // In turns, so that one barrier a row is enough.
  __shared__ WarpResults scratch[2][2];
  const int64_t size = row_vectors * kWidth;
  float* part = parts + blockIdx.x * size;
  // A row that is there whatever num_rows is.
  const RowThreads<Plan> columns(0, INT64_MAX, row_vectors);
  float sums[Plan::kSlots][kWidth] = {};
  if constexpr (kParts && !Plan::kHeld) {
    columns.ForEach([&](int, int64_t v) { part[v] = 0.0f; });
  }

  int turn = 0;
  for (int64_t block = blockIdx.x; block * blockDim.y < num_rows;
       block += gridDim.x, turn ^= 1) {
    const RowThreads<Plan> row(block, num_rows, row_vectors);
    const int64_t start = row.index() * size;
    Vector<T, kWidth> x[Plan::kSlots];
    Vector<T, kWidth> g[Plan::kSlots];
    const auto load = [&](int i, int64_t v) {
      x[i] = LoadEagerly<kWidth>(input + start + v * kWidth);
      g[i] = LoadEagerly<kWidth>(grad + start + v * kWidth);
    };
    // In a loop of its own, so that all of a thread's loads are in flight.
    if constexpr (Plan::kHeld) row.ForEach(load);
    float2 sum = {0.0f, 0.0f};
    row.ForEach([&](int i, int64_t v) {
      if constexpr (!Plan::kHeld) load(i, v);
      const Vector<T, kWidth> w = LoadVector<kWidth>(weight + v * kWidth);
      sum.x += SumOfSquares(x[i]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sum.y += ToFloat(g[i][j]) * ToFloat(w[j]) * ToFloat(x[i][j]);
      }
      KeepPacked(x[i]);
      KeepPacked(g[i]);
    });
    sum = row.Sum(sum, scratch[turn]);
    const float s = RootMeanSquareScale(sum.x, hidden_size, eps);
    const float back = sum.y * s * inverse_size * s;

    row.ForEach([&](int i, int64_t v) {
      if constexpr (!Plan::kHeld) load(i, v);
      const Vector<T, kWidth> w = LoadVector<kWidth>(weight + v * kWidth);
      Vector<T, kWidth> more;
      if (added != nullptr) {
        more = LoadVector<kWidth>(added + start + v * kWidth);
      }
      Vector<T, kWidth> result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float gj = ToFloat(g[i][j]);
        const float xj = ToFloat(x[i][j]);
        float d = s * (gj * ToFloat(w[j]) - xj * back);
        if (added != nullptr) d += ToFloat(more[j]);
        result[j] = FromFloat<T>(d);
        if constexpr (kParts && Plan::kHeld) sums[i][j] += gj * (xj * s);
        if constexpr (kParts && !Plan::kHeld) part[v] += gj * (xj * s);
      }
      StoreGlobal(dx + start + v * kWidth, result);
    });
  }

  if constexpr (kParts && Plan::kHeld) {
    // Only this plan has blocks of several rows.
    constexpr bool kSeveral = !Plan::kWhole && Plan::kSlots == 2;
    __shared__ float
        tile[kSeveral ? kSharedThreads * Plan::kSlots * kWidth : 1];
    if (!kSeveral || blockDim.y == 1) {
      columns.ForEach(
          [&](int i, int64_t v) { StoreSums(sums[i], part + v * kWidth); });
      return;
    }
    columns.ForEach([&](int i, int64_t v) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        tile[threadIdx.y * size + v * kWidth + j] = sums[i][j];
      }
    });
    __syncthreads();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int i = thread; i < size; i += blockDim.x * blockDim.y) {
      float total = 0.0f;
      for (int y = 0; y < blockDim.y; ++y) total += tile[y * size + i];
      part[i] = total;
    }
  }
}

template <typename T, bool kParts>
cudaError_t Launch(cudaStream_t stream, const RmsNormBackwardParams& params) {
  const T* grad = static_cast<const T*>(params.grad);
  const T* input = static_cast<const T*>(params.input);
  const T* weight = static_cast<const T*>(params.weight);
  const T* added = static_cast<const T*>(params.added);
  T* dx = static_cast<T*>(params.dx);
  const bool aligned = IsAligned(grad, 16) && IsAligned(input, 16) &&
                       IsAligned(weight, 16) && IsAligned(added, 16) &&
                       IsAligned(dx, 16) && IsAligned(params.parts, 16);
  // The grid's own number of blocks is one a row.
  return DispatchRow<T>(
      1, params.hidden_size, aligned, [&](auto plan, const RowGrid& grid) {
        using Plan = decltype(plan);
        const int64_t needed = CeilDivide(params.num_tokens, grid.threads.y);
        const auto blocks = static_cast<unsigned>(
            kParts ? params.num_parts : std::min(needed, kMaxGridX));
        return LaunchKernel<RmsNormBackwardKernel<T, Plan, kParts>>(
            stream, blocks, grid.threads, grad, input, weight, added, dx,
            params.parts, params.num_tokens, grid.row_vectors,
            ExactDiv(params.hidden_size),
            1.0f / static_cast<float>(params.hidden_size), params.eps);
      });
}

}  // namespace

cudaError_t LaunchRmsNormBackward(cudaStream_t stream,
                                  const RmsNormBackwardParams& params) {
  if (params.hidden_size == 0) return cudaSuccess;
  const bool has_parts = params.parts != nullptr && params.num_parts > 0;
  if (params.num_tokens == 0 && !has_parts) return cudaSuccess;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return has_parts ? Launch<T, true>(stream, params)
                     : Launch<T, false>(stream, params);
  });
}

}  // namespace xla_ops
