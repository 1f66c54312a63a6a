// The CUDA handlers of the activations: check operands, then launch the
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
XLA_OPS_CUDA_HANDLER(fatrelu_and_mul, FatreluBinding(), MakeFatreluParams,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(swigluoai_and_mul, SwigluoaiBinding(), MakeSwigluoaiParams,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(gelu_new, ActivationBinding(),
                     MakeActivationParams<Activation::kGeluNew>,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(gelu_fast, ActivationBinding(),
                     MakeActivationParams<Activation::kGeluFast>,
                     LaunchActivation);
XLA_OPS_CUDA_HANDLER(gelu_quick, ActivationBinding(),
                     MakeActivationParams<Activation::kGeluQuick>,
                     LaunchActivation);

}  // namespace xla_ops
