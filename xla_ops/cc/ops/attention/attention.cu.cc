// Launches attention on CUDA: the kernel that attention_choice.h names, over a
// grid sized from bounds alone, and what combines the splits.
//
//   attention_sm90.h       prefill on Hopper's own tensor cores, alone or
//                          beside the next one for sequences that decode
//   attention_mma_prefill.cuh, attention_mma_decode.cuh
//                          fp16 and bf16 on tensor cores, sm_80 on; their
//                          pieces in attention_mma_tile.cuh
//   attention_simt.cuh     everything else
//   attention_combine.cuh  splits; debug report
//   attention_tiles.cuh    tiles and addresses; attention_rows.cuh: rows
//   attention_fp8.cu.cc    compiles the kernels for 8-bit keys and values
//
// Tested by tests/gpu/check_kernels.py, tests/ops/test_paged_attention.py and
// tests/ops/test_flash_attn_varlen.py.

#include "xla_ops/cc/ops/attention/attention.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_args.cuh"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_combine.cuh"
#include "xla_ops/cc/ops/attention/attention_kernels.cuh"
#include "xla_ops/cc/ops/attention/attention_launch.h"
#include "xla_ops/cc/ops/attention/attention_sm90.h"

namespace xla_ops {
namespace {

cudaError_t PrepareAttentionMma(AttentionDevice* device) {
  // One query serves all kernels but Hopper's: they are compiled together. On
  // a GPU before 8.0 their bodies are empty.
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(
      &attributes,
      AttentionMmaDecodeKernel<__half, false, 64, DecodeForm::kPlain>);
  if (error != cudaSuccess) return error;
  device->has_mma = attributes.ptxVersion >= 80;
  device->can_overlap = CanOverlap(attributes);
  if (!device->has_mma) return cudaSuccess;
  // Measured on 9.0 alone; what was compiled for an older one has none.
  const bool clusters = device->capability == 90 && attributes.ptxVersion >= 90;
  error = PrepareMma<__half, false>(clusters);
  if (error == cudaSuccess) error = PrepareMma<__nv_bfloat16, false>(clusters);
  if (error == cudaSuccess) error = PrepareMmaFp8(clusters);
  if (error != cudaSuccess || !clusters) return error;
  using Largest = MmaDecodeShape<false, 256, DecodeForm::kCluster>;
  device->has_clusters =
      CanCluster(reinterpret_cast<const void*>(
                     AttentionMmaDecodeKernel<__nv_bfloat16, false, 256,
                                              DecodeForm::kCluster>),
                 Largest::kThreads, Largest::kSharedBytes);
  return cudaSuccess;
}

// What the kernel for decode left in slots.
cudaError_t LaunchCombineSlots(cudaStream_t stream, const AttentionArgs& args,
                               bool overlap) {
  const dim3 grid(static_cast<unsigned>(args.num_kv_heads),
                  static_cast<unsigned>(args.num_slots));
  return LaunchOverlapping(stream, AttentionCombineSlotsKernel, grid,
                           32 * kShareWarps, overlap, args);
}

cudaError_t LaunchAttentionMma(cudaStream_t stream,
                               const AttentionParams& params,
                               const AttentionArgs& all_args,
                               const AttentionDevice& device) {
  const bool mixed = all_args.few_rows > 0;
  const int rows = mixed ? kDecodeRows : MmaTileRows(params, device);
  const AttentionArgs args =
      !mixed && rows == kDecodeRows ? WithSlots(params, all_args) : all_args;
  const int processors = device.multiprocessors;
  cudaError_t error;
  if (params.kv_dtype != params.dtype) {
    error = LaunchMmaFp8(stream, args, rows, processors);
  } else if (params.dtype == DType::kF16) {
    error = LaunchMma<__half, false>(stream, args, rows, processors);
  } else {
    error = LaunchMma<__nv_bfloat16, false>(stream, args, rows, processors);
  }
  if (error != cudaSuccess || args.num_slots == 0) return error;
  return LaunchCombineSlots(stream, args, device.can_overlap);
}

// Its kernels are prepared where they are the only ones.
cudaError_t PrepareMixed(AttentionDevice*) { return cudaSuccess; }

// One after the other: both fill the GPU.
cudaError_t LaunchMixed(cudaStream_t stream, const AttentionParams& params,
                        const AttentionArgs& all_args,
                        const AttentionDevice& device) {
  AttentionArgs args = all_args;
  args.few_rows = kDecodeRows;
  const cudaError_t error = LaunchAttentionSm90(stream, params, args, device);
  if (error != cudaSuccess) return error;
  return LaunchAttentionMma(stream, params, args, device);
}

cudaError_t PrepareAttentionSimt(AttentionDevice*) {
  cudaError_t error = PrepareSimt<float>();
  if (error == cudaSuccess) error = PrepareSimt<__half>();
  if (error == cudaSuccess) error = PrepareSimt<__nv_bfloat16>();
  if (error == cudaSuccess) error = PrepareSimtFp8();
  return error;
}

cudaError_t LaunchAttentionSimt(cudaStream_t stream,
                                const AttentionParams& params,
                                const AttentionArgs& args,
                                const AttentionDevice&) {
  if (params.kv_dtype != params.dtype) return LaunchSimtFp8(stream, args);
  if (params.dtype == DType::kF32) return LaunchSimt<float>(stream, args);
  return params.dtype == DType::kF16 ? LaunchSimt<__half>(stream, args)
                                     : LaunchSimt<__nv_bfloat16>(stream, args);
}

// How the kernels of attention_choice.h are loaded and launched, in its order.
struct Launcher {
  AttentionKernel kernel;
  // Loads the kernel on the current device, and adds to `device` what it can
  // do there.
  cudaError_t (*prepare)(AttentionDevice* device);
  // cudaErrorNotSupported: the driver would not, and nothing was queued, so
  // that the next kernel may be asked.
  cudaError_t (*launch)(cudaStream_t stream, const AttentionParams& params,
                        const AttentionArgs& args,
                        const AttentionDevice& device);
};

constexpr Launcher kLaunchers[] = {
    {AttentionKernel::kMixed, PrepareMixed, LaunchMixed},
    {AttentionKernel::kSm90, PrepareAttentionSm90, LaunchAttentionSm90},
    {AttentionKernel::kMma, PrepareAttentionMma, LaunchAttentionMma},
    {AttentionKernel::kSimt, PrepareAttentionSimt, LaunchAttentionSimt},
};

constexpr bool InOrder() {
  for (int i = 0; i < kNumAttentionKernels; ++i) {
    if (kLaunchers[i].kernel != static_cast<AttentionKernel>(i)) return false;
  }
  return sizeof(kLaunchers) / sizeof(kLaunchers[0]) == kNumAttentionKernels;
}
static_assert(InOrder());

cudaError_t FindDevice(AttentionDevice* result) {
  *result = {};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&value, attribute, device);
    }
    return static_cast<int16_t>(value);
  };
  const int major = get(cudaDevAttrComputeCapabilityMajor);
  const int minor = get(cudaDevAttrComputeCapabilityMinor);
  result->capability = static_cast<int16_t>(10 * major + minor);
  result->multiprocessors = get(cudaDevAttrMultiProcessorCount);
  for (const Launcher& launcher : kLaunchers) {
    if (error == cudaSuccess) error = launcher.prepare(result);
  }
  // For tests of what older GPUs run.
  if (std::getenv("XLA_OPS_ATTENTION_NO_WGMMA") != nullptr) {
    result->has_wgmma = false;
    result->has_clusters = false;
  }
  if (error == cudaSuccess) error = LoadKernel(AttentionCombineKernel);
  if (error == cudaSuccess) error = LoadKernel(AttentionCombineSlotsKernel);
  // As the kernel for decode has it, so that blocks of both find room together.
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(AttentionCombineSlotsKernel,
                                 cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) error = LoadKernel(ReportAttentionKernel);
  return error;
}

// Prepares all kernels for the current device, once.
cudaError_t GetDevice(AttentionDevice* device) {
  static_assert(sizeof(AttentionDevice) <= 8, "PerDevice reads it at once");
  static PerDevice<AttentionDevice> devices;
  return devices.Get(FindDevice, device);
}

cudaError_t LaunchCombine(cudaStream_t stream, const AttentionArgs& args,
                          bool overlap) {
  const int warps = std::min(
      kCombineMaxWarps, (args.num_splits + kCombineBatch - 1) / kCombineBatch);
  return LaunchOverlapping(stream, AttentionCombineKernel,
                           args.num_tokens * args.num_heads, 32 * warps,
                           overlap, args);
}

// The same call with the splits of a tile as a cluster, where that is better.
AttentionArgs InClusters(AttentionKernel kernel, const AttentionParams& params,
                         const AttentionDevice& device, AttentionArgs args) {
  if (kernel != AttentionKernel::kMma) return args;
  const int splits = ClusterSplits(params, device, args.num_splits);
  if (splits > 0) {
    args.num_splits = splits;
    args.clustered = true;
  }
  return args;
}

// Debug mode: says which kernel runs, once for each signature.
void TellKernel(AttentionKernel kernel, const AttentionParams& params) {
  static std::mutex mutex;
  static std::set<std::string>* const told = new std::set<std::string>;
  std::string line = DescribeChoice(kernel, params);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = told->insert(std::move(line));
  if (is_new) std::fprintf(stderr, "%s\n", entry->c_str());
}

}  // namespace

cudaError_t PrepareAttention() {
  AttentionDevice device = {};
  return GetDevice(&device);
}

cudaError_t LaunchAttention(cudaStream_t stream, const AttentionParams& params,
                            bool after_writer) {
  if (params.num_tokens == 0 || params.num_heads == 0 || params.head_dim == 0) {
    return cudaSuccess;
  }
  if (params.num_tokens > kAttentionMaxRows / params.num_heads ||
      params.max_num_seqs > kAttentionMaxSeqs ||
      params.num_kv_heads > kAttentionMaxKvHeads) {
    return cudaErrorInvalidConfiguration;
  }
  AttentionDevice device = {};
  cudaError_t error = GetDevice(&device);
  if (error != cudaSuccess) return error;

  const AttentionArgs args = MakeAttentionArgs(params);
  if (!IsAligned(params.workspace, 16) ||
      params.workspace_bytes <
          AttentionWorkspaceBytes(params.num_tokens, params.num_heads,
                                  params.head_dim, args.num_splits)) {
    return cudaErrorInvalidValue;
  }
  if (params.debug) {
    const int blocks = std::max(1, args.max_num_seqs);
    ReportAttentionKernel<<<blocks, 128, 0, stream>>>(args);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  AttentionArgs run = args;
  error = cudaErrorNotSupported;
  for (AttentionKernel kernel = ChooseAttentionKernel(params, device);
       error == cudaErrorNotSupported && kernel != AttentionKernel::kNone;
       kernel = NextAttentionKernel(kernel, params, device)) {
    run = InClusters(kernel, params, device, args);
    // Alone the one for decode waits, and follows the writer but in debug mode.
    run.overlaps = kernel == AttentionKernel::kMma && after_writer &&
                   device.can_overlap && !params.debug;
    error = kLaunchers[static_cast<int>(kernel)].launch(stream, params, run,
                                                        device);
    if (params.debug && error == cudaSuccess) TellKernel(kernel, params);
  }
  if (error != cudaSuccess || run.num_splits == 1 || run.clustered) {
    return error;
  }
  return LaunchCombine(stream, run, device.can_overlap);
}

}  // namespace xla_ops
