// Launches linear on CUDA: the Hopper kernel for few rows where it can run
// (linear_sm90.cuh), else grouped_matmul's kernels with one group of all rows.
//
// Tested by tests/gpu/check_linear.py and tests/ops/test_linear.py.

#include "xla_ops/cc/ops/grouped_matmul/linear.h"

#include <cstdint>

#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_launch.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_launch.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_plan.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_sm90.h"

namespace xla_ops {
namespace {

cudaError_t GetDevice(LinearDevice* device) {
  static PerDevice<LinearDevice> devices;
  return devices.Get(
      [](LinearDevice* found) { return PrepareLinearSm90(found); }, device);
}

// Whether the Hopper kernel can run the call. Coordinates, of a tile past the
// end too, are 32-bit numbers.
bool FitsSm90(const LinearParams& params) {
  constexpr int64_t kMost = INT32_MAX - 1024;
  return params.dtype != DType::kF32 && params.num_rows <= kLinearMaxRows &&
         params.depth > 0 && params.depth % 8 == 0 && params.depth <= kMost &&
         params.num_columns <= kMost && IsAligned(params.input, 16) &&
         IsAligned(params.weight, 16);
}

// `plan` with a number of stages, and no more splits than the device runs.
bool CompletePlan(const LinearDevice& device, int64_t num_rows,
                  LinearPlan* plan) {
  const int most = LinearMaxStages(*plan, LinearPaddedRows(num_rows));
  if (plan->stages == 0 || plan->stages > most) plan->stages = most;
  const int index = plan->splits == 8   ? 3
                    : plan->splits == 4 ? 2
                                        : plan->splits - 1;
  return device.blocks[index] >= plan->splits;
}

}  // namespace

cudaError_t PrepareLinear() {
  LinearDevice device = {};
  const cudaError_t error = GetDevice(&device);
  return error == cudaSuccess ? PrepareGroupedMatmul() : error;
}

cudaError_t LaunchLinear(cudaStream_t stream, const LinearParams& params) {
  if (params.num_rows == 0 || params.num_columns == 0) return cudaSuccess;
  LinearDevice device = {};
  cudaError_t error = GetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device.blocks[0] > 0 && FitsSm90(params)) {
    LinearPlan plan =
        params.plan != 0 ? *DecodeLinearPlan(params.plan)
                         : ChooseLinearPlan(params.num_rows, params.num_columns,
                                            params.depth, device);
    if (CompletePlan(device, params.num_rows, &plan)) {
      error = LaunchLinearSm90(stream, params, plan);
      if (error != cudaErrorNotSupported) return error;
    }
  }
  GroupedMatmulParams grouped = {};
  grouped.dtype = params.dtype;
  grouped.num_rows = params.num_rows;
  grouped.num_columns = params.num_columns;
  grouped.depth = params.depth;
  grouped.num_groups = 1;
  grouped.input = params.input;
  grouped.weight = params.weight;
  grouped.bias = params.bias;
  grouped.out = params.out;
  return LaunchGroupedMatmul(stream, grouped);
}

}  // namespace xla_ops
