// CPU handlers of xla_ops.host_infeed and xla_ops.host_outfeed.

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/ops/host_feed/host_feed.h"
#include "xla_ops/cc/ops/host_feed/host_feed_checks.h"

namespace xla_ops {
namespace {

ffi::Error HostInfeed(const HostInfeedParams& params, ffi::ThreadPool&) {
  const auto step = static_cast<uint32_t>(*params.step);
  const HostFeedState& state = *HostFeedStateOf(params.feed, step);
  if (state.fed.load(std::memory_order_acquire) != int64_t{step}) {
    return MustError("host_infeed", "step", "be one that the host has fed",
                     std::to_string(step));
  }
  std::memcpy(params.data, HostFeedSlot(params.feed, step) + kHostFeedInOffset,
              params.elements * sizeof(int32_t));
  *params.next = static_cast<int32_t>(step + 1);
  return ffi::Error::Success();
}

ffi::Error HostOutfeed(const HostOutfeedParams& params, ffi::ThreadPool&) {
  const auto step = static_cast<uint32_t>(*params.step);
  const size_t bytes = params.elements * sizeof(int32_t);
  std::memcpy(HostFeedSlot(params.feed, step) +
                  HostFeedResultOffset(params.feed, params.channel),
              params.values, bytes);
  HostFeedState& state = *HostFeedStateOf(params.feed, step);
  state.returned[params.channel].store(step, std::memory_order_release);
  if (params.out != params.values) {
    std::memcpy(params.out, params.values, bytes);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_OPS_CPU_HANDLER(host_infeed, HostInfeedBinding(), MakeHostInfeedParams,
                    HostInfeed);
XLA_OPS_CPU_HANDLER(host_outfeed, HostOutfeedBinding(), MakeHostOutfeedParams,
                    HostOutfeed);

}  // namespace xla_ops

const char* xla_ops_host_feed_make(const XlaOpsHostFeedRequest* request,
                                   XlaOpsHostFeed* feed) {
  if (const char* wrong = xla_ops::CheckHostFeed(*request)) return wrong;
  void* const memory =
      mmap(nullptr, xla_ops::HostFeedMemoryBytes(*request),
           PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return "in_elements must be fewer: no memory";
  xla_ops::AddHostFeed(*request, memory, feed);
  return nullptr;
}
