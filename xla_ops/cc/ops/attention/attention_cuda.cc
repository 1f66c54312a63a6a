// The CUDA handlers of attention. `initialize` loads the kernels, for XLA may
// first execute a call while it captures a CUDA graph, when code must not be
// loaded any more; `execute` checks operands and launches.
//
// Tested by tests/gpu/check_kernels.py, tests/ops/test_paged_attention.py and
// tests/ops/test_flash_attn_varlen.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"
#include "xla_ops/cc/ops/attention/attention_launch.h"

namespace xla_ops {
namespace {

ffi::Error CheckAndLaunch(cudaStream_t stream, const AttentionParams& params) {
  const AttentionNames& names = NamesOf(params.op);
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(names, params));
  return ToLaunchError(names.op, LaunchAttention(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER_WITH_SETUP(flash_attn_varlen, AttentionBinding(),
                                MakeAttention<kFlashAttnVarlenNames>,
                                CheckAndLaunch, PrepareAttention);
XLA_OPS_CUDA_HANDLER_WITH_SETUP(paged_attention, AttentionBinding(),
                                MakeAttention<kPagedAttentionNames>,
                                CheckAndLaunch, PrepareAttention);

}  // namespace xla_ops
