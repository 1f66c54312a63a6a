// Merges two attention results on CUDA: bound by memory. A thread reads one
// vector of each result, 16 bytes where head_dim and alignment allow and one
// element where they do not, and computes its head's weights itself.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_merge_attn_states.py.

#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states.h"

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;

// 64-bit division costs some 100 instructions; rows nearly always fit in 32
// bits.
__device__ __forceinline__ int64_t DivideRow(int64_t row, int64_t num_heads) {
  if (((row | num_heads) >> 32) == 0) {
    return static_cast<uint32_t>(row) / static_cast<uint32_t>(num_heads);
  }
  return row / num_heads;
}

// Threads: x runs over the vectors of a head, y and blockIdx.x over rows
// (token, head). Results are aligned to a vector (checked by the launcher).
// `output` may be `prefix` or `suffix`: a thread reads its vectors before it
// writes. `output_lse` is apart from the other two, as all threads of a row
// read those and one writes it.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    MergeAttnStatesKernel(const T* prefix, const float* __restrict__ prefix_lse,
                          const T* suffix, const float* __restrict__ suffix_lse,
                          T* output, float* __restrict__ output_lse,
                          int64_t first_row, int64_t num_rows,
                          int64_t num_tokens, int64_t num_heads,
                          int64_t head_vectors) {
  const int64_t row =
      first_row + int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const int64_t token = DivideRow(row, num_heads);
  const int64_t at = (row - token * num_heads) * num_tokens + token;
  float p = prefix_lse[at];
  float s = suffix_lse[at];
  if (p == CUDART_INF_F) p = -CUDART_INF_F;
  if (s == CUDART_INF_F) s = -CUDART_INF_F;
  float prefix_weight = 1.0f;
  float suffix_weight = 0.0f;
  float lse = -CUDART_INF_F;
  if (p != -CUDART_INF_F || s != -CUDART_INF_F) {
    const float max = p > s ? p : s;
    prefix_weight = expf(p - max);
    suffix_weight = expf(s - max);
    const float sum = prefix_weight + suffix_weight;
    prefix_weight /= sum;
    suffix_weight /= sum;
    lse = logf(sum) + max;
  }
  if (threadIdx.x == 0) output_lse[at] = lse;

  for (int64_t v = threadIdx.x; v < head_vectors; v += blockDim.x) {
    const int64_t i = (row * head_vectors + v) * kSize;
    const Vector<T, kSize> x = LoadVector<kSize>(prefix + i);
    const Vector<T, kSize> y = LoadVector<kSize>(suffix + i);
    Vector<T, kSize> result;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float a =
          prefix_weight == 0.0f ? 0.0f : ToFloat(x[j]) * prefix_weight;
      const float b =
          suffix_weight == 0.0f ? 0.0f : ToFloat(y[j]) * suffix_weight;
      result[j] = FromFloat<T>(a + b);
    }
    StoreGlobal(output + i, result);
  }
}

template <typename T, int kSize>
cudaError_t LaunchVectors(cudaStream_t stream,
                          const MergeAttnStatesParams& params) {
  const int64_t head_vectors = params.head_dim / kSize;
  const int64_t num_rows = params.num_tokens * params.num_heads;
  const dim3 block = RowBlock(head_vectors, kThreads, kThreads);
  return ForEachGrid(num_rows, block.y, [&](int64_t first, int64_t rows) {
    return LaunchKernel<MergeAttnStatesKernel<T, kSize>>(
        stream, static_cast<unsigned>(CeilDivide(rows, block.y)), block,
        static_cast<const T*>(params.prefix_output), params.prefix_lse,
        static_cast<const T*>(params.suffix_output), params.suffix_lse,
        static_cast<T*>(params.output), params.output_lse, first, first + rows,
        params.num_tokens, params.num_heads, head_vectors);
  });
}

}  // namespace

cudaError_t LaunchMergeAttnStates(cudaStream_t stream,
                                  const MergeAttnStatesParams& params) {
  // With a head_dim of zero the lse is still merged.
  if (params.num_tokens == 0 || params.num_heads == 0) return cudaSuccess;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = params.head_dim % kWideSize<T> == 0 &&
                      IsAligned(params.prefix_output, 16) &&
                      IsAligned(params.suffix_output, 16) &&
                      IsAligned(params.output, 16);
    return wide ? LaunchVectors<T, kWideSize<T>>(stream, params)
                : LaunchVectors<T, 1>(stream, params);
  });
}

}  // namespace xla_ops
