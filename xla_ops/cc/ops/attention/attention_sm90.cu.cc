// Launches attention on Hopper (attention_sm90.cuh).
//
// Tested by tests/gpu/check_kernels.py.

#include "xla_ops/cc/ops/attention/attention_sm90.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <numeric>
#include <type_traits>

#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90.cuh"

namespace xla_ops {
namespace {

// Boxes of pages have at least this many tokens, a divisor of every tile.
constexpr int kMinBoxTokens = 16;
// Token and row numbers stay below it, so that sums of two fit in 32 bits.
// There are no more items than rows of [num_tokens, num_heads].
constexpr int64_t kMaxTokens = int64_t{1} << 30;

// Calls f(shape, kernel) for the kernel that takes the call.
template <typename F>
cudaError_t DispatchKernel(DType dtype, int64_t head_dim, bool all_panels,
                           F&& f) {
  const auto with = [&](auto tag, auto padded, auto panels) {
    using T = decltype(tag);
    constexpr int kHeadDim = decltype(padded)::value;
    constexpr bool kAllPanels = decltype(panels)::value;
    return f(Sm90Shape<kHeadDim, kAllPanels>{},
             AttentionSm90Kernel<T, kHeadDim, kAllPanels>);
  };
  const auto with_panels = [&](auto tag, auto padded) {
    // One panel is all.
    if constexpr (decltype(padded)::value > kPanelColumns) {
      if (all_panels) return with(tag, padded, std::true_type{});
    }
    return with(tag, padded, std::false_type{});
  };
  const auto with_dtype = [&](auto padded) {
    return dtype == DType::kF16 ? with_panels(__half{}, padded)
                                : with_panels(__nv_bfloat16{}, padded);
  };
  if (head_dim <= 64) return with_dtype(std::integral_constant<int, 64>{});
  if (head_dim <= 128) return with_dtype(std::integral_constant<int, 128>{});
  return with_dtype(std::integral_constant<int, 256>{});
}

struct Device {
  bool can_run;  // the kernels have code for it
  int multiprocessors;
};

// Lets a kernel have its shared memory; `*has_code`: there is code for the
// device. A build without 9.0a compiles the kernels for another architecture
// (ops.bzl), for which they have an empty body, as their static shared memory
// shows; the device may not even be able to load that, which is no error.
template <typename Kernel>
cudaError_t PrepareSm90Kernel(Kernel* kernel, int shared_bytes,
                              bool* has_code) {
  *has_code = false;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaErrorNoKernelImageForDevice ||
      error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // forgets it
    return cudaSuccess;
  }
  if (error != cudaSuccess || attributes.sharedSizeBytes == 0) return error;
  *has_code = true;
  return cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

cudaError_t FindDevice(Device* result) {
  *result = {};
  int device = 0;
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  if (major != 9 || minor != 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&result->multiprocessors,
                                 cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const bool all_panels : {false, true}) {
        bool has_code = false;
        error = DispatchKernel(
            dtype, head_dim, all_panels, [&](auto shape, auto* kernel) {
              return PrepareSm90Kernel(kernel, decltype(shape)::kSharedBytes,
                                       &has_code);
            });
        if (error != cudaSuccess || !has_code) return error;
      }
    }
  }
  result->can_run = true;
  return cudaSuccess;
}

cudaError_t GetDevice(Device* device) {
  static PerDevice<Device> found;
  return found.Get(FindDevice, device);
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function; libcuda is not linked.
cudaError_t GetEncodeTiled(EncodeTiled* encode) {
  static PerDevice<EncodeTiled> found;
  return found.Get(
      [](EncodeTiled* result) {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult status;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
            &status);
        if (error != cudaSuccess) return error;
        if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
        *result = reinterpret_cast<EncodeTiled>(function);
        return cudaSuccess;
      },
      encode);
}

// Bytes from one index of a dimension to the next; a dimension of size one
// has no step, and any legal one will do.
uint64_t StepBytes(int64_t size, int64_t stride) {
  return size == 1 ? 16 : static_cast<uint64_t>(stride) * 2;
}

// Describes a cache to the copy engine as a tensor of rank 5, and its boxes.
//   all_panels  [block, token / 8, panel, token % 8, 64]: heads are panels
//               too, head_step = head_stride / 64 of them apart. A box is
//               what shared memory holds, atom by atom.
//   otherwise   [block, 1, head, token, head_dim], a box a panel
cudaError_t MakeMap(const AttentionParams& params, const Sm90Args& args,
                    bool all_panels, const void* cache, CUtensorMap* map) {
  EncodeTiled encode;
  const cudaError_t error = GetEncodeTiled(&encode);
  if (error != cudaSuccess) return error;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const int64_t panels = params.head_dim / kPanelColumns;
  cuuint64_t sizes[5] = {size(params.head_dim), size(params.page_size),
                         size(params.num_kv_heads), 1, size(params.num_blocks)};
  cuuint64_t steps[4] = {StepBytes(params.page_size, params.page_stride),
                         StepBytes(params.num_kv_heads, params.head_stride), 16,
                         StepBytes(params.num_blocks, params.block_stride)};
  cuuint32_t box[5] = {kPanelColumns, static_cast<cuuint32_t>(args.box_tokens),
                       1, 1, 1};
  if (all_panels) {
    sizes[0] = kPanelColumns;
    sizes[1] = kAtomRows;
    sizes[2] = size((params.num_kv_heads - 1) * args.head_step + panels);
    sizes[3] = size(params.page_size / kAtomRows);
    steps[1] = kPanelRowBytes;
    steps[2] = size(params.page_stride) * kAtomRows * 2;
    box[1] = kAtomRows;
    box[2] = static_cast<cuuint32_t>(panels);
    box[3] = static_cast<cuuint32_t>(args.box_tokens / kAtomRows);
  }
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      params.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      5, const_cast<void*>(cache), sizes, steps, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Whether boxes of pages may hold all panels.
bool HasAllPanels(const AttentionParams& params) {
  return params.paged && (params.head_dim == 128 || params.head_dim == 256) &&
         params.head_stride % kPanelColumns == 0 &&
         params.head_stride < kMaxTokens / params.num_kv_heads;
}

// The clamped number of tokens that a sequence can have.
int64_t MaxContext(const AttentionParams& params) {
  if (!params.paged) return params.page_size;
  if (params.max_blocks == 0) return 0;
  return params.page_size > kMaxTokens / params.max_blocks
             ? kMaxTokens
             : params.max_blocks * params.page_size;
}

// A window as long as any sequence hides nothing.
int Window(int64_t window) {
  return window < 0 || window >= kMaxTokens ? -1 : static_cast<int>(window);
}

// Whether TMA can take steps of `stride` elements: a multiple of 16 bytes
// below 2^40, of 8 tokens too (MakeMap).
bool IsStep(int64_t size, int64_t stride) {
  return size == 1 ||
         (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 36));
}

// For calls that CanLaunchAttentionSm90 takes: all numbers fit.
Sm90Args MakeArgs(const AttentionParams& params) {
  Sm90Args args = {};
  args.query = params.query;
  args.cu_seqlens_q = params.cu_seqlens_q;
  args.cu_seqlens_k = params.paged ? nullptr : params.cu_seqlens_k;
  args.seqused_k = params.seqused_k;
  args.block_table = params.paged ? params.block_table : nullptr;
  args.leftpad_k = params.paged ? nullptr : params.leftpad_k;
  args.num_seqs = params.num_seqs;
  args.alibi_slopes = params.alibi_slopes;
  args.sinks = params.sinks;
  args.out = params.out;
  args.lse = params.lse;
  args.next_item = static_cast<unsigned*>(params.workspace);
  args.max_blocks = params.max_blocks;
  args.alibi_seq_stride = params.alibi_seq_stride;
  args.page_size = FastDiv(params.page_size);
  args.group = FastDiv(params.num_heads / params.num_kv_heads);
  args.num_tokens = static_cast<int>(params.num_tokens);
  args.num_kv_tokens = static_cast<int>(MaxContext(params));
  args.num_blocks = static_cast<int>(params.num_blocks);
  args.num_heads = static_cast<int>(params.num_heads);
  args.num_kv_heads = static_cast<int>(params.num_kv_heads);
  args.head_dim = static_cast<int>(params.head_dim);
  args.max_num_seqs = static_cast<int>(params.max_num_seqs);
  args.window_left = Window(params.window_left);
  args.window_right = Window(params.window_right);
  args.scale = params.scale * kLog2E;
  if (params.soft_cap > 0.0f) {
    args.scale = params.scale / params.soft_cap;
    args.soft_cap = params.soft_cap * kLog2E;
  }
  args.transform = params.soft_cap > 0.0f || params.alibi_slopes != nullptr ||
                   !(params.scale > 0.0f);
  return args;
}

}  // namespace

cudaError_t PrepareAttentionSm90() {
  Device device;
  return GetDevice(&device);
}

bool CanLaunchAttentionSm90(const AttentionParams& params) {
  Device device;
  if (GetDevice(&device) != cudaSuccess || !device.can_run) return false;
  if (params.dtype != DType::kF16 && params.dtype != DType::kBF16) return false;
  if (params.kv_dtype != params.dtype || params.num_splits != 1 ||
      params.head_dim % 8 != 0 || params.head_dim > 256) {
    return false;
  }
  // A tile should be half full on average, or small tiles do better. This
  // bounds max_num_seqs too.
  if (params.max_num_seqs == 0 || params.num_blocks == 0 ||
      params.page_size == 0 ||
      params.num_tokens * (params.num_heads / params.num_kv_heads) <
          64 * params.max_num_seqs) {
    return false;
  }
  return (!params.paged || params.page_size % kMinBoxTokens == 0) &&
         IsAligned(params.query, 16) && IsAligned(params.key, 16) &&
         IsAligned(params.value, 16) && IsAligned(params.out, 16) &&
         IsStep(params.num_kv_heads, params.head_stride) &&
         IsStep(params.page_size, params.page_stride) &&
         IsStep(params.num_blocks, params.block_stride) &&
         params.num_tokens < kMaxTokens / params.num_heads &&
         MaxContext(params) < kMaxTokens && params.page_size < kMaxTokens &&
         params.num_blocks < (int64_t{1} << 31);
}

cudaError_t LaunchAttentionSm90(cudaStream_t stream,
                                const AttentionParams& params) {
  Device device;
  const cudaError_t found = GetDevice(&device);
  if (found != cudaSuccess) return found;
  const bool all_panels = HasAllPanels(params);
  return DispatchKernel(
      params.dtype, params.head_dim, all_panels, [&](auto shape, auto* kernel) {
        using Shape = decltype(shape);
        Sm90Args args = MakeArgs(params);
        args.box_tokens = params.paged
                              ? static_cast<int>(std::gcd<int64_t, int64_t>(
                                    params.page_size, Shape::kTokens))
                              : Shape::kTokens;
        args.head_step =
            all_panels ? static_cast<int>(params.head_stride / kPanelColumns)
                       : 1;
        CUtensorMap key_map;
        CUtensorMap value_map;
        cudaError_t error =
            MakeMap(params, args, all_panels, params.key, &key_map);
        if (error != cudaSuccess) return error;
        error = MakeMap(params, args, all_panels, params.value, &value_map);
        if (error != cudaSuccess) return error;
        error = cudaMemsetAsync(args.next_item, 0, sizeof(unsigned), stream);
        if (error != cudaSuccess) return error;
        kernel<<<device.multiprocessors, Shape::kThreads, Shape::kSharedBytes,
                 stream>>>(key_map, value_map, args);
        return cudaGetLastError();
      });
}

}  // namespace xla_ops
