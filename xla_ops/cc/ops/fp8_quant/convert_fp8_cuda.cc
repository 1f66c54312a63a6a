// The CUDA handler of convert_fp8: checks operands, then launches the kernel on
// XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and tests/ops/test_convert_fp8.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8_checks.h"
#include "xla_ops/cc/ops/fp8_quant/convert_fp8_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(convert_fp8, ConvertFp8Binding(), MakeConvertFp8Params,
                     LaunchConvertFp8);

}  // namespace xla_ops
