// The CUDA handler of fused_qk_norm_rope: checks operands, then launches the
// kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_fused_qk_norm_rope.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope_checks.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope_launch.h"

namespace xla_ops {
namespace {

cudaError_t CopyAndLaunch(cudaStream_t stream,
                          const FusedQkNormRopeParams& params) {
  const int64_t bytes = params.num_tokens * NumHeads(params) * params.head_dim *
                        SizeOf(params.dtype);
  if (params.out != params.qkv && bytes > 0) {
    const cudaError_t error =
        cudaMemcpyAsync(params.out, params.qkv, static_cast<size_t>(bytes),
                        cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return LaunchFusedQkNormRope(stream, params);
}

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const FusedQkNormRopeParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params));
  return ToLaunchError("fused_qk_norm_rope", CopyAndLaunch(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER(fused_qk_norm_rope, FusedQkNormRopeBinding(),
                     MakeFusedQkNormRopeParams, CheckAndLaunch);

}  // namespace xla_ops
