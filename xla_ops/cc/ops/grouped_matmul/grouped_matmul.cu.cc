// Launches grouped_matmul on CUDA: a grid that fills the device, whose blocks
// find their tiles from the offsets.
//
//   grouped_matmul_tiles.cuh  which tiles there are
//   grouped_matmul_mma.cuh    fp16 and bf16 on tensor cores, sm_80 on
//   grouped_matmul_simt.cuh   everything else
//
// Tested by tests/gpu/check_grouped_matmul.py and
// tests/ops/test_grouped_matmul.py.

#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_launch.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_mma.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_simt.cuh"

namespace xla_ops {
namespace {

struct GroupedDevice {
  int multiprocessors;
  bool has_mma;
};

cudaError_t GetDevice(GroupedDevice* result) {
  static PerDevice<GroupedDevice> devices;
  return devices.Get(
      [](GroupedDevice* found) {
        *found = {};
        cudaError_t error = LoadKernels();
        int device = 0;
        if (error == cudaSuccess) error = cudaGetDevice(&device);
        if (error == cudaSuccess) {
          error = cudaDeviceGetAttribute(
              &found->multiprocessors, cudaDevAttrMultiProcessorCount, device);
        }
        // All kernels are compiled together: one answers for all. Before 8.0
        // the bodies of these are empty.
        cudaFuncAttributes attributes = {};
        if (error == cudaSuccess) {
          error = cudaFuncGetAttributes(
              &attributes, GroupedMatmulMmaKernel<__half, GroupedMmaDecode>);
        }
        found->has_mma = attributes.ptxVersion >= 80;
        return error;
      },
      result);
}

// Blocks for tiles of that size: as many as there can be tiles, at most
// `per_multiprocessor` for each. Every group may have one tile of rows more
// than its rows fill.
unsigned NumBlocks(const GroupedMatmulParams& params,
                   const GroupedDevice& device, int64_t tile_rows,
                   int64_t tile_columns, int64_t per_multiprocessor) {
  const int64_t row_tiles = std::min(
      params.num_rows, params.num_rows / tile_rows + params.num_groups);
  const int64_t most = per_multiprocessor * device.multiprocessors;
  const int64_t column_tiles = CeilDivide(params.num_columns, tile_columns);
  // Without a tile, blocks still write zeros.
  return static_cast<unsigned>(std::clamp<int64_t>(
      std::min(row_tiles, most) * std::min(column_tiles, most), 1, most));
}

template <typename T, typename Shape>
cudaError_t LaunchMma(cudaStream_t stream, const GroupedMatmulParams& params,
                      const GroupedDevice& device,
                      const GroupedMatmulArgs<T>& args) {
  // What the shared memory of a multiprocessor holds: 100 KB at least.
  constexpr int kBlocks = Shape::kThreads == 128 ? 4 : 2;
  return LaunchKernel<GroupedMatmulMmaKernel<T, Shape>>(
      stream,
      NumBlocks(params, device, Shape::kTileRows, Shape::kTileColumns, kBlocks),
      Shape::kThreads, args);
}

template <typename T, int kRows>
cudaError_t LaunchSimt(cudaStream_t stream, const GroupedMatmulParams& params,
                       const GroupedDevice& device,
                       const GroupedMatmulArgs<T>& args) {
  return LaunchKernel<GroupedMatmulSimtKernel<T, kRows>>(
      stream, NumBlocks(params, device, 16 * kRows, 64, 4), kGroupedSimtThreads,
      args);
}

template <typename T>
cudaError_t Launch(cudaStream_t stream, const GroupedMatmulParams& params,
                   const GroupedDevice& device) {
  GroupedMatmulArgs<T> args = {};
  args.input = static_cast<const T*>(params.input);
  args.weight = static_cast<const T*>(params.weight);
  args.group_offsets = params.group_offsets;
  args.bias = static_cast<const T*>(params.bias);
  args.out = static_cast<T*>(params.out);
  args.num_rows = params.num_rows;
  args.num_columns = static_cast<int>(params.num_columns);
  args.depth = static_cast<int>(params.depth);
  args.num_groups = static_cast<int>(params.num_groups);
  // Of groups of equal size; the real ones are on the device.
  const int64_t rows =
      params.num_rows / std::max<int64_t>(1, params.num_groups);
  if constexpr (!std::is_same_v<T, float>) {
    if (device.has_mma && params.depth % kChunk == 0 &&
        IsAligned(params.input, 16) && IsAligned(params.weight, 16)) {
      if (rows <= 16) {
        return LaunchMma<T, GroupedMmaDecode>(stream, params, device, args);
      }
      if (rows <= 96) {
        return LaunchMma<T, GroupedMmaMedium>(stream, params, device, args);
      }
      return LaunchMma<T, GroupedMmaLarge>(stream, params, device, args);
    }
  }
  return rows <= 16 ? LaunchSimt<T, 1>(stream, params, device, args)
                    : LaunchSimt<T, 4>(stream, params, device, args);
}

}  // namespace

cudaError_t PrepareGroupedMatmul() {
  GroupedDevice device = {};
  return GetDevice(&device);
}

cudaError_t LaunchGroupedMatmul(cudaStream_t stream,
                                const GroupedMatmulParams& params) {
  if (params.num_rows == 0 || params.num_columns == 0) return cudaSuccess;
  // Room for a tile beyond the end, in the kernels' 32-bit numbers.
  constexpr int64_t kMost = INT32_MAX - 128;
  if (params.num_columns > kMost || params.depth > kMost ||
      params.num_groups > kMost) {
    return cudaErrorInvalidConfiguration;
  }
  GroupedDevice device = {};
  const cudaError_t error = GetDevice(&device);
  if (error != cudaSuccess) return error;
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    return Launch<typename decltype(tag)::type>(stream, params, device);
  });
}

}  // namespace xla_ops
