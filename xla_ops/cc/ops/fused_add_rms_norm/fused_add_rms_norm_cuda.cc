// The CUDA handler of fused_add_rms_norm: checks operands, then launches the
// kernel on XLA's stream.
//
// Tested by tests/ops/test_fused_add_rms_norm.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm_checks.h"
#include "xla_ops/cc/ops/fused_add_rms_norm/fused_add_rms_norm_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(fused_add_rms_norm, FusedAddRmsNormBinding(),
                     MakeFusedAddRmsNormParams, LaunchFusedAddRmsNorm);

}  // namespace xla_ops
