// The CUDA launchers of host_infeed and host_outfeed; contract in host_feed.h.

#ifndef XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_LAUNCH_H_
#define XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "xla_ops/cc/ops/host_feed/host_feed.h"

namespace xla_ops {

// Queue the call on `stream`; neither allocates nor synchronises. The feed's
// memory is host memory that the device sees. A step that the host has not fed
// is a fault of the device.
cudaError_t LaunchHostInfeed(cudaStream_t stream,
                             const HostInfeedParams& params);
cudaError_t LaunchHostOutfeed(cudaStream_t stream,
                              const HostOutfeedParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_LAUNCH_H_
