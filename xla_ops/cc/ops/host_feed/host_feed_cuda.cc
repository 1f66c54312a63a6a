// The CUDA handlers of xla_ops.host_infeed and xla_ops.host_outfeed.
//
// Run by benchmarks/vllm_engine.py, part `right`.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/device/with_device.h"
#include "xla_ops/cc/ops/host_feed/host_feed.h"
#include "xla_ops/cc/ops/host_feed/host_feed_checks.h"
#include "xla_ops/cc/ops/host_feed/host_feed_launch.h"

namespace xla_ops {
namespace {

// Memory of the host that every device sees at the host's addresses.
const char* Allocate(const XlaOpsHostFeedRequest& request, void** memory) {
  const WithDevice with_device(static_cast<int>(request.device));
  cudaError_t error = with_device.error();
  if (error == cudaSuccess) {
    error =
        cudaHostAlloc(memory, static_cast<size_t>(HostFeedMemoryBytes(request)),
                      cudaHostAllocPortable | cudaHostAllocMapped);
  }
  if (error == cudaSuccess) return nullptr;
  return CudaErrorText("no memory that device and host share", error);
}

}  // namespace

XLA_OPS_CUDA_HANDLER(host_infeed, HostInfeedBinding(), MakeHostInfeedParams,
                     LaunchHostInfeed);
XLA_OPS_CUDA_HANDLER(host_outfeed, HostOutfeedBinding(), MakeHostOutfeedParams,
                     LaunchHostOutfeed);

}  // namespace xla_ops

const char* xla_ops_host_feed_make(const XlaOpsHostFeedRequest* request,
                                   XlaOpsHostFeed* feed) {
  if (const char* wrong = xla_ops::CheckHostFeed(*request)) return wrong;
  void* memory = nullptr;
  if (const char* wrong = xla_ops::Allocate(*request, &memory)) return wrong;
  xla_ops::AddHostFeed(*request, memory, feed);
  return nullptr;
}
