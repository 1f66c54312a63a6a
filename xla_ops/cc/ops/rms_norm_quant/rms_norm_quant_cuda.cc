// The CUDA handlers of rms_norm_quant: four targets that differ in their
// operands and share one launcher.
//
// Tested by tests/ops/test_rms_norm_quant.py.

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant_checks.h"
#include "xla_ops/cc/ops/rms_norm_quant/rms_norm_quant_launch.h"

namespace xla_ops {

XLA_OPS_CUDA_HANDLER(rms_norm_static_fp8_quant, RmsNormStaticFp8QuantBinding(),
                     MakeRmsNormStaticFp8QuantParams, LaunchRmsNormQuant);
XLA_OPS_CUDA_HANDLER(fused_add_rms_norm_static_fp8_quant,
                     FusedAddRmsNormStaticFp8QuantBinding(),
                     MakeFusedAddRmsNormStaticFp8QuantParams,
                     LaunchRmsNormQuant);
XLA_OPS_CUDA_HANDLER(rms_norm_dynamic_per_token_quant,
                     RmsNormDynamicPerTokenQuantBinding(),
                     MakeRmsNormDynamicPerTokenQuantParams, LaunchRmsNormQuant);
XLA_OPS_CUDA_HANDLER(fused_add_rms_norm_dynamic_per_token_quant,
                     FusedAddRmsNormDynamicPerTokenQuantBinding(),
                     MakeFusedAddRmsNormDynamicPerTokenQuantParams,
                     LaunchRmsNormQuant);

}  // namespace xla_ops
