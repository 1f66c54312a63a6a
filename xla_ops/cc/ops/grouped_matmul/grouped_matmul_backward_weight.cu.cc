// Launches grouped_matmul_backward_weight on CUDA: a block for each tile of
// each group's matrix. fp16 and bf16 go by tensor cores from sm_80 on,
// everything else without (grouped_matmul_backward_weight.cuh).
//
// Tested by tests/gpu/check_gradients.py and
// tests/ops/test_grouped_matmul_backward_weight.py.

#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight_launch.h"

namespace xla_ops {
namespace {

using MmaShape = GroupedMmaLarge;  // 128 x 128, 32 rows a step

cudaError_t HasMma(bool* result) {
  static PerDevice<bool> devices;
  return devices.Get(
      [](bool* found) {
        cudaError_t error = LoadKernels();
        // All kernels are compiled together: one answers for all. Before 8.0
        // the bodies of these are empty.
        cudaFuncAttributes attributes = {};
        if (error == cudaSuccess) {
          error = cudaFuncGetAttributes(
              &attributes, GroupedWeightMmaKernel<__half, MmaShape>);
        }
        *found = attributes.ptxVersion >= 80;
        return error;
      },
      result);
}

// A block for each tile of kTileRows by kTileColumns.
template <auto kKernel, int kTileRows, int kTileColumns, typename T>
cudaError_t LaunchTiles(cudaStream_t stream, int threads, int64_t num_groups,
                        GroupedWeightArgs<T> args) {
  const int64_t tiles = num_groups * CeilDivide(args.num_columns, kTileRows) *
                        CeilDivide(args.depth, kTileColumns);
  return ForEachGrid(tiles, 1, [&](int64_t first, int64_t count) {
    args.first_tile = first;
    return LaunchKernel<kKernel>(stream, static_cast<unsigned>(count), threads,
                                 args);
  });
}

template <typename T>
cudaError_t Launch(cudaStream_t stream,
                   const GroupedMatmulBackwardWeightParams& params,
                   bool has_mma) {
  GroupedWeightArgs<T> args = {};
  args.grad = static_cast<const T*>(params.grad);
  args.input = static_cast<const T*>(params.input);
  args.group_offsets = params.group_offsets;
  args.dweight = static_cast<T*>(params.dweight);
  args.num_rows =
      static_cast<int>(std::min<int64_t>(params.num_rows, INT32_MAX));
  args.num_columns = static_cast<int>(params.num_columns);
  args.depth = static_cast<int>(params.depth);
  if constexpr (!std::is_same_v<T, float>) {
    if (has_mma && params.num_columns % kChunk == 0 &&
        params.depth % kChunk == 0 && IsAligned(params.grad, 16) &&
        IsAligned(params.input, 16)) {
      return LaunchTiles<GroupedWeightMmaKernel<T, MmaShape>,
                         MmaShape::kTileRows, MmaShape::kTileColumns>(
          stream, MmaShape::kThreads, params.num_groups, args);
    }
  }
  return LaunchTiles<GroupedWeightSimtKernel<T>, kGroupedWeightSimtTile,
                     kGroupedWeightSimtTile>(stream, kGroupedSimtThreads,
                                             params.num_groups, args);
}

}  // namespace

cudaError_t PrepareGroupedMatmulBackwardWeight() {
  bool has_mma = false;
  return HasMma(&has_mma);
}

cudaError_t LaunchGroupedMatmulBackwardWeight(
    cudaStream_t stream, const GroupedMatmulBackwardWeightParams& params) {
  if (params.num_groups == 0 || params.num_columns == 0 || params.depth == 0) {
    return cudaSuccess;
  }
  // Room for a tile beyond the end, in the kernels' 32-bit numbers.
  constexpr int64_t kMost = INT32_MAX - 128;
  if (params.num_columns > kMost || params.depth > kMost ||
      params.num_groups > kMost) {
    return cudaErrorInvalidConfiguration;
  }
  bool has_mma = false;
  const cudaError_t error = HasMma(&has_mma);
  if (error != cudaSuccess) return error;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    return Launch<typename decltype(tag)::type>(stream, params, has_mma);
  });
}

}  // namespace xla_ops
