// The CUDA handlers of the rotary_embedding targets: check operands, then
// launch the kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_rotary_embedding.py.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/device/launch_status.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_checks.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_launch.h"

namespace xla_ops {
namespace {

ffi::Error Launch(cudaStream_t stream, const RotaryEmbeddingParams& params) {
  const cudaError_t error = LaunchRotaryEmbedding(stream, params);
  if (error != cudaSuccess) {
    return ffi::Error::Internal(LaunchErrorText("rotary_embedding", error));
  }
  return ffi::Error::Success();
}

ffi::Error RotaryEmbeddingCuda(ffi::AnyBuffer positions, ffi::AnyBuffer query,
                               ffi::AnyBuffer key, ffi::AnyBuffer cos_sin_cache,
                               ffi::Result<ffi::AnyBuffer> query_result,
                               ffi::Result<ffi::AnyBuffer> key_result,
                               int64_t head_size, bool is_neox,
                               cudaStream_t stream) {
  RotaryEmbeddingParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeRotaryEmbeddingParams(
      positions, query, key, cos_sin_cache, query_result, key_result, head_size,
      is_neox, &params));
  return Launch(stream, params);
}

ffi::Error RotaryEmbeddingOneCuda(ffi::AnyBuffer positions,
                                  ffi::AnyBuffer query,
                                  ffi::AnyBuffer cos_sin_cache,
                                  ffi::Result<ffi::AnyBuffer> query_result,
                                  int64_t head_size, bool is_neox,
                                  cudaStream_t stream) {
  RotaryEmbeddingParams params;
  XLA_OPS_RETURN_IF_ERROR(
      MakeRotaryEmbeddingOneParams(positions, query, cos_sin_cache,
                                   query_result, head_size, is_neox, &params));
  return Launch(stream, params);
}

}  // namespace
}  // namespace xla_ops

extern "C" {
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_rotary_embedding_cuda(
    XLA_FFI_CallFrame* call_frame);
XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_rotary_embedding_one_cuda(
    XLA_FFI_CallFrame* call_frame);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_rotary_embedding_cuda, xla_ops::RotaryEmbeddingCuda,
    xla_ops::RotaryEmbeddingBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_rotary_embedding_one_cuda, xla_ops::RotaryEmbeddingOneCuda,
    xla_ops::RotaryEmbeddingOneBinding()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_OPS_EXPORT_HANDLERS(
    {"xla_ops.rotary_embedding",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_rotary_embedding_cuda}},
    {"xla_ops.rotary_embedding_one",
     "CUDA",
     {nullptr, nullptr, nullptr, xla_ops_rotary_embedding_one_cuda}})
