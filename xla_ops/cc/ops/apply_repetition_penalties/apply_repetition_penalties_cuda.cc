// The CUDA handler of apply_repetition_penalties: checks operands, then
// launches the kernel on XLA's stream.
//
// Tested by tests/gpu/check_elementwise.py and
// tests/ops/test_apply_repetition_penalties.py.

#include <cuda_runtime_api.h>

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties.h"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties_checks.h"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties_launch.h"

namespace xla_ops {
namespace {

cudaError_t CopyAndLaunch(cudaStream_t stream,
                          const ApplyRepetitionPenaltiesParams& params) {
  const int64_t bytes =
      params.num_seqs * params.vocab_size * SizeOf(params.dtype);
  if (params.out != params.logits && bytes > 0) {
    const cudaError_t error =
        cudaMemcpyAsync(params.out, params.logits, static_cast<size_t>(bytes),
                        cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return LaunchApplyRepetitionPenalties(stream, params);
}

}  // namespace

XLA_OPS_CUDA_HANDLER(apply_repetition_penalties,
                     ApplyRepetitionPenaltiesBinding(),
                     MakeApplyRepetitionPenaltiesParams, CopyAndLaunch);

}  // namespace xla_ops
