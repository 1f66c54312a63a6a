// The CUDA handler of activation_backward: checks operands, then launches the
// kernel on XLA's stream.
//
// Tested by tests/gpu/check_gradients.py and
// tests/ops/test_activation_backward.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/activation/activation_backward.h"
#include "xla_ops/cc/ops/activation/activation_backward_checks.h"
#include "xla_ops/cc/ops/activation/activation_backward_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(activation_backward, ActivationBackwardBinding(),
                     MakeActivationBackwardParams, LaunchActivationBackward);

}  // namespace xla_ops
