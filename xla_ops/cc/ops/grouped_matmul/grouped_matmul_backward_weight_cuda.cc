// The CUDA handler of grouped_matmul_backward_weight: checks operands, then
// launches the kernel on XLA's stream.
//
// Tested by tests/gpu/check_gradients.py and
// tests/ops/test_grouped_matmul_backward_weight.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight_checks.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_backward_weight_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER_WITH_SETUP(grouped_matmul_backward_weight,
                                GroupedMatmulBackwardWeightBinding(),
                                MakeGroupedMatmulBackwardWeightParams,
                                LaunchGroupedMatmulBackwardWeight,
                                PrepareGroupedMatmulBackwardWeight);

}  // namespace xla_ops
