// The CUDA handler of merge_attn_states: checks operands, then launches the
// kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_merge_attn_states.py.

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_checks.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_launch.h"

namespace xla_ops {
namespace {

ffi::Error MergeAttnStatesCuda(ffi::AnyBuffer prefix_output,
                               ffi::AnyBuffer prefix_lse,
                               ffi::AnyBuffer suffix_output,
                               ffi::AnyBuffer suffix_lse,
                               ffi::Result<ffi::AnyBuffer> output,
                               ffi::Result<ffi::AnyBuffer> output_lse,
                               cudaStream_t stream) {
  MergeAttnStatesParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeMergeAttnStatesParams(prefix_output, prefix_lse, suffix_output,
                                suffix_lse, output, output_lse, &params));
  const cudaError_t error = LaunchMergeAttnStates(stream, params);
  if (error != cudaSuccess) {
    return ffi::Error::Internal(LaunchErrorText("merge_attn_states", error));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_ops

extern "C" XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_merge_attn_states_cuda(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_merge_attn_states_cuda, xla_ops::MergeAttnStatesCuda,
    xla_ops::MergeAttnStatesBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS({"xla_ops.merge_attn_states",
                         "CUDA",
                         {nullptr, nullptr, nullptr,
                          xla_ops_merge_attn_states_cuda}})
