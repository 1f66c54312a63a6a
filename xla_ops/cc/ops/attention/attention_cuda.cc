// The CUDA handlers of paged_attention. `initialize` loads the kernels, for
// XLA may first execute the call while it captures a CUDA graph, when code
// must not be loaded any more; `execute` checks operands and launches.
//
// Tested by tests/gpu/check_kernels.py and tests/test_paged_attention.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"
#include "xla_ops/cc/ops/attention/attention_launch.h"

namespace xla_ops {
namespace {

ffi::Error ToError(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(LaunchErrorText("paged_attention", error));
}

ffi::Error InitializeAttention(ffi::RemainingArgs, ffi::RemainingRets,
                                    ffi::Dictionary) {
  return ToError(PrepareAttention());
}

ffi::Error AttentionCuda(
    ffi::AnyBuffer query, ffi::AnyBuffer key_cache, ffi::AnyBuffer value_cache,
    ffi::AnyBuffer context_lens, ffi::AnyBuffer block_tables,
    ffi::AnyBuffer query_start_loc, ffi::AnyBuffer num_seqs,
    ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
    AttentionAttrs attrs, cudaStream_t stream) {
  AttentionParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeAttentionParams(
      query, key_cache, value_cache, context_lens, block_tables,
      query_start_loc, num_seqs, out, workspace, attrs, &params));
  return ToError(LaunchAttention(stream, params));
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_paged_attention_initialize_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_attention_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_paged_attention_initialize_cuda, xla_ops::InitializeAttention,
    xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>()
        .RemainingArgs()
        .RemainingRets()
        .Attrs(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_attention_cuda, xla_ops::AttentionCuda,
    xla_ops::AttentionBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS({"xla_ops.paged_attention",
                         "CUDA",
                         {nullptr, nullptr,
                          xla_ops_paged_attention_initialize_cuda,
                          xla_ops_attention_cuda}})
