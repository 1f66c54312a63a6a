// How the kernels of attention's gradient but Hopper's are loaded and launched,
// and the functions by which attention_backward.cu.cc reaches those for bf16,
// which attention_backward_bf16.cu.cc compiles: two sources, for the compiler
// takes minutes.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_KERNELS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_KERNELS_CUH_

#include <cuda_runtime.h>

#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/ops/attention/attention_head_dims.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_mma.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_rows.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_simt.cuh"

namespace xla_ops {

// Those for bf16.
cudaError_t PrepareBackwardMmaBf16();
cudaError_t LaunchBackwardMmaBf16(cudaStream_t stream,
                                  const AttentionBackwardParams& params,
                                  const AttentionBackwardArgs& args);
cudaError_t LaunchBackwardSimtBf16(cudaStream_t stream,
                                   const AttentionBackwardParams& params,
                                   const AttentionBackwardArgs& args);

template <typename T>
cudaError_t PrepareBackwardMma() {
  return ForEachHeadDim([](auto padded) {
    constexpr int kHeadDim = decltype(padded)::value;
    constexpr int kBytes = BackwardMmaShape<kHeadDim>::kSharedBytes;
    const auto load = [](auto* keys, auto* queries) {
      const cudaError_t error = LoadKernel(keys, kBytes);
      return error == cudaSuccess ? LoadKernel(queries, kBytes) : error;
    };
    const cudaError_t error =
        load(BackwardMmaKeysKernel<T, kHeadDim, false>,
             BackwardMmaQueriesKernel<T, kHeadDim, false>);
    if (error != cudaSuccess) return error;
    return load(BackwardMmaKeysKernel<T, kHeadDim, true>,
                BackwardMmaQueriesKernel<T, kHeadDim, true>);
  });
}

template <typename T>
cudaError_t LaunchBackwardDelta(cudaStream_t stream,
                                const AttentionBackwardArgs& args) {
  return LaunchKernel<BackwardDeltaKernel<T, kBackwardSimtRows, 0>>(
      stream, args.max_query_tiles * args.batch.num_heads, kDeltaThreads, args);
}

template <typename T>
cudaError_t LaunchBackwardMma(cudaStream_t stream,
                              const AttentionBackwardParams& params,
                              const AttentionBackwardArgs& args) {
  cudaError_t error = LaunchBackwardDelta<T>(stream, args);
  if (error != cudaSuccess) return error;
  return DispatchHeadDim(params.batch.head_dim, [&](auto padded) {
    constexpr int kHeadDim = decltype(padded)::value;
    using Shape = BackwardMmaShape<kHeadDim>;
    static_assert(Shape::kOwnRows == kBackwardSimtRows);
    const auto launch = [&](auto* keys, auto* queries) {
      if (params.wants_dkv && args.max_key_tiles > 0) {
        keys<<<args.max_key_tiles * args.batch.num_kv_heads, Shape::kThreads,
               Shape::kSharedBytes, stream>>>(args);
        error = cudaGetLastError();
      }
      if (params.wants_dq && error == cudaSuccess) {
        queries<<<args.max_query_tiles * args.batch.num_heads, Shape::kThreads,
                  Shape::kSharedBytes, stream>>>(args);
        error = cudaGetLastError();
      }
      return error;
    };
    return args.batch.transform
               ? launch(BackwardMmaKeysKernel<T, kHeadDim, true>,
                        BackwardMmaQueriesKernel<T, kHeadDim, true>)
               : launch(BackwardMmaKeysKernel<T, kHeadDim, false>,
                        BackwardMmaQueriesKernel<T, kHeadDim, false>);
  });
}

template <typename T>
cudaError_t LaunchBackwardSimt(cudaStream_t stream,
                               const AttentionBackwardParams& params,
                               const AttentionBackwardArgs& args) {
  cudaError_t error = LaunchBackwardDelta<T>(stream, args);
  constexpr unsigned kParts = kBackwardSimtRows / (kBackwardSimtThreads / 32);
  if (params.wants_dkv && args.max_key_tiles > 0 && error == cudaSuccess) {
    error = LaunchKernel<BackwardSimtKeysKernel<T>>(
        stream, dim3(args.max_key_tiles * args.batch.num_kv_heads, kParts),
        kBackwardSimtThreads, args);
  }
  if (!params.wants_dq || error != cudaSuccess) return error;
  const dim3 blocks(args.max_query_tiles * args.batch.num_heads, kParts);
  if (params.batch.kv_dtype != params.batch.dtype) {
    return LaunchKernel<BackwardSimtQueriesKernel<T, uint8_t>>(
        stream, blocks, kBackwardSimtThreads, args);
  }
  return LaunchKernel<BackwardSimtQueriesKernel<T, T>>(
      stream, blocks, kBackwardSimtThreads, args);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_KERNELS_CUH_
