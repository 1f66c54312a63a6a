// The gradient of RMSNorm on CUDA. Bound by memory: the rows of gradient and
// input are read once, where they fit in registers (device/row.cuh), and dx is
// written once. A block takes every so-manieth row and keeps its share of the
// weight's gradient in registers, so that it writes one row of sums for many
// of dx, in an order that depends on nothing else. Where there are more blocks
// than parts, a second kernel adds up what the blocks of a part have.
//
// Tested by tests/gpu/check_kernels.py and tests/ops/test_rms_norm_backward.py.

#include "xla_ops/cc/ops/rms_norm/rms_norm_backward.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/rms.cuh"
#include "xla_ops/cc/device/row.cuh"
#include "xla_ops/cc/device/row_dispatch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward_launch.h"

namespace xla_ops {
namespace {

// Of a block that has several rows (DispatchRow), at most.
constexpr int kSharedThreads = 256;

// Blocks that a multiprocessor has room for. A thread that holds four vectors
// of both rows, and as many sums, needs 128 registers.
template <typename Plan>
constexpr int kBlocks = Plan::kSlots > 2 ? 1 : Plan::kMinLargeBlocks;

// Whether rows stay in registers until dx is computed. Of 1024 threads each
// has 64, which four vectors' sums fill by half: those rows are read again,
// from the L2 cache.
template <typename Plan>
constexpr bool kKeeps =
    Plan::kHeld && (Plan::kSlots <= 2 || Plan::kMaxThreads <= 512);

// Writes a thread's sums, one row a block: `part` is its row of sums.
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
// Block b has rows b, b + gridDim.x, ... of blockDim.y each.
template <typename T, typename Plan, bool kSums, bool kAdded>
__global__ void __launch_bounds__(Plan::kMaxThreads, kBlocks<Plan>)
    RmsNormBackwardKernel(
        const T* __restrict__ grad,    // [num_rows, hidden]
        const T* __restrict__ input,   // [num_rows, hidden]
        const T* __restrict__ weight,  // [hidden]
        const T* __restrict__ added,   // [num_rows, hidden] or null
        T* __restrict__ dx,            // [num_rows, hidden]
        float* __restrict__ all_sums,  // [gridDim.x, hidden] or null
        int64_t num_rows, int64_t row_vectors, const ExactDiv hidden_size,
        float inverse_size, float eps) {
  constexpr int kWidth = Plan::kWidth;
  constexpr int kKept = kKeeps<Plan> ? Plan::kSlots : 1;
  using V = Vector<T, kWidth>;
  // In turns, so that one barrier a row is enough.
  __shared__ WarpResults scratch[2][2];
  const int64_t size = row_vectors * kWidth;
  float* part = all_sums + blockIdx.x * size;
  // A row that is there whatever num_rows is.
  const RowThreads<Plan> columns(0, INT64_MAX, row_vectors);
  float sums[Plan::kSlots][kWidth] = {};
  if constexpr (kSums && !Plan::kHeld) {
    columns.ForEach([&](int, int64_t v) { part[v] = 0.0f; });
  }

  int turn = 0;
  for (int64_t block = blockIdx.x; block * blockDim.y < num_rows;
       block += gridDim.x, turn ^= 1) {
    const RowThreads<Plan> row(block, num_rows, row_vectors);
    const int64_t start = row.index() * size;
    V x[kKept];
    V g[kKept];
    V w[kKept];
    const auto load = [&](int i, int64_t v) {
      x[i] = LoadEagerly<kWidth>(input + start + v * kWidth);
      g[i] = LoadEagerly<kWidth>(grad + start + v * kWidth);
    };
    // For each pass anew, or the compiler would keep all rows' weights in
    // registers that it does not have.
    const auto load_weight = [&](int i, int64_t v) {
      w[i] = LoadEagerly<kWidth>(weight + v * kWidth);
    };
    // In loops of their own, so that all of a thread's loads are in flight.
    if constexpr (kKeeps<Plan>) row.ForEach(load);
    if constexpr (Plan::kWhole) row.ForEach(load_weight);
    float2 sum = {0.0f, 0.0f};
    row.ForEach([&](int slot, int64_t v) {
      const int i = kKeeps<Plan> ? slot : 0;
      if constexpr (!kKeeps<Plan>) load(i, v);
      if constexpr (!Plan::kWhole) load_weight(i, v);
      sum.x += SumOfSquares(x[i]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sum.y += ToFloat(g[i][j]) * ToFloat(w[i][j]) * ToFloat(x[i][j]);
      }
      KeepPacked(x[i]);
      KeepPacked(g[i]);
    });
    sum = row.Sum(sum, scratch[turn]);
    const float s = RootMeanSquareScale(sum.x, hidden_size, eps);
    const float back = sum.y * s * inverse_size * s;

    row.ForEach([&](int slot, int64_t v) {
      const int i = kKeeps<Plan> ? slot : 0;
      if constexpr (!kKeeps<Plan>) load(i, v);
      load_weight(i, v);
      V more;
      if constexpr (kAdded) {
        more = LoadEagerly<kWidth>(added + start + v * kWidth);
      }
      V result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float gj = ToFloat(g[i][j]);
        const float xj = ToFloat(x[i][j]);
        float d = s * (gj * ToFloat(w[i][j]) - xj * back);
        if constexpr (kAdded) d += ToFloat(more[j]);
        result[j] = FromFloat<T>(d);
        if constexpr (kSums && Plan::kHeld) sums[slot][j] += gj * (xj * s);
        if constexpr (kSums && !Plan::kHeld) part[v] += gj * (xj * s);
      }
      StoreGlobal(dx + start + v * kWidth, result);
    });
  }

  if constexpr (kSums && Plan::kHeld) {
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

// Adds up what blocks p, p + num_parts, ... have of part p, blockIdx.y. A block
// has 32 columns, in vectors along the threads of kLanes.
constexpr int kSumThreads = 512;
constexpr int kSumColumns = 32;

template <int kWidth>
__global__ void __launch_bounds__(kSumThreads)
    SumBlocksKernel(const float* __restrict__ sums,  // [num_blocks, size]
                    float* __restrict__ parts,       // [num_parts, size]
                    int64_t num_blocks, int64_t num_parts, int64_t size) {
  constexpr int kLanes = kSumColumns / kWidth;
  constexpr int kRows = kSumThreads / kLanes;
  using V = Vector<float, kWidth>;
  __shared__ V tile[kRows][kLanes];
  const int lane = threadIdx.x % kLanes;
  const int row = threadIdx.x / kLanes;
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + lane * kWidth;
  for (int64_t part = blockIdx.y; part < num_parts; part += gridDim.y) {
    V total = {};
    if (column < size) {
#pragma unroll 8
      for (int64_t b = part + row * num_parts; b < num_blocks;
           b += kRows * num_parts) {
        const V more = LoadVector<kWidth>(sums + b * size + column);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) total[j] += more[j];
      }
    }
    tile[row][lane] = total;
    __syncthreads();
    for (int half = kRows / 2; half > 0; half /= 2) {
      if (row < half) {
        const V more = tile[row + half][lane];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) total[j] += more[j];
        tile[row][lane] = total;
      }
      __syncthreads();
    }
    if (row == 0 && column < size) {
      StoreVector(parts + part * size + column, total);
    }
  }
}

cudaError_t SumBlocks(cudaStream_t stream, const RmsNormBackwardParams& params,
                      int64_t num_blocks) {
  const int64_t size = params.hidden_size;
  const dim3 grid(static_cast<unsigned>(CeilDivide(size, kSumColumns)),
                  static_cast<unsigned>(std::min(params.num_parts, kMaxGridY)));
  const auto launch = [&](auto kernel_width) {
    return LaunchKernel<SumBlocksKernel<decltype(kernel_width)::value>>(
        stream, grid, kSumThreads, params.scratch, params.parts, num_blocks,
        params.num_parts, size);
  };
  const bool wide = size % 4 == 0 && IsAligned(params.scratch, 16) &&
                    IsAligned(params.parts, 16);
  return wide ? launch(std::integral_constant<int, 4>{})
              : launch(std::integral_constant<int, 1>{});
}

// Blocks that have sums: as many for each part, and as many as the GPU runs at
// once where `scratch` has a row for each.
cudaError_t NumBlocks(const RmsNormBackwardParams& params, int64_t needed,
                      int blocks_a_multiprocessor, int64_t* num_blocks) {
  *num_blocks = params.num_parts;
  const int64_t most = std::min(needed, params.scratch_rows);
  if (most <= params.num_parts) return cudaSuccess;
  static PerDevice<int> multiprocessors;
  int count;
  const cudaError_t error = multiprocessors.Get(
      [](int* value) {
        int device;
        const cudaError_t error = cudaGetDevice(&device);
        if (error != cudaSuccess) return error;
        return cudaDeviceGetAttribute(value, cudaDevAttrMultiProcessorCount,
                                      device);
      },
      &count);
  if (error != cudaSuccess) return error;
  const int64_t at_once = int64_t{count} * blocks_a_multiprocessor;
  *num_blocks *=
      std::max<int64_t>(1, std::min(most, at_once) / params.num_parts);
  return cudaSuccess;
}

template <typename T, bool kSums, bool kAdded>
cudaError_t Launch(cudaStream_t stream, const RmsNormBackwardParams& params) {
  const T* grad = static_cast<const T*>(params.grad);
  const T* input = static_cast<const T*>(params.input);
  const T* weight = static_cast<const T*>(params.weight);
  const T* added = static_cast<const T*>(params.added);
  T* dx = static_cast<T*>(params.dx);
  const bool aligned = IsAligned(grad, 16) && IsAligned(input, 16) &&
                       IsAligned(weight, 16) && IsAligned(added, 16) &&
                       IsAligned(dx, 16) && IsAligned(params.parts, 16) &&
                       IsAligned(params.scratch, 16);
  const auto launch = [&](auto plan, const RowGrid& grid) {
    using Plan = decltype(plan);
    const int64_t needed = CeilDivide(params.num_tokens, grid.threads.y);
    int64_t num_blocks = std::min(needed, kMaxGridX);
    float* sums = nullptr;
    if constexpr (kSums) {
      const cudaError_t error =
          NumBlocks(params, needed,
                    kBlocks<Plan> * Plan::kMaxThreads /
                        static_cast<int>(grid.threads.x * grid.threads.y),
                    &num_blocks);
      if (error != cudaSuccess) return error;
      sums = num_blocks > params.num_parts ? params.scratch : params.parts;
    }
    const cudaError_t error =
        LaunchKernel<RmsNormBackwardKernel<T, Plan, kSums, kAdded>>(
            stream, static_cast<unsigned>(num_blocks), grid.threads, grad,
            input, weight, added, dx, sums, params.num_tokens, grid.row_vectors,
            ExactDiv(params.hidden_size),
            1.0f / static_cast<float>(params.hidden_size), params.eps);
    if (error != cudaSuccess || sums == params.parts) return error;
    return SumBlocks(stream, params, num_blocks);
  };
  // The grid's own number of blocks is one a row.
  return DispatchRow<T>(
      1, params.hidden_size, aligned, [&](auto plan, const RowGrid& grid) {
        using Plan = decltype(plan);
        if constexpr (Plan::kSlots > 2) {
          if (grid.threads.x <= 512) {
            return launch(RowPlan<Plan::kWidth, Plan::kSlots, 512>{}, grid);
          }
        }
        return launch(plan, grid);
      });
}

}  // namespace

cudaError_t LaunchRmsNormBackward(cudaStream_t stream,
                                  const RmsNormBackwardParams& params) {
  if (params.hidden_size == 0) return cudaSuccess;
  const bool has_sums = params.parts != nullptr && params.num_parts > 0;
  if (params.num_tokens == 0 && !has_sums) return cudaSuccess;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.added != nullptr) {
      return has_sums ? Launch<T, true, true>(stream, params)
                      : Launch<T, false, true>(stream, params);
    }
    return has_sums ? Launch<T, true, false>(stream, params)
                    : Launch<T, false, false>(stream, params);
  });
}

}  // namespace xla_ops
