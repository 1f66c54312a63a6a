// The CUDA handlers of attention. `initialize` loads the kernels, for XLA may
// first execute a call while it captures a CUDA graph, when code must not be
// loaded any more; `execute` checks operands and launches.
//
// Tested by tests/gpu/check_kernels.py, tests/ops/test_paged_attention.py and
// tests/ops/test_flash_attn_varlen.py.

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

ffi::Error ToError(const AttentionNames& names, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(LaunchErrorText(names.op, error));
}

template <const AttentionNames& kNames>
ffi::Error InitializeAttention(ffi::RemainingArgs, ffi::RemainingRets,
                               ffi::Dictionary) {
  return ToError(kNames, PrepareAttention());
}

template <const AttentionNames& kNames>
ffi::Error AttentionCuda(ffi::AnyBuffer query, ffi::AnyBuffer key,
                         ffi::AnyBuffer value, ffi::AnyBuffer cu_seqlens_q,
                         ffi::AnyBuffer cu_seqlens_k, ffi::AnyBuffer seqused_k,
                         ffi::AnyBuffer block_table, ffi::AnyBuffer leftpad_k,
                         ffi::AnyBuffer num_seqs, ffi::AnyBuffer alibi_slopes,
                         ffi::AnyBuffer sinks, ffi::AnyBuffer k_scale,
                         ffi::AnyBuffer v_scale,
                         ffi::Result<ffi::AnyBuffer> out,
                         ffi::Result<ffi::AnyBuffer> lse,
                         ffi::Result<ffi::AnyBuffer> workspace,
                         AttentionAttrs attrs, cudaStream_t stream) {
  AttentionParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeAttentionParams(
      kNames,
      {query, key, value, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
       leftpad_k, num_seqs, alibi_slopes, sinks, k_scale, v_scale, out, lse,
       workspace},
      attrs, &params));
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(kNames, params));
  return ToError(kNames, LaunchAttention(stream, params));
}

// Binds any operands: loading needs none.
auto InitializeBinding() {
  return ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

auto CudaBinding() {
  return AttentionBinding().Ctx<ffi::PlatformStream<cudaStream_t>>();
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_flash_attn_varlen_initialize_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_flash_attn_varlen_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_paged_attention_initialize_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_paged_attention_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_flash_attn_varlen_initialize_cuda,
    xla_ops::InitializeAttention<xla_ops::kFlashAttnVarlenNames>,
    xla_ops::InitializeBinding(), {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_flash_attn_varlen_cuda,
    xla_ops::AttentionCuda<xla_ops::kFlashAttnVarlenNames>,
    xla_ops::CudaBinding(), {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_paged_attention_initialize_cuda,
    xla_ops::InitializeAttention<xla_ops::kPagedAttentionNames>,
    xla_ops::InitializeBinding(), {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_paged_attention_cuda,
    xla_ops::AttentionCuda<xla_ops::kPagedAttentionNames>,
    xla_ops::CudaBinding(), {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.flash_attn_varlen",
     "CUDA",
     {nullptr, nullptr, xla_ops_flash_attn_varlen_initialize_cuda,
      xla_ops_flash_attn_varlen_cuda}},
    {"xla_ops.paged_attention",
     "CUDA",
     {nullptr, nullptr, xla_ops_paged_attention_initialize_cuda,
      xla_ops_paged_attention_cuda}})
