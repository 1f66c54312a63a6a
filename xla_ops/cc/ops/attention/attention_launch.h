// The CUDA launcher of attention; contract and parameters in attention.h.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_LAUNCH_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {

// Loads the kernels on the current device and raises their shared-memory
// limit. Cheap after the first call for a device; safe from any thread.
// LaunchAttention does it too, but a handler's initialize stage should
// have done it before, since loading code is not allowed everywhere while a
// stream is being captured.
cudaError_t PrepareAttention();

// Queues one kernel on `stream`, or two that share the sequences, before them
// perhaps a memset in the workspace (Hopper), after them one that combines the
// splits when num_splits > 1 or the pieces in slots, and with params.debug one
// that prints what is masked or clamped for being out of range; never allocates
// or synchronises.
// With no token or no head it queues nothing. Beyond the limits in attention.h
// it returns cudaErrorInvalidConfiguration, with a workspace too small or not
// aligned to 16 bytes cudaErrorInvalidValue.
//
// Which kernel: attention_choice.h. Debug mode says its name on stderr, once a
// signature.
//
// `after_writer`: the kernel before it in the stream gives the queries and
// writes keys and values, is of the same call, was launched as usual and lets
// this one start early (device/overlap.cuh). All else that the call reads was
// there before.
cudaError_t LaunchAttention(cudaStream_t stream, const AttentionParams& params,
                            bool after_writer = false);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_LAUNCH_H_
