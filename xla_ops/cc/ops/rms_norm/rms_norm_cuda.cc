// The CUDA handler of rms_norm: checks operands, then launches the kernel on
// XLA's stream.
//
// Tested by tests/gpu/check_kernels.py and tests/ops/test_rms_norm.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_checks.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(rms_norm, RmsNormBinding(), MakeRmsNormParams,
                     LaunchRmsNorm);

}  // namespace xla_ops
