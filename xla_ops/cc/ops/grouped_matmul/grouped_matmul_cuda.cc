// The CUDA handler of grouped_matmul: checks operands, then launches the kernel
// on XLA's stream.
//
// Tested by tests/ops/test_grouped_matmul.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_checks.h"
#include "xla_ops/cc/ops/grouped_matmul/grouped_matmul_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER_WITH_SETUP(grouped_matmul, GroupedMatmulBinding(),
                                MakeGroupedMatmulParams, LaunchGroupedMatmul,
                                PrepareGroupedMatmul);

}  // namespace xla_ops
