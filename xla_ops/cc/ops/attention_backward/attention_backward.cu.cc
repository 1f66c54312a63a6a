// Launches attention's gradient on CUDA: the table of segments, then the
// kernels that a call can take, in this order:
//   attention_backward_sm90.h    one kernel for dq, dk and dv on Hopper
//   attention_backward_mma.cuh   fp16 and bf16 on tensor cores, sm_80 on; the
//                                same bits in every run
//   attention_backward_simt.cuh  everything else; the same bits too
//
// Tested by tests/gpu/check_attention_backward.py.

#include "xla_ops/cc/ops/attention_backward/attention_backward.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_args.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_kernels.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_launch.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_simt.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_table.cuh"

namespace xla_ops {
namespace {

struct BackwardDevice {
  bool has_wgmma;
  bool has_mma;
};

cudaError_t FindDevice(BackwardDevice* result) {
  *result = {};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  int major = 0;
  int minor = 0;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                                   device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor,
                                   device);
  }
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes,
                                  BackwardMmaKeysKernel<__half, 64, false>);
  }
  if (error != cudaSuccess) return error;
  result->has_mma = attributes.ptxVersion >= 80;
  if (result->has_mma) {
    error = PrepareBackwardMma<__half>();
    if (error == cudaSuccess) error = PrepareBackwardMmaBf16();
  }
  if (error == cudaSuccess && major == 9 && minor == 0) {
    error = PrepareBackwardSm90();
    result->has_wgmma = error == cudaSuccess;
  }
  // The others need no more than to be loaded, which the list does.
  return error == cudaSuccess ? LoadKernels() : error;
}

cudaError_t GetDevice(BackwardDevice* device) {
  static PerDevice<BackwardDevice> devices;
  return devices.Get(FindDevice, device);
}

enum class Kind { kSm90, kMma, kSimt };

bool CanRun(Kind kind, const BackwardDevice& device,
            const AttentionBackwardParams& params, bool aligned) {
  switch (kind) {
    case Kind::kSm90:
      return device.has_wgmma && aligned && CanRunBackwardSm90(params);
    case Kind::kMma:
      return device.has_mma && aligned && params.batch.dtype != DType::kF32 &&
             params.batch.kv_dtype == params.batch.dtype;
    case Kind::kSimt:
      return true;
  }
  return false;
}

// Sets the parts of the workspace. False: it is too small.
bool SetWorkspace(const AttentionBackwardParams& params, Kind kind,
                  AttentionBackwardArgs* args) {
  const AttentionParams& batch = params.batch;
  const BackwardTileRows tile_rows =
      kind == Kind::kSm90
          ? BackwardSm90TileRows(params)
          : BackwardTileRows{kBackwardSimtRows, kBackwardSimtRows};
  args->query_tile_rows = tile_rows.query;
  args->key_tile_rows = tile_rows.key;
  args->max_query_tiles = static_cast<int>(BackwardMaxTiles(
      batch.num_tokens, batch.max_num_seqs, args->query_tile_rows));
  args->max_key_tiles = static_cast<int>(
      batch.paged ? 0
                  : BackwardMaxTiles(batch.page_size, batch.max_num_seqs,
                                     args->key_tile_rows));
  char* next = static_cast<char*>(params.workspace);
  const auto take = [&](auto** part, int64_t elements) {
    using Element = std::remove_reference_t<decltype(**part)>;
    *part = reinterpret_cast<Element*>(next);
    next += BackwardAligned(elements * int64_t{sizeof(Element)});
  };
  const int64_t rows =
      batch.num_heads * args->max_query_tiles * args->query_tile_rows;
  take(&args->segments, batch.max_num_seqs + 2);
  take(&args->query_tiles, 2 * (batch.max_num_seqs + 3));
  args->key_tiles = args->query_tiles + batch.max_num_seqs + 3;
  take(&args->row_lse, 2 * rows);
  args->row_delta = args->row_lse + rows;
  if (kind == Kind::kSm90) {
    take(&args->dq_sum, rows * BackwardPaddedHeadDim(batch.head_dim));
  }
  return next - static_cast<char*>(params.workspace) <= params.workspace_bytes;
}

bool Fits(int64_t tiles, int64_t heads) { return tiles <= INT32_MAX / heads; }

cudaError_t LaunchKind(Kind kind, cudaStream_t stream,
                       const AttentionBackwardParams& params,
                       const AttentionBackwardArgs& args) {
  if (kind == Kind::kSm90) return LaunchBackwardSm90(stream, params, args);
  const bool is_mma = kind == Kind::kMma;
  switch (params.batch.dtype) {
    case DType::kF32:
      return LaunchBackwardSimt<float>(stream, params, args);
    case DType::kF16:
      return is_mma ? LaunchBackwardMma<__half>(stream, params, args)
                    : LaunchBackwardSimt<__half>(stream, params, args);
    case DType::kBF16:
      return is_mma ? LaunchBackwardMmaBf16(stream, params, args)
                    : LaunchBackwardSimtBf16(stream, params, args);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t Clear(cudaStream_t stream, void* result, int64_t elements,
                  DType dtype) {
  return cudaMemsetAsync(result, 0, elements * SizeOf(dtype), stream);
}

// Of dk and dv.
int64_t KeyElements(const AttentionParams& batch) {
  return batch.page_size * batch.num_kv_heads * batch.head_dim;
}

}  // namespace

cudaError_t PrepareAttentionBackward() {
  BackwardDevice device = {};
  return GetDevice(&device);
}

cudaError_t LaunchAttentionBackward(cudaStream_t stream,
                                    const AttentionBackwardParams& params) {
  const AttentionParams& batch = params.batch;
  AttentionBackwardArgs args = {};
  args.shared_keys = batch.seqused_k != nullptr || batch.leftpad_k != nullptr;
  const bool is_empty =
      batch.num_tokens == 0 || batch.num_heads == 0 || batch.head_dim == 0;
  cudaError_t error = cudaSuccess;
  if (params.wants_dkv && (is_empty || args.shared_keys)) {
    error = Clear(stream, params.dk, KeyElements(batch), batch.dtype);
    if (error == cudaSuccess) {
      error = Clear(stream, params.dv, KeyElements(batch), batch.dtype);
    }
  }
  if (error != cudaSuccess) return error;
  if (is_empty) {
    return params.wants_dsinks
               ? Clear(stream, params.dsinks, batch.num_heads, DType::kF32)
               : cudaSuccess;
  }
  if (batch.num_tokens > kAttentionMaxRows / batch.num_heads ||
      batch.max_num_seqs > kAttentionMaxSeqs ||
      batch.num_kv_heads > kAttentionMaxKvHeads) {
    return cudaErrorInvalidConfiguration;
  }
  BackwardDevice device = {};
  error = GetDevice(&device);
  if (error != cudaSuccess) return error;

  args.batch = MakeAttentionArgs(batch);
  const bool aligned = RowsAligned(batch) && IsAligned(params.grad_out, 16) &&
                       IsAligned(params.out, 16) && IsAligned(params.dq, 16) &&
                       IsAligned(params.dk, 16) && IsAligned(params.dv, 16);
  args.batch.aligned = aligned;
  args.grad_out = params.grad_out;
  args.out = params.out;
  args.lse = params.lse;
  args.grad_lse = params.grad_lse;
  args.dq = params.dq;
  args.dk = params.dk;
  args.dv = params.dv;
  args.dsinks = params.dsinks;
  args.scale = batch.scale;
  if (!IsAligned(params.workspace, 16)) return cudaErrorInvalidValue;

  for (const Kind kind : {Kind::kSm90, Kind::kMma, Kind::kSimt}) {
    if (!CanRun(kind, device, params, aligned)) continue;
    if (!SetWorkspace(params, kind, &args)) return cudaErrorInvalidValue;
    if (!Fits(args.max_query_tiles, batch.num_heads) ||
        !Fits(args.max_key_tiles, batch.num_kv_heads)) {
      return cudaErrorInvalidConfiguration;
    }
    error = LaunchKernel<BackwardTableKernel>(stream, 1, kTableThreads, args);
    if (error == cudaSuccess) error = LaunchKind(kind, stream, params, args);
    if (error != cudaErrorNotSupported) break;
  }
  if (error != cudaSuccess || !params.wants_dsinks) return error;
  return LaunchKernel<BackwardSinksKernel>(
      stream, static_cast<unsigned>(batch.num_heads), kSinkThreads, args);
}

}  // namespace xla_ops
