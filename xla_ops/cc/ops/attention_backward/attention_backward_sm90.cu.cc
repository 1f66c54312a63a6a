// Launches attention's gradient on Hopper (attention_backward_sm90.cuh).
//
// Tested by tests/gpu/check_attention_backward.py.

#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/tensor_map.h"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_head_dims.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_rows.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90.cuh"

namespace xla_ops {
namespace {

// Calls f(TypeTag<T>{}, head_dim, transform), the last two as types.
template <typename F>
cudaError_t WithKernel(int64_t head_dim, DType dtype, bool transform, F&& f) {
  const auto with_type = [&](auto tag) {
    const auto with_head_dim = [&](auto padded) {
      return transform ? f(tag, padded, std::true_type{})
                       : f(tag, padded, std::false_type{});
    };
    return DispatchHeadDim(head_dim, with_head_dim);
  };
  return dtype == DType::kF16 ? with_type(TypeTag<__half>{})
                              : with_type(TypeTag<__nv_bfloat16>{});
}

// Describes rows of heads to the copy engine, in boxes of `box_rows`.
cudaError_t MakeMap(EncodeTiled encode, DType dtype, const void* tensor,
                    int64_t head_dim, int64_t rows, int64_t row_stride,
                    int64_t heads, int64_t head_stride, int box_rows,
                    CUtensorMap* map) {
  const auto step = [](int64_t size, int64_t stride) {
    return size == 1 ? cuuint64_t{16} : static_cast<cuuint64_t>(stride) * 2;
  };
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(head_dim),
                               static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(heads), 1, 1};
  const cuuint64_t steps[4] = {step(rows, row_stride), step(heads, head_stride),
                               16, 16};
  const cuuint32_t box[5] = {kPanelColumns, static_cast<cuuint32_t>(box_rows),
                             1, 1, 1};
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map,
      dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      5, const_cast<void*>(tensor), sizes, steps, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorNotSupported;
}

template <int kHeadDim>
cudaError_t MakeMaps(const AttentionBackwardParams& params,
                     BackwardSm90Maps* maps) {
  using Shape = BackwardSm90Shape<kHeadDim>;
  const AttentionParams& batch = params.batch;
  EncodeTiled encode = nullptr;
  cudaError_t error = GetEncodeTiled(&encode);
  if (error != cudaSuccess) return error;
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto make_rows = [&](const void* tensor, CUtensorMap* map) {
    return MakeMap(encode, batch.dtype, tensor, batch.head_dim,
                   batch.num_tokens, batch.num_heads * batch.head_dim,
                   batch.num_heads, batch.head_dim, Shape::kRows, map);
  };
  const auto make_keys = [&](const void* tensor, CUtensorMap* map) {
    return MakeMap(encode, batch.dtype, tensor, batch.head_dim, batch.page_size,
                   batch.page_stride, batch.num_kv_heads, batch.head_stride,
                   Shape::kKeys, map);
  };
  error = make_rows(batch.query, &maps->query);
  if (error == cudaSuccess) error = make_rows(params.grad_out, &maps->grad);
  if (error == cudaSuccess) error = make_keys(batch.key, &maps->key);
  if (error == cudaSuccess) error = make_keys(batch.value, &maps->value);
  return error;
}

}  // namespace

bool CanRunBackwardSm90(const AttentionBackwardParams& params) {
  const AttentionParams& batch = params.batch;
  return params.wants_dq && params.wants_dkv && !params.deterministic &&
         !batch.paged && batch.dtype != DType::kF32 &&
         batch.kv_dtype == batch.dtype && batch.head_dim % 8 == 0 &&
         batch.head_dim <= 256 && batch.page_size > 0 &&
         IsTmaStep(batch.num_kv_heads, batch.head_stride) &&
         IsTmaStep(batch.page_size, batch.page_stride) &&
         batch.num_tokens < kSm90MaxTokens && batch.page_size < kSm90MaxTokens;
}

BackwardTileRows BackwardSm90TileRows(const AttentionBackwardParams& params) {
  BackwardTileRows rows = {};
  DispatchHeadDim(params.batch.head_dim, [&](auto padded) {
    using Shape = BackwardSm90Shape<decltype(padded)::value>;
    rows = {Shape::kRows, Shape::kKeys};
    return cudaSuccess;
  });
  return rows;
}

cudaError_t PrepareBackwardSm90() {
  cudaError_t error = cudaSuccess;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const bool transform : {false, true}) {
        if (error != cudaSuccess) return error;
        error = WithKernel(
            head_dim, dtype, transform,
            [](auto tag, auto padded, auto with_transform) {
              using T = typename decltype(tag)::type;
              constexpr int kHeadDim = decltype(padded)::value;
              return LoadKernel(
                  BackwardSm90Kernel<T, kHeadDim,
                                     decltype(with_transform)::value>,
                  BackwardSm90Shape<kHeadDim>::kSharedBytes);
            });
      }
    }
  }
  return error;
}

cudaError_t LaunchBackwardSm90(cudaStream_t stream,
                               const AttentionBackwardParams& params,
                               const AttentionBackwardArgs& args) {
  const auto launch = [&](auto tag, auto padded, auto transform) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(padded)::value;
    using Shape = BackwardSm90Shape<kHeadDim>;
    constexpr int kTileSums = Shape::kConsumers * Shape::kSumElements;
    BackwardSm90Maps maps;
    cudaError_t error = MakeMaps<kHeadDim>(params, &maps);
    if (error != cudaSuccess) return error;
    const unsigned query_blocks = args.max_query_tiles * args.batch.num_heads;
    error = LaunchKernel<BackwardDeltaKernel<T, Shape::kRows, kTileSums>>(
        stream, query_blocks, kDeltaThreads, args);
    if (error != cudaSuccess) return error;
    BackwardSm90Kernel<T, kHeadDim, decltype(transform)::value>
        <<<args.max_key_tiles * args.batch.num_kv_heads, Shape::kThreads,
           Shape::kSharedBytes, stream>>>(maps, args);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    return LaunchKernel<BackwardSm90StoreKernel<T, kHeadDim>>(
        stream, query_blocks, 128 * Shape::kConsumers, args);
  };
  return WithKernel(params.batch.head_dim, params.batch.dtype,
                    args.batch.transform, launch);
}

}  // namespace xla_ops
