// The gradients of merge_attn_states on CUDA: bound by memory. The threads of a
// head read a vector of each of gradient and results, 16 bytes where head_dim
// and alignment allow and one element where they do not, write two, and add up
// what the lse's gradients need on the way.
//
// Tested by tests/gpu/check_gradients.py and
// tests/ops/test_merge_attn_states_backward.py.

#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward.h"

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;

// Threads: x runs over the vectors of a head, y and blockIdx.x over rows
// (token, head). blockDim.x is a power of two up to 32, or a multiple of 32
// with one row a block. Vectors are aligned (checked by the launcher).
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) MergeAttnStatesBackwardKernel(
    const T* __restrict__ grad_output,     // [num_tokens, num_heads, head_dim]
    const float* __restrict__ grad_lse,    // [num_heads, num_tokens] or null
    const T* __restrict__ prefix,          // [num_tokens, num_heads, head_dim]
    const float* __restrict__ prefix_lse,  // [num_heads, num_tokens]
    const T* __restrict__ suffix,          // as prefix
    const float* __restrict__ suffix_lse,  // as prefix_lse
    T* __restrict__ dprefix, float* __restrict__ dprefix_lse,
    T* __restrict__ dsuffix, float* __restrict__ dsuffix_lse, int64_t first_row,
    int64_t num_rows, int64_t num_tokens, int64_t num_heads,
    int64_t head_vectors) {
  __shared__ WarpResults scratch;
  const int64_t row =
      first_row + int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  // Has nothing to do, yet takes part in the reduction.
  const bool in_range = row < num_rows;
  float prefix_weight = 1.0f;
  float suffix_weight = 0.0f;
  bool is_empty = true;
  int64_t at = 0;
  if (in_range) {
    const int64_t token = row / num_heads;
    at = (row - token * num_heads) * num_tokens + token;
    float p = prefix_lse[at];
    float s = suffix_lse[at];
    if (p == CUDART_INF_F) p = -CUDART_INF_F;
    if (s == CUDART_INF_F) s = -CUDART_INF_F;
    is_empty = p == -CUDART_INF_F && s == -CUDART_INF_F;
    if (!is_empty) {
      const float max = p > s ? p : s;
      prefix_weight = expf(p - max);
      suffix_weight = expf(s - max);
      const float sum = prefix_weight + suffix_weight;
      prefix_weight /= sum;
      suffix_weight /= sum;
    }
  }

  float sum = 0.0f;
  for (int64_t v = threadIdx.x; in_range && v < head_vectors; v += blockDim.x) {
    const int64_t i = (row * head_vectors + v) * kSize;
    const Vector<T, kSize> g = LoadEagerly<kSize>(grad_output + i);
    const Vector<T, kSize> x = LoadEagerly<kSize>(prefix + i);
    const Vector<T, kSize> y = LoadEagerly<kSize>(suffix + i);
    Vector<T, kSize> dx;
    Vector<T, kSize> dy;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float gj = ToFloat(g[j]);
      sum += gj * (ToFloat(x[j]) - ToFloat(y[j]));
      dx[j] = FromFloat<T>(prefix_weight == 0.0f ? 0.0f : prefix_weight * gj);
      dy[j] = FromFloat<T>(suffix_weight == 0.0f ? 0.0f : suffix_weight * gj);
    }
    StoreGlobal(dprefix + i, dx);
    StoreGlobal(dsuffix + i, dy);
  }
  sum = blockDim.x <= 32 ? WarpSum(sum, blockDim.x)
                         : BlockSum<kThreads / 32>(sum, scratch);

  if (in_range && threadIdx.x == 0) {
    const float both = prefix_weight * suffix_weight;
    const float shift = both == 0.0f ? 0.0f : both * sum;
    const float lse = grad_lse == nullptr || is_empty ? 0.0f : grad_lse[at];
    dprefix_lse[at] = shift + prefix_weight * lse;
    dsuffix_lse[at] = suffix_weight * lse - shift;
  }
}

template <typename T, int kSize>
cudaError_t LaunchVectors(cudaStream_t stream,
                          const MergeAttnStatesBackwardParams& params) {
  const int64_t head_vectors = params.head_dim / kSize;
  const int64_t num_rows = params.num_tokens * params.num_heads;
  const dim3 block =
      RowBlock(head_vectors, kThreads, head_vectors <= 32 ? kThreads : 1);
  return ForEachGrid(num_rows, block.y, [&](int64_t first, int64_t rows) {
    return LaunchKernel<MergeAttnStatesBackwardKernel<T, kSize>>(
        stream, static_cast<unsigned>(CeilDivide(rows, block.y)), block,
        static_cast<const T*>(params.grad_output), params.grad_lse,
        static_cast<const T*>(params.prefix_output), params.prefix_lse,
        static_cast<const T*>(params.suffix_output), params.suffix_lse,
        static_cast<T*>(params.dprefix_output), params.dprefix_lse,
        static_cast<T*>(params.dsuffix_output), params.dsuffix_lse, first,
        first + rows, params.num_tokens, params.num_heads, head_vectors);
  });
}

}  // namespace

cudaError_t LaunchMergeAttnStatesBackward(
    cudaStream_t stream, const MergeAttnStatesBackwardParams& params) {
  // With a head_dim of zero the lse still have gradients.
  if (params.num_tokens == 0 || params.num_heads == 0) return cudaSuccess;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool wide = params.head_dim % kWideSize<T> == 0;
    for (const void* pointer :
         {params.grad_output, params.prefix_output, params.suffix_output,
          static_cast<const void*>(params.dprefix_output),
          static_cast<const void*>(params.dsuffix_output)}) {
      wide = wide && IsAligned(pointer, 16);
    }
    return wide ? LaunchVectors<T, kWideSize<T>>(stream, params)
                : LaunchVectors<T, 1>(stream, params);
  });
}

}  // namespace xla_ops
