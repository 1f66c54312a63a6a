// Launches attention on Hopper (attention_sm90.cuh).
//
// Tested by tests/gpu/check_kernels.py.

#include "xla_ops/cc/ops/attention/attention_sm90.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <numeric>
#include <type_traits>

#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/tensor_map.h"
#include "xla_ops/cc/ops/attention/attention_head_dims.h"
#include "xla_ops/cc/ops/attention/attention_sm90.cuh"

namespace xla_ops {
namespace {

// Calls f(shape, kernel) for a padded head_dim's kernel.
template <typename PaddedHeadDim, typename F>
cudaError_t WithKernel(PaddedHeadDim, DType dtype, bool all_panels, F&& f) {
  constexpr int kHeadDim = PaddedHeadDim::value;
  const auto with = [&](auto panels) {
    constexpr bool kAllPanels = decltype(panels)::value;
    using Shape = Sm90Shape<kHeadDim, kAllPanels>;
    return dtype == DType::kF16
               ? f(Shape{}, AttentionSm90Kernel<__half, kHeadDim, kAllPanels>)
               : f(Shape{},
                   AttentionSm90Kernel<__nv_bfloat16, kHeadDim, kAllPanels>);
  };
  // One panel is all.
  if constexpr (kHeadDim > kPanelColumns) {
    if (all_panels) return with(std::true_type{});
  }
  return with(std::false_type{});
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
cudaError_t MakeMap(const AttentionParams& params, const Sm90Maps& maps,
                    bool all_panels, const void* cache, CUtensorMap* map) {
  EncodeTiled encode = nullptr;
  const cudaError_t error = GetEncodeTiled(&encode);
  if (error != cudaSuccess) return error;
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const int64_t panels = params.head_dim / kPanelColumns;
  cuuint64_t sizes[5] = {size(params.head_dim), size(params.page_size),
                         size(params.num_kv_heads), 1, size(params.num_blocks)};
  cuuint64_t steps[4] = {StepBytes(params.page_size, params.page_stride),
                         StepBytes(params.num_kv_heads, params.head_stride), 16,
                         StepBytes(params.num_blocks, params.block_stride)};
  cuuint32_t box[5] = {kPanelColumns, static_cast<cuuint32_t>(maps.box_tokens),
                       1, 1, 1};
  if (all_panels) {
    sizes[0] = kPanelColumns;
    sizes[1] = kAtomRows;
    sizes[2] = size((params.num_kv_heads - 1) * maps.head_step + panels);
    sizes[3] = size(params.page_size / kAtomRows);
    steps[1] = kPanelRowBytes;
    steps[2] = size(params.page_stride) * kAtomRows * 2;
    box[1] = kAtomRows;
    box[2] = static_cast<cuuint32_t>(panels);
    box[3] = static_cast<cuuint32_t>(maps.box_tokens / kAtomRows);
  }
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      params.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      5, const_cast<void*>(cache), sizes, steps, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorNotSupported;
}

// Describes the query to the copy engine, [num_tokens, num_heads, head_dim]. A
// box is a panel of the tokens and heads that a tile's rows are.
cudaError_t MakeQueryMap(const AttentionParams& params, int group, int tokens,
                         CUtensorMap* map) {
  EncodeTiled encode = nullptr;
  const cudaError_t error = GetEncodeTiled(&encode);
  if (error != cudaSuccess) return error;
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[5] = {size(params.head_dim), size(params.num_heads),
                               size(params.num_tokens), 1, 1};
  const cuuint64_t row = size(params.head_dim) * 2;
  const cuuint64_t steps[4] = {row, row * size(params.num_heads), 16, 16};
  const cuuint32_t box[5] = {kPanelColumns, static_cast<cuuint32_t>(group),
                             static_cast<cuuint32_t>(tokens), 1, 1};
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      params.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      5, const_cast<void*>(params.query), sizes, steps, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorNotSupported;
}

// Whether boxes of pages may hold all panels.
bool HasAllPanels(const AttentionParams& params) {
  return params.paged && (params.head_dim == 128 || params.head_dim == 256) &&
         params.head_stride % kPanelColumns == 0 &&
         params.head_stride < kSm90MaxTokens / params.num_kv_heads;
}

}  // namespace

cudaError_t PrepareAttentionSm90(AttentionDevice* device) {
  device->has_wgmma = false;
  if (device->capability != 90) return cudaSuccess;
  const cudaError_t error = ForEachHeadDim([&](auto head_dim) {
    cudaError_t error = cudaSuccess;
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      for (const bool all_panels : {false, true}) {
        if (error != cudaSuccess) return error;
        error = WithKernel(
            head_dim, dtype, all_panels, [&](auto shape, auto* kernel) {
              return LoadKernel(kernel, decltype(shape)::kSharedBytes);
            });
      }
    }
    return error;
  });
  device->has_wgmma = error == cudaSuccess;
  return error;
}

cudaError_t LaunchAttentionSm90(cudaStream_t stream,
                                const AttentionParams& params,
                                const AttentionArgs& args,
                                const AttentionDevice& device) {
  const bool all_panels = HasAllPanels(params);
  const auto launch = [&](auto shape, auto* kernel) {
    using Shape = decltype(shape);
    Sm90Maps maps;
    maps.box_tokens = params.paged
                          ? static_cast<int>(std::gcd<int64_t, int64_t>(
                                params.page_size, Shape::kTokens))
                          : Shape::kTokens;
    maps.head_step =
        all_panels ? static_cast<int>(params.head_stride / kPanelColumns) : 1;
    cudaError_t error =
        MakeMap(params, maps, all_panels, params.key, &maps.key);
    if (error != cudaSuccess) return error;
    error = MakeMap(params, maps, all_panels, params.value, &maps.value);
    if (error != cudaSuccess) return error;
    const int group = static_cast<int>(params.num_heads / params.num_kv_heads);
    maps.query_tokens = Shape::kRows % group == 0 ? Shape::kRows / group : 0;
    if (maps.query_tokens > 0) {
      error = MakeQueryMap(params, group, maps.query_tokens, &maps.query);
      if (error != cudaSuccess) return error;
    }
    error = cudaMemsetAsync(args.next_item, 0, sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    kernel<<<device.multiprocessors, Shape::kThreads, Shape::kSharedBytes,
             stream>>>(maps, args);
    return cudaGetLastError();
  };
  return DispatchHeadDim(params.head_dim, [&](auto head_dim) {
    return WithKernel(head_dim, params.dtype, all_panels, launch);
  });
}

}  // namespace xla_ops
