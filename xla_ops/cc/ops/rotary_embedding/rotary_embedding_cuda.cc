// The CUDA handlers of the rotary_embedding targets: check operands, then
// launch the kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_rotary_embedding.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_checks.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_launch.h"

namespace xla_ops {
namespace {

ffi::Error CheckAndLaunch(cudaStream_t stream,
                          const RotaryEmbeddingParams& params) {
  XLA_OPS_RETURN_IF_ERROR(CheckCudaLimits(params));
  return ToLaunchError("rotary_embedding",
                       LaunchRotaryEmbedding(stream, params));
}

}  // namespace

XLA_OPS_CUDA_HANDLER(rotary_embedding, RotaryEmbeddingBinding(),
                     MakeRotaryEmbeddingParams, CheckAndLaunch);
XLA_OPS_CUDA_HANDLER(rotary_embedding_one, RotaryEmbeddingOneBinding(),
                     MakeRotaryEmbeddingOneParams, CheckAndLaunch);

}  // namespace xla_ops
