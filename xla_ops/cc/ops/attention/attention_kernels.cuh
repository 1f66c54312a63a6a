// How the attention kernels are loaded and launched, and the functions by
// which attention.cu.cc reaches those that attention_fp8.cu.cc compiles: two
// sources, for the compiler takes minutes.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_KERNELS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_KERNELS_CUH_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/cluster.cuh"
#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/ops/attention/attention_args.cuh"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_head_dims.h"
#include "xla_ops/cc/ops/attention/attention_mma_decode.cuh"
#include "xla_ops/cc/ops/attention/attention_mma_prefill.cuh"
#include "xla_ops/cc/ops/attention/attention_simt.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// Those for 8-bit keys and values.
cudaError_t PrepareMmaFp8(bool clusters);
cudaError_t PrepareSimtFp8();
cudaError_t LaunchMmaFp8(cudaStream_t stream, const AttentionArgs& args,
                         int rows, int multiprocessors);
cudaError_t LaunchSimtFp8(cudaStream_t stream, const AttentionArgs& args);

// Calls f(shape, kernel) for a kernel for decode.
template <typename T, bool kFp8, int kHeadDim, DecodeForm kForm, typename F>
cudaError_t WithDecodeKernel(F&& f) {
  return f(MmaDecodeShape<kFp8, kHeadDim, kForm>{},
           AttentionMmaDecodeKernel<T, kFp8, kHeadDim, kForm>);
}

// Calls f(shape, kernel) for the kernel of tiles of `rows` packed rows, for
// decode the one of a form.
template <typename T, bool kFp8, int kHeadDim, typename F>
cudaError_t WithMmaKernel(int rows, DecodeForm form, F&& f) {
  if (rows == kDecodeRows) {
    switch (form) {
      case DecodeForm::kSlots:
        return WithDecodeKernel<T, kFp8, kHeadDim, DecodeForm::kSlots>(f);
      case DecodeForm::kCluster:
        return WithDecodeKernel<T, kFp8, kHeadDim, DecodeForm::kCluster>(f);
      case DecodeForm::kShort:  // of 8-bit keys alone
        return WithDecodeKernel<T, kFp8, kHeadDim,
                                kFp8 ? DecodeForm::kShort
                                     : DecodeForm::kCluster>(f);
      case DecodeForm::kPlain:
        return WithDecodeKernel<T, kFp8, kHeadDim, DecodeForm::kPlain>(f);
    }
  }
  if constexpr (kHeadDim <= kMmaManyRowsMaxHeadDim) {
    if (rows == kMmaManyRows) {
      return f(MmaPrefillShape<kFp8, kHeadDim, kMmaManyRows>{},
               AttentionMmaPrefillKernel<T, kFp8, kHeadDim, kMmaManyRows>);
    }
  }
  return f(MmaPrefillShape<kFp8, kHeadDim, kMmaFewRows>{},
           AttentionMmaPrefillKernel<T, kFp8, kHeadDim, kMmaFewRows>);
}

// `clusters`: whether the device has any, for which older ones may not be
// asked.
template <typename T, bool kFp8>
cudaError_t PrepareMma(bool clusters) {
  return ForEachHeadDim([clusters](auto padded) {
    constexpr int kHeadDim = decltype(padded)::value;
    const auto load = [](auto shape, auto* kernel) {
      return LoadKernel(kernel, decltype(shape)::kSharedBytes);
    };
    const auto load_cluster = [&](auto shape, auto* kernel) {
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      return error == cudaSuccess ? load(shape, kernel) : error;
    };
    cudaError_t error =
        WithMmaKernel<T, kFp8, kHeadDim>(kDecodeRows, DecodeForm::kSlots, load);
    for (const DecodeForm form : {DecodeForm::kCluster, DecodeForm::kShort}) {
      if (error != cudaSuccess || !clusters) break;
      error = WithMmaKernel<T, kFp8, kHeadDim>(kDecodeRows, form, load_cluster);
    }
    for (const int rows : {kDecodeRows, kMmaFewRows, kMmaManyRows}) {
      if (error != cudaSuccess) return error;
      error = WithMmaKernel<T, kFp8, kHeadDim>(rows, DecodeForm::kPlain, load);
    }
    return error;
  });
}

template <typename KV>
cudaError_t PrepareSimt() {
  return ForEachHeadDim([](auto padded) {
    return LoadKernel(AttentionSimtKernel<KV, decltype(padded)::value>);
  });
}

// Whether the device can hold a cluster of kMaxClusterSplits of a kernel's
// blocks.
inline bool CanCluster(const void* kernel, int threads, int shared_bytes) {
  const dim3 blocks(1, 1, kMaxClusterSplits);
  const ClusterLaunch launch(nullptr, blocks, blocks, threads, shared_bytes);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) !=
      cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // it cannot, then
    return false;
  }
  return clusters > 0;
}

// All splits of a tile and KV head are a cluster.
template <typename Kernel>
cudaError_t LaunchClusters(cudaStream_t stream, Kernel* kernel, dim3 grid,
                           int threads, int shared_bytes,
                           const AttentionArgs& args) {
  const ClusterLaunch launch(stream, grid, dim3(1, 1, grid.z), threads,
                             shared_bytes, args.overlaps);
  void* pointers[] = {const_cast<AttentionArgs*>(&args)};
  const cudaError_t error = cudaLaunchKernelExC(
      &launch.config, reinterpret_cast<const void*>(kernel), pointers);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Launches a kernel over tiles, KV heads and splits. With slots there are
// enough blocks more for each of every KV head.
template <typename Kernel>
cudaError_t LaunchTiles(cudaStream_t stream, Kernel* kernel, int tile_rows,
                        int threads, int shared_bytes,
                        const AttentionArgs& args) {
  const int64_t tiles = NumTiles(args, tile_rows);
  const int64_t more =
      (int64_t{args.num_slots} * args.num_kv_heads + tiles - 1) / tiles;
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(args.num_kv_heads + more),
                  static_cast<unsigned>(args.num_splits));
  if (args.clustered) {
    return LaunchClusters(stream, kernel, grid, threads, shared_bytes, args);
  }
  return LaunchOverlapping(stream, kernel, grid, dim3(threads), args.overlaps,
                           args, shared_bytes);
}

// The same in sections of heads, tile by tile from the last. Where later rows
// see more, blocks so end together: the heaviest tile of the last section's
// last sequence takes twice as long as the average one, so that the section has
// to hold twice the blocks that run at once. More heads would only ask for more
// of the L2 cache at a time.
template <typename Kernel>
cudaError_t LaunchSections(cudaStream_t stream, Kernel* kernel, int tile_rows,
                           int threads, int shared_bytes, int multiprocessors,
                           AttentionArgs args) {
  constexpr int64_t kBlocks = 2;  // of a multiprocessor
  const auto ceil_divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles = NumTiles(args, tile_rows);
  int64_t heads = 1;
  if (args.window_right >= 0) {
    const int64_t seqs = std::max(1, args.max_num_seqs);
    heads = std::min({ceil_divide(2 * kBlocks * multiprocessors * seqs, tiles),
                      int64_t{args.num_kv_heads}, INT32_MAX / tiles});
  }
  const int64_t sections = ceil_divide(args.num_kv_heads, heads);
  args.section_heads =
      static_cast<int>(ceil_divide(args.num_kv_heads, sections));
  const dim3 grid(static_cast<unsigned>(tiles * args.section_heads),
                  static_cast<unsigned>(sections),
                  static_cast<unsigned>(args.num_splits));
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

// Whether a call's splits are a cluster, and have few tokens, by their bound.
inline DecodeForm FormOf(const AttentionArgs& args) {
  if (args.clustered) {
    const int tokens = args.max_kv_len / args.num_splits;
    return tokens <= kShortTileTokens ? DecodeForm::kShort
                                      : DecodeForm::kCluster;
  }
  return args.num_slots > 0 ? DecodeForm::kSlots : DecodeForm::kPlain;
}

// `rows`: MmaTileRows, or kDecodeRows with few_rows.
template <typename T, bool kFp8>
cudaError_t LaunchMma(cudaStream_t stream, const AttentionArgs& args, int rows,
                      int multiprocessors) {
  return DispatchHeadDim(args.head_dim, [&](auto padded) {
    return WithMmaKernel<T, kFp8, decltype(padded)::value>(
        rows, FormOf(args), [&](auto shape, auto* kernel) {
          using Shape = decltype(shape);
          if (Shape::kTileRows == kDecodeRows) {
            return LaunchTiles(stream, kernel, Shape::kTileRows,
                               Shape::kThreads, Shape::kSharedBytes, args);
          }
          return LaunchSections(stream, kernel, Shape::kTileRows,
                                Shape::kThreads, Shape::kSharedBytes,
                                multiprocessors, args);
        });
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
