// RMSNorm on CUDA: bound by memory, so each row is read once with 16-byte
// loads, stays in registers between the sum and the scaling, and is written
// once.
//
// RmsNormKernel       rows of whole 16-byte vectors, aligned, up to
//                     4 * 1024 vectors long (32768 16-bit elements)
// RmsNormScalarKernel everything else; reads the row twice
//
// Tested by tests/gpu/check_kernels.py and tests/test_rms_norm.py.

#include "xla_ops/cc/ops/rms_norm/rms_norm.h"

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/rms_norm/rms_norm_launch.h"

namespace xla_ops {
namespace {

constexpr int kMaxThreads = 1024;
// Of a row, in one thread's registers; 1024 threads leave 64 for each.
constexpr int kMaxVectors = 4;
// Threads of a block that holds several short rows.
constexpr int kSharedBlockThreads = 256;
// Below this many rows a GPU is not full: more threads a row then shorten
// the time to the sum.
constexpr int64_t kFewRows = 256;

// The two roundings of the contract. The product of two 16-bit floats is
// exact in fp32, so the second multiplication rounds once.
template <typename T>
__device__ __forceinline__ T ScaleElement(T x, float s, T weight) {
  return FromFloat<T>(ToFloat(FromFloat<T>(ToFloat(x) * s)) * ToFloat(weight));
}

// Threads: blockDim.x share a row, blockDim.y rows a block. blockDim.x is a
// power of two up to 32, or a multiple of 32 with one row a block. Thread x
// holds vectors x, x + blockDim.x, ... of its row. Rows end with the grid.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1)
    RmsNormKernel(const T* __restrict__ input,   // [num_rows, hidden]
                  const T* __restrict__ weight,  // [hidden]
                  T* __restrict__ out,           // [num_rows, hidden]
                  int64_t num_rows, int row_vectors, float hidden_size,
                  float eps) {
  constexpr int kSize = kWideSize<T>;
  __shared__ float scratch[32];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool in_range = row < num_rows;
  const int64_t row_start = row * row_vectors * kSize;

  Vector<T, kSize> x[kVectors];
  Vector<T, kSize> w[kVectors];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (in_range && v < row_vectors) {
      x[i] = LoadVector<kSize>(input + row_start + v * kSize);
    }
  }
  // Few rows: the weights' latency hides behind the sum. With four vectors
  // they would not fit in the registers of 1024 threads, and many rows find
  // them in the L1 cache.
  constexpr bool kWeightEarly = kVectors <= 2;
  if constexpr (kWeightEarly) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v < row_vectors) w[i] = LoadVector<kSize>(weight + v * kSize);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (in_range && v < row_vectors) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float value = ToFloat(x[i][j]);
        sum += value * value;
      }
    }
  }
  sum = blockDim.x <= 32 ? WarpSum(sum, blockDim.x) : BlockSum(sum, scratch);
  const float s = rsqrtf(sum / hidden_size + eps);

#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (in_range && v < row_vectors) {
      if constexpr (!kWeightEarly) {
        w[i] = LoadVector<kSize>(weight + v * kSize);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        x[i][j] = ScaleElement(x[i][j], s, w[i][j]);
      }
      StoreGlobal(out + row_start + v * kSize, x[i]);
    }
  }
}

// One block a row, any hidden size and alignment. `input` and `out` may be
// one buffer: each element is written by the thread that last reads it.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    RmsNormScalarKernel(const T* input, const T* weight, T* out,
                        int64_t hidden_size, float eps) {
  __shared__ float scratch[32];
  const int64_t row_start = int64_t{blockIdx.x} * hidden_size;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < hidden_size; i += blockDim.x) {
    const float value = ToFloat(input[row_start + i]);
    sum += value * value;
  }
  sum = BlockSum(sum, scratch);
  const float s = rsqrtf(sum / static_cast<float>(hidden_size) + eps);
  for (int64_t i = threadIdx.x; i < hidden_size; i += blockDim.x) {
    out[row_start + i] = ScaleElement(input[row_start + i], s, weight[i]);
  }
}

int NextPowerOfTwo(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

// How many vectors each thread holds. Many rows: a warp for each while it
// holds at most four a thread, then wider blocks with four. Few rows: as
// many threads as there are vectors.
int VectorsPerThread(int64_t row_vectors, bool few_rows) {
  const int64_t threads = few_rows ? kMaxThreads : 32;
  int vectors = 1;
  while (vectors < kMaxVectors && vectors * threads < row_vectors) {
    vectors *= 2;
  }
  return vectors;
}

template <typename T, int kVectors>
cudaError_t LaunchVectors(cudaStream_t stream, const T* input, const T* weight,
                          T* out, int64_t num_rows, int64_t row_vectors,
                          float hidden_size, float eps) {
  const int64_t needed = (row_vectors + kVectors - 1) / kVectors;
  dim3 block;
  if (needed <= 32) {
    block.x = NextPowerOfTwo(needed);
    block.y = kSharedBlockThreads / block.x;
  } else {
    block.x = static_cast<unsigned>((needed + 31) / 32 * 32);
  }
  const int64_t blocks = (num_rows + block.y - 1) / block.y;
  RmsNormKernel<T, kVectors>
      <<<static_cast<unsigned>(blocks), block, 0, stream>>>(
          input, weight, out, num_rows, static_cast<int>(row_vectors),
          hidden_size, eps);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchRows(cudaStream_t stream, const RmsNormParams& params,
                       int64_t first_row, int64_t num_rows) {
  const int64_t hidden_size = params.hidden_size;
  const int64_t start = first_row * hidden_size;
  const T* input = static_cast<const T*>(params.input) + start;
  const T* weight = static_cast<const T*>(params.weight);
  T* out = static_cast<T*>(params.out) + start;
  const int64_t row_vectors = hidden_size / kWideSize<T>;
  const bool wide = hidden_size % kWideSize<T> == 0 && IsAligned(input, 16) &&
                    IsAligned(weight, 16) && IsAligned(out, 16) &&
                    row_vectors <= kMaxVectors * kMaxThreads;
  if (!wide) {
    const int threads = static_cast<int>(
        std::min<int64_t>(kMaxThreads, (hidden_size + 31) / 32 * 32));
    RmsNormScalarKernel<T>
        <<<static_cast<unsigned>(num_rows), threads, 0, stream>>>(
            input, weight, out, hidden_size, params.eps);
    return cudaGetLastError();
  }
  const float hidden = static_cast<float>(hidden_size);
  switch (VectorsPerThread(row_vectors, num_rows <= kFewRows)) {
    case 1:
      return LaunchVectors<T, 1>(stream, input, weight, out, num_rows,
                                 row_vectors, hidden, params.eps);
    case 2:
      return LaunchVectors<T, 2>(stream, input, weight, out, num_rows,
                                 row_vectors, hidden, params.eps);
    default:
      return LaunchVectors<T, kMaxVectors>(stream, input, weight, out, num_rows,
                                           row_vectors, hidden, params.eps);
  }
}

}  // namespace

cudaError_t LaunchRmsNorm(cudaStream_t stream, const RmsNormParams& params) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return cudaSuccess;
  // A grid has at most 2^31 - 1 blocks; more rows take more launches.
  constexpr int64_t kMaxRows = INT32_MAX;
  for (int64_t row = 0; row < params.num_tokens; row += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, params.num_tokens - row);
    const cudaError_t error = DispatchFloat(params.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return LaunchRows<T>(stream, params, row, rows);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace xla_ops
