// The head_dims that the attention kernels are compiled for; a call takes the
// next one up.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_HEAD_DIMS_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_HEAD_DIMS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace xla_ops {

// In ascending order. Shapes of tiles are given for each of them:
// MmaDecodeShape, MmaPrefillShape, Sm90Shape; a new one needs wgmma's
// overloads for it too (device/wgmma.cuh).
using AttentionHeadDims = std::integer_sequence<int, 64, 128, 256>;

// Calls f(std::integral_constant<int, N>) for each until one fails.
template <typename F, int... kHeadDims>
cudaError_t ForEachHeadDim(F&& f, std::integer_sequence<int, kHeadDims...>) {
  cudaError_t error = cudaSuccess;
  (void)(((error = f(std::integral_constant<int, kHeadDims>{})) ==
          cudaSuccess) &&
         ...);
  return error;
}
template <typename F>
cudaError_t ForEachHeadDim(F&& f) {
  return ForEachHeadDim(f, AttentionHeadDims{});
}

// Calls it for the smallest N >= head_dim.
template <typename F>
cudaError_t DispatchHeadDim(int64_t head_dim, F&& f) {
  // The first that fits, and none after it: an error stops the walk.
  cudaError_t result = cudaErrorInvalidValue;
  ForEachHeadDim([&](auto padded) {
    if (head_dim > decltype(padded)::value) return cudaSuccess;
    result = f(padded);
    return cudaErrorUnknown;
  });
  return result;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_HEAD_DIMS_H_
