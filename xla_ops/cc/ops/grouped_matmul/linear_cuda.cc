// The CUDA handler of linear: checks operands, then launches the kernel on
// XLA's stream.
//
// Tested by tests/gpu/check_linear.py and tests/ops/test_linear.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/grouped_matmul/linear.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_checks.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER_WITH_SETUP(linear, LinearBinding(), MakeLinearParams,
                                LaunchLinear, PrepareLinear);

}  // namespace xla_ops
