// The CUDA handler of new_op: checks operands, then launches the kernel on
// XLA's stream.
//
// Tested by tests/ops/test_new_op.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/new_op/new_op.h"
#include "xla_ops/cc/ops/new_op/new_op_checks.h"
#include "xla_ops/cc/ops/new_op/new_op_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(new_op, NewOpBinding(), MakeNewOpParams, LaunchNewOp);

}  // namespace xla_ops
