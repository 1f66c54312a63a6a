// The CUDA launcher of apply_repetition_penalties; contract and parameters in
// apply_repetition_penalties.h.

#ifndef XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_LAUNCH_H_
#define XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties.h"

namespace xla_ops {

// Queues one kernel on `stream`, which works on `out` alone; neither allocates
// nor synchronises. Any alignment of the pointers is legal, 16 bytes is fast.
cudaError_t LaunchApplyRepetitionPenalties(
    cudaStream_t stream, const ApplyRepetitionPenaltiesParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_LAUNCH_H_
