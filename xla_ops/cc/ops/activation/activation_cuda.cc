// The CUDA handlers of the gated activations: check operands, then launch the
// kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_activation.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/activation/activation.h"
#include "xla_ops/cc/ops/activation/activation_checks.h"
#include "xla_ops/cc/ops/activation/activation_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(silu_and_mul, ActivationBinding(),
                     MakeActivationParams<Activation::kSiluAndMul>,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(mul_and_silu, ActivationBinding(),
                     MakeActivationParams<Activation::kMulAndSilu>,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(gelu_and_mul, ActivationBinding(),
                     MakeActivationParams<Activation::kGeluAndMul>,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(gelu_tanh_and_mul, ActivationBinding(),
                     MakeActivationParams<Activation::kGeluTanhAndMul>,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(silu_and_mul_quant, ActivationQuantBinding(),
                     MakeActivationQuantParams, LaunchActivation);

}  // namespace xla_ops
