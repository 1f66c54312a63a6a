// The CUDA handlers of int8_quant: each checks its operands, then launches
// on XLA's stream.
//
// Tested by tests/ops/test_int8_quant.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant_checks.h"
#include "xla_ops/cc/ops/int8_quant/int8_quant_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(static_scaled_int8_quant, StaticInt8QuantBinding(),
                     MakeStaticInt8QuantParams, LaunchStaticInt8Quant);
XLA_OPS_CUDA_HANDLER(dynamic_scaled_int8_quant, DynamicInt8QuantBinding(),
                     MakeDynamicInt8QuantParams, LaunchDynamicInt8Quant);
XLA_OPS_CUDA_HANDLER(dynamic_scaled_int8_azp_quant,
                     DynamicInt8AzpQuantBinding(),
                     MakeDynamicInt8AzpQuantParams, LaunchDynamicInt8Quant);

}  // namespace xla_ops
