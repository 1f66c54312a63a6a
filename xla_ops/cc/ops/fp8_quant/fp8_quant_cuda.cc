// The CUDA handlers of fp8_quant: each checks its operands, then launches on
// XLA's stream.
//
// Tested by tests/ops/test_fp8_quant.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant_checks.h"
#include "xla_ops/cc/ops/fp8_quant/fp8_quant_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(static_scaled_fp8_quant, StaticFp8QuantBinding(),
                     MakeStaticFp8QuantParams, LaunchStaticFp8Quant);
XLA_OPS_CUDA_HANDLER(dynamic_scaled_fp8_quant, DynamicFp8QuantBinding(),
                     MakeDynamicFp8QuantParams, LaunchDynamicFp8Quant);
XLA_OPS_CUDA_HANDLER(dynamic_per_token_scaled_fp8_quant,
                     PerTokenFp8QuantBinding(), MakePerTokenFp8QuantParams,
                     LaunchPerTokenFp8Quant);

}  // namespace xla_ops
