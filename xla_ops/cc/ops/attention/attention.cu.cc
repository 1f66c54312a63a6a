// Launches paged attention on CUDA: picks a kernel, sizes its grid from
// bounds alone, and combines the splits.
//
//   attention_tiles.cuh    tiles, masks, addresses
//   attention_mma.cuh      fp16 and bf16 on tensor cores, sm_80 on;
//                                its pieces in attention_mma_tile.cuh
//   attention_simt.cuh     everything else
//   attention_combine.cuh  splits; debug report
//
// Tested by tests/gpu/check_kernels.py and tests/test_paged_attention.py.

#include "xla_ops/cc/ops/attention/attention.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_combine.cuh"
#include "xla_ops/cc/ops/attention/attention_launch.h"
#include "xla_ops/cc/ops/attention/attention_mma.cuh"
#include "xla_ops/cc/ops/attention/attention_simt.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {
namespace {

// Calls f(std::integral_constant<int, N>) with the head_dim that a kernel is
// compiled for, N >= head_dim.
template <typename F>
cudaError_t DispatchHeadDim(int64_t head_dim, F&& f) {
  if (head_dim <= 64) return f(std::integral_constant<int, 64>{});
  if (head_dim <= 128) return f(std::integral_constant<int, 128>{});
  if (head_dim <= 256) return f(std::integral_constant<int, 256>{});
  return cudaErrorInvalidValue;
}

template <typename Kernel>
cudaError_t AllowSharedMemory(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Loading a kernel is a side effect of asking for its attributes.
template <typename Kernel>
cudaError_t LoadKernel(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

template <typename T, int kHeadDim>
cudaError_t PrepareKernels(bool has_mma) {
  cudaError_t error = LoadKernel(AttentionSimtKernel<T, kHeadDim, true>);
  if (error != cudaSuccess) return error;
  error = LoadKernel(AttentionSimtKernel<T, kHeadDim, false>);
  if (error != cudaSuccess) return error;
  error = LoadKernel(AttentionCombineKernel<T>);
  if constexpr (!std::is_same_v<T, float>) {
    if (!has_mma || error != cudaSuccess) return error;
    error = AllowSharedMemory(AttentionMmaKernel<T, kHeadDim, 1>,
                              MmaShape<kHeadDim, 1>::kSharedBytes);
    if (error != cudaSuccess) return error;
    error = AllowSharedMemory(AttentionMmaKernel<T, kHeadDim, 4>,
                              MmaShape<kHeadDim, 4>::kSharedBytes);
  }
  return error;
}

// Prepares all kernels for the current device, once, and says whether the
// tensor-core ones that were loaded for it were compiled for an architecture
// that has the instructions. One query serves all of them: they are compiled
// together.
cudaError_t Prepare(bool* has_mma) {
  static PerDevice<bool> prepared;
  return prepared.Get(
      [](bool* result) {
        cudaFuncAttributes attributes;
        cudaError_t error = cudaFuncGetAttributes(
            &attributes, AttentionMmaKernel<__half, 64, 1>);
        if (error != cudaSuccess) return error;
        *result = attributes.ptxVersion >= 80;
        for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
          for (const int head_dim : {64, 128, 256}) {
            if (error != cudaSuccess) return error;
            error = DispatchFloat(dtype, [&](auto tag) {
              return DispatchHeadDim(head_dim, [&](auto padded) {
                return PrepareKernels<typename decltype(tag)::type,
                                      decltype(padded)::value>(*result);
              });
            });
          }
        }
        return error;
      },
      has_mma);
}

// Tiles of `rows` packed rows that any query_start_loc could need
// (attention_tiles.cuh).
int64_t MaxTiles(const AttentionParams& params, int64_t rows) {
  const int64_t group = params.num_heads / params.num_kv_heads;
  return params.num_tokens * group / rows + params.max_num_seqs + 2;
}

// Launches a kernel over tiles, KV heads and splits.
template <typename Kernel>
cudaError_t LaunchTiles(cudaStream_t stream, Kernel* kernel, int64_t tiles,
                        const AttentionParams& params, int threads,
                        int shared_bytes, const AttentionArgs& args) {
  if (tiles > INT32_MAX || params.num_kv_heads > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(params.num_kv_heads),
                  static_cast<unsigned>(args.num_splits));
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int kHeadDim>
cudaError_t LaunchMma(cudaStream_t stream, const AttentionParams& params,
                      const AttentionArgs& args) {
  // The short tile where 16 rows hold the average sequence, as in decode.
  const int64_t group = params.num_heads / params.num_kv_heads;
  const auto launch = [&](auto warps_m) {
    constexpr int kWarpsM = decltype(warps_m)::value;
    using Shape = MmaShape<kHeadDim, kWarpsM>;
    return LaunchTiles(stream, AttentionMmaKernel<T, kHeadDim, kWarpsM>,
                       MaxTiles(params, Shape::kTileRows), params,
                       Shape::kThreads, Shape::kSharedBytes, args);
  };
  if (params.num_tokens * group <= 16 * params.max_num_seqs) {
    return launch(std::integral_constant<int, 1>{});
  }
  return launch(std::integral_constant<int, 4>{});
}

template <typename T, int kHeadDim>
cudaError_t LaunchSimt(cudaStream_t stream, const AttentionParams& params,
                       const AttentionArgs& args, bool aligned) {
  const int64_t tiles = MaxTiles(params, SimtShape::kTileRows);
  return LaunchTiles(stream,
                     aligned ? AttentionSimtKernel<T, kHeadDim, true>
                             : AttentionSimtKernel<T, kHeadDim, false>,
                     tiles, params, SimtShape::kThreads, 0, args);
}

// Whether every row of query, caches and out starts on 16 bytes.
bool RowsAligned(const AttentionParams& params) {
  const int64_t size = 16 / SizeOf(params.dtype);
  return IsAligned(params.query, 16) && IsAligned(params.key_cache, 16) &&
         IsAligned(params.value_cache, 16) && IsAligned(params.out, 16) &&
         params.head_dim % size == 0 && params.block_stride % size == 0 &&
         params.page_stride % size == 0 && params.head_stride % size == 0;
}

// A sequence's splits hold at least one piece of 64 tokens each at the
// longest context; more would only add empty ones.
int ChooseSplits(const AttentionParams& params, int64_t max_context) {
  const int64_t pieces = std::max<int64_t>(1, (max_context + 63) / 64);
  return static_cast<int>(std::min(params.num_splits, pieces));
}

AttentionArgs MakeArgs(const AttentionParams& params) {
  AttentionArgs args = {};
  args.query = params.query;
  args.key_cache = params.key_cache;
  args.value_cache = params.value_cache;
  args.context_lens = params.context_lens;
  args.block_tables = params.block_tables;
  args.query_start_loc = params.query_start_loc;
  args.num_seqs = params.num_seqs;
  args.out = params.out;
  args.num_tokens = params.num_tokens;
  args.max_blocks = params.max_blocks;
  args.block_stride = params.block_stride;
  args.page_stride = params.page_stride;
  args.head_stride = params.head_stride;
  args.page_size = FastDiv(std::max<int64_t>(1, params.page_size));
  args.group = FastDiv(params.num_heads / params.num_kv_heads);
  args.num_blocks = static_cast<uint32_t>(
      std::min(params.num_blocks, int64_t{INT32_MAX} + 1));
  args.num_heads = static_cast<int>(params.num_heads);
  args.head_dim = static_cast<int>(params.head_dim);
  args.max_num_seqs = static_cast<int>(params.max_num_seqs);
  // Divided first: the product may not fit in 64 bits.
  args.max_context =
      params.page_size == 0 || params.max_blocks == 0 ? 0
      : params.max_blocks > INT32_MAX / params.page_size
          ? INT32_MAX
          : static_cast<int>(params.max_blocks * params.page_size);
  args.num_splits = ChooseSplits(params, args.max_context);
  // A window that reaches past the first possible token hides nothing.
  args.sliding_window = params.sliding_window >= INT32_MAX
                            ? 0
                            : static_cast<int>(params.sliding_window);
  args.scale = params.scale * kLog2E;
  if (params.soft_cap > 0.0f) {
    args.scale = params.scale / params.soft_cap;
    args.soft_cap = params.soft_cap * kLog2E;
  }
  if (args.num_splits > 1) {
    const int64_t rows = args.num_splits * params.num_tokens * params.num_heads;
    args.partial_out = static_cast<float*>(params.workspace);
    args.partial_max = args.partial_out + rows * params.head_dim;
    args.partial_sum = args.partial_max + rows;
  }
  return args;
}

}  // namespace

cudaError_t PrepareAttention() {
  bool has_mma = false;
  return Prepare(&has_mma);
}

cudaError_t LaunchAttention(cudaStream_t stream,
                                 const AttentionParams& params) {
  if (params.num_tokens == 0 || params.num_heads == 0 || params.head_dim == 0) {
    return cudaSuccess;
  }
  bool has_mma = false;
  cudaError_t error = Prepare(&has_mma);
  if (error != cudaSuccess) return error;

  const AttentionArgs args = MakeArgs(params);
  if (args.num_splits > 1 &&
      (!IsAligned(params.workspace, 16) ||
       params.workspace_bytes <
           AttentionWorkspaceBytes(params.num_tokens, params.num_heads,
                                        params.head_dim, args.num_splits))) {
    return cudaErrorInvalidValue;
  }
  if (params.debug) {
    const int blocks = std::max(1, args.max_num_seqs);
    ReportAttentionKernel<<<blocks, 128, 0, stream>>>(args);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  const bool aligned = RowsAligned(params);
  return DispatchFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const cudaError_t error =
        DispatchHeadDim(params.head_dim, [&](auto padded) {
          constexpr int kHeadDim = decltype(padded)::value;
          if constexpr (!std::is_same_v<T, float>) {
            if (has_mma && aligned) {
              return LaunchMma<T, kHeadDim>(stream, params, args);
            }
          }
          return LaunchSimt<T, kHeadDim>(stream, params, args, aligned);
        });
    if (error != cudaSuccess || args.num_splits == 1) return error;
    const int64_t warps = params.num_tokens * params.num_heads;
    const int64_t blocks =
        (warps + kCombineThreads / 32 - 1) / (kCombineThreads / 32);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    AttentionCombineKernel<T>
        <<<static_cast<unsigned>(blocks), kCombineThreads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace xla_ops
