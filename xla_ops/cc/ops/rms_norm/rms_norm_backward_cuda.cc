// The CUDA handlers of rms_norm_backward: check operands, then launch the
// kernel on XLA's stream.
//
// Tested by tests/gpu/check_kernels.py and tests/ops/test_rms_norm_backward.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward_checks.h"
#include "xla_ops/cc/ops/rms_norm/rms_norm_backward_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(rms_norm_backward, RmsNormBackwardBinding(),
                     MakeRmsNormBackwardParams, LaunchRmsNormBackward);
XLA_OPS_CUDA_HANDLER(rms_norm_backward_input, RmsNormBackwardInputBinding(),
                     MakeRmsNormBackwardInputParams, LaunchRmsNormBackward);

}  // namespace xla_ops
