// How the attention kernels are loaded and launched, and the functions by
// which attention.cu.cc reaches those that attention_fp8.cu.cc compiles: two
// sources, for the compiler takes minutes.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_KERNELS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_KERNELS_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/ops/attention/attention_mma.cuh"
#include "xla_ops/cc/ops/attention/attention_simt.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// Those for 8-bit keys and values: tensor cores (`use_mma`) or not.
cudaError_t PrepareAttentionFp8(bool has_mma);
cudaError_t LaunchAttentionFp8(cudaStream_t stream, const AttentionArgs& args,
                               bool use_mma);

// Calls f(std::integral_constant<int, N>) with the head_dim that a kernel is
// compiled for, N >= head_dim.
template <typename F>
cudaError_t DispatchHeadDim(int64_t head_dim, F&& f) {
  if (head_dim <= 64) return f(std::integral_constant<int, 64>{});
  if (head_dim <= 128) return f(std::integral_constant<int, 128>{});
  if (head_dim <= 256) return f(std::integral_constant<int, 256>{});
  return cudaErrorInvalidValue;
}

// Loads a kernel, a side effect of asking for its attributes, and lets it
// have its dynamic shared memory.
template <typename Kernel>
cudaError_t PrepareKernel(Kernel* kernel, int shared_bytes = 0) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || shared_bytes == 0) return error;
  return cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

template <typename T, bool kFp8>
cudaError_t PrepareMma() {
  cudaError_t error = cudaSuccess;
  for (const int head_dim : {64, 128, 256}) {
    if (error != cudaSuccess) return error;
    error = DispatchHeadDim(head_dim, [](auto padded) {
      constexpr int kHeadDim = decltype(padded)::value;
      const cudaError_t error =
          PrepareKernel(AttentionMmaKernel<T, kFp8, kHeadDim, 1>,
                        MmaShape<kFp8, kHeadDim, 1>::kSharedBytes);
      if (error != cudaSuccess) return error;
      return PrepareKernel(AttentionMmaKernel<T, kFp8, kHeadDim, 4>,
                           MmaShape<kFp8, kHeadDim, 4>::kSharedBytes);
    });
  }
  return error;
}

template <typename KV>
cudaError_t PrepareSimt() {
  cudaError_t error = PrepareKernel(AttentionSimtKernel<KV, 64>);
  if (error == cudaSuccess) error = PrepareKernel(AttentionSimtKernel<KV, 128>);
  if (error == cudaSuccess) error = PrepareKernel(AttentionSimtKernel<KV, 256>);
  return error;
}

// Launches a kernel over as many tiles of `tile_rows` packed rows as any
// cu_seqlens_q could need (attention_tiles.cuh), KV heads and splits. All
// fit: the limits in attention.h and kTileRows >= 4 keep `tiles` below 2^31.
template <typename Kernel>
cudaError_t LaunchTiles(cudaStream_t stream, Kernel* kernel, int tile_rows,
                        int threads, int shared_bytes,
                        const AttentionArgs& args) {
  const int64_t group = args.group.value();
  const int64_t tiles =
      args.num_tokens * group / tile_rows + args.max_num_seqs + 2;
  const int64_t num_kv_heads = args.num_heads / group;
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(num_kv_heads),
                  static_cast<unsigned>(args.num_splits));
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, bool kFp8>
cudaError_t LaunchMma(cudaStream_t stream, const AttentionArgs& args) {
  return DispatchHeadDim(args.head_dim, [&](auto padded) {
    constexpr int kHeadDim = decltype(padded)::value;
    const auto launch = [&](auto warps_m) {
      constexpr int kWarpsM = decltype(warps_m)::value;
      using Shape = MmaShape<kFp8, kHeadDim, kWarpsM>;
      return LaunchTiles(stream, AttentionMmaKernel<T, kFp8, kHeadDim, kWarpsM>,
                         Shape::kTileRows, Shape::kThreads, Shape::kSharedBytes,
                         args);
    };
    // The short tile where 16 rows hold the average sequence, as in decode.
    const int64_t rows = int64_t{args.num_tokens} * args.group.value();
    if (rows <= int64_t{16} * args.max_num_seqs) {
      return launch(std::integral_constant<int, 1>{});
    }
    return launch(std::integral_constant<int, 4>{});
  });
}

template <typename KV>
cudaError_t LaunchSimt(cudaStream_t stream, const AttentionArgs& args) {
  return DispatchHeadDim(args.head_dim, [&](auto padded) {
    return LaunchTiles(stream, AttentionSimtKernel<KV, decltype(padded)::value>,
                       SimtShape::kTileRows, SimtShape::kThreads, 0, args);
  });
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_KERNELS_CUH_
