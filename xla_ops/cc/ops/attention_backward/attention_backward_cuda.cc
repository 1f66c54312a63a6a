// The CUDA handlers of attention's gradient; see attention_cuda.cc.
//
// Tested by tests/gpu/check_attention_backward.py and
// tests/ops/test_attention_backward.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_checks.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_launch.h"

namespace xla_ops {
namespace {

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const AttentionBackwardParams& params) {
  const AttentionNames& names = BackwardNamesOf(params.batch.op);
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(names, params));
  return ToLaunchError(names.op, LaunchAttentionBackward(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER_WITH_SETUP(
    flash_attn_varlen_backward, AttentionBackwardBinding(),
    MakeAttentionBackward<kFlashAttnVarlenBackwardNames>, CheckAndLaunch,
    PrepareAttentionBackward);
XLA_OPS_CUDA_HANDLER_WITH_SETUP(
    paged_attention_backward, AttentionBackwardBinding(),
    MakeAttentionBackward<kPagedAttentionBackwardNames>, CheckAndLaunch,
    PrepareAttentionBackward);

}  // namespace xla_ops
