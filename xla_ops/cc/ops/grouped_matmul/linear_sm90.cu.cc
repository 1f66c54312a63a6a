// Launches linear on Hopper (linear_sm90.cuh).
//
// Tested by tests/gpu/check_linear.py.

#include "xla_ops/cc/ops/grouped_matmul/linear_sm90.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "xla_ops/cc/device/cluster.cuh"
#include "xla_ops/cc/device/kernel_list.h"
#include "xla_ops/cc/device/tensor_map.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/grouped_matmul/linear_sm90.cuh"

namespace xla_ops {
namespace {

using Kernel = void (*)(LinearSm90Args);

template <typename T>
Kernel KernelOf(int padded_rows) {
  switch (padded_rows) {
    case 8:
      return LinearSm90Kernel<T, 8>;
    case 16:
      return LinearSm90Kernel<T, 16>;
    case 32:
      return LinearSm90Kernel<T, 32>;
    case 64:
      return LinearSm90Kernel<T, 64>;
    default:
      return LinearSm90Kernel<T, 128>;
  }
}

Kernel KernelOf(DType dtype, int padded_rows) {
  return dtype == DType::kF16 ? KernelOf<__half>(padded_rows)
                              : KernelOf<__nv_bfloat16>(padded_rows);
}

// Describes a matrix of 16-bit elements to the copy engine; a box is a step of
// the depth of `box_rows` rows.
cudaError_t MakeMap(const LinearParams& params, const void* matrix,
                    int64_t rows, int box_rows, CUtensorMap* map) {
  EncodeTiled encode = nullptr;
  const cudaError_t error = GetEncodeTiled(&encode);
  if (error != cudaSuccess) return error;
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(params.depth),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t steps[1] = {static_cast<cuuint64_t>(params.depth) * 2};
  const cuuint32_t box[2] = {kLinearStepDepth,
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t ones[2] = {1, 1};
  const CUresult result = encode(
      map,
      params.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(matrix), sizes, steps, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorNotSupported;
}

}  // namespace

cudaError_t PrepareLinearSm90(LinearDevice* device) {
  *device = {};
  int id = 0;
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&id);
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
        std::pair{cudaDevAttrComputeCapabilityMinor, &minor},
        std::pair{cudaDevAttrMultiProcessorCount, &multiprocessors}}) {
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(value, attribute, id);
    }
  }
  if (error != cudaSuccess || major != 9 || minor != 0) return error;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int rows : {8, 16, 32, 64, 128}) {
      error = LoadKernel(KernelOf(dtype, rows), kLinearMaxSharedBytes);
      if (error != cudaSuccess) return error;
    }
  }
  // Every kernel takes a multiprocessor's shared memory: one answers for all.
  device->blocks[0] = static_cast<uint16_t>(multiprocessors);
  for (int i = 1; i < 4; ++i) {
    const int splits = 1 << i;
    const dim3 cluster(static_cast<unsigned>(splits));
    const ClusterLaunch launch(nullptr, cluster, cluster, kLinearMaxThreads,
                               kLinearMaxSharedBytes);
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(
        &clusters, reinterpret_cast<const void*>(KernelOf(DType::kBF16, 64)),
        &launch.config);
    if (error != cudaSuccess) return error;
    device->blocks[i] = static_cast<uint16_t>(clusters * splits);
  }
  return cudaSuccess;
}

cudaError_t LaunchLinearSm90(cudaStream_t stream, const LinearParams& params,
                             const LinearPlan& plan) {
  const int padded_rows = LinearPaddedRows(params.num_rows);
  LinearSm90Args args = {};
  cudaError_t error = MakeMap(params, params.weight, params.num_columns,
                              plan.tile_columns, &args.weight);
  if (error != cudaSuccess) return error;
  error =
      MakeMap(params, params.input, params.num_rows, padded_rows, &args.input);
  if (error != cudaSuccess) return error;
  args.bias = params.bias;
  args.out = params.out;
  args.num_rows = static_cast<int>(params.num_rows);
  args.num_columns = static_cast<int>(params.num_columns);
  args.steps = static_cast<int>((params.depth + kLinearStepDepth - 1) /
                                kLinearStepDepth);
  args.tile_columns = plan.tile_columns;
  args.stages = plan.stages;
  args.keep_weight = plan.keep_weight;
  args.wide = params.num_columns % 8 == 0 && IsAligned(params.out, 16) &&
              IsAligned(params.bias, 16);
  const int tiles =
      (args.num_columns + plan.tile_columns - 1) / plan.tile_columns;
  const ClusterLaunch launch(stream,
                             dim3(static_cast<unsigned>(tiles * plan.splits)),
                             dim3(static_cast<unsigned>(plan.splits)),
                             LinearConsumers(plan.tile_columns) * 128 + 32,
                             LinearSharedBytes(plan, padded_rows));
  void* pointers[] = {&args};
  error = cudaLaunchKernelExC(
      &launch.config,
      reinterpret_cast<const void*>(KernelOf(params.dtype, padded_rows)),
      pointers);
  // Reported here, and not to whoever asks for the last error.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

}  // namespace xla_ops
