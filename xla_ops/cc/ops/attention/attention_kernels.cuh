// How the attention kernels are loaded and launched, and the functions by
// which attention.cu.cc reaches those that attention_fp8.cu.cc compiles: two
// sources, for the compiler takes minutes.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_KERNELS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_KERNELS_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_head_dims.h"
#include "xla_ops/cc/ops/attention/attention_mma.cuh"
#include "xla_ops/cc/ops/attention/attention_simt.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// Those for 8-bit keys and values.
cudaError_t PrepareMmaFp8();
cudaError_t PrepareSimtFp8();
cudaError_t LaunchMmaFp8(cudaStream_t stream, const AttentionArgs& args);
cudaError_t LaunchSimtFp8(cudaStream_t stream, const AttentionArgs& args);

template <typename T, bool kFp8>
cudaError_t PrepareMma() {
  return ForEachHeadDim([](auto padded) {
    constexpr int kHeadDim = decltype(padded)::value;
    const cudaError_t error =
        LoadKernel(AttentionMmaKernel<T, kFp8, kHeadDim, 1>,
                   MmaShape<kFp8, kHeadDim, 1>::kSharedBytes);
    if (error != cudaSuccess) return error;
    return LoadKernel(AttentionMmaKernel<T, kFp8, kHeadDim, 4>,
                      MmaShape<kFp8, kHeadDim, 4>::kSharedBytes);
  });
}

template <typename KV>
cudaError_t PrepareSimt() {
  return ForEachHeadDim([](auto padded) {
    return LoadKernel(AttentionSimtKernel<KV, decltype(padded)::value>);
  });
}

// Launches a kernel over as many tiles of `tile_rows` packed rows as any
// cu_seqlens_q could need (attention_tiles.cuh), KV heads and splits. All
// fit: the limits in attention.h and kTileRows >= 4 keep `tiles` below 2^31.
template <typename Kernel>
cudaError_t LaunchTiles(cudaStream_t stream, Kernel* kernel, int tile_rows,
                        int threads, int shared_bytes,
                        const AttentionArgs& args) {
  const int64_t group = args.group.value();
  // With few_rows, a tile a segment.
  const int64_t tiles =
      (args.few_rows > 0 ? 0 : args.num_tokens * group / tile_rows) +
      args.max_num_seqs + 2;
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(args.num_kv_heads),
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
    // The short tile where it holds the average sequence, as in decode.
    const int64_t rows = int64_t{args.num_tokens} * args.group.value();
    if (args.few_rows > 0 || rows <= int64_t{kDecodeRows} * args.max_num_seqs) {
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
