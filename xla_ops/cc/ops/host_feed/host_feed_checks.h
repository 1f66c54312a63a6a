// What the host does with a feed, on either platform: makes one, and checks the
// operands of its calls.

#ifndef XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_CHECKS_H_
#define XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_CHECKS_H_

#include <atomic>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/ops/host_feed/host_feed.h"

namespace xla_ops {

// The first line of a slot.
struct alignas(kHostFeedInOffset) HostFeedState {
  std::atomic<int64_t> fed;
  std::atomic<int64_t> returned[XLA_OPS_HOST_FEED_CHANNELS];
};
static_assert(sizeof(HostFeedState) == kHostFeedInOffset &&
                  sizeof(std::atomic<int64_t>) == sizeof(int64_t) &&
                  std::atomic<int64_t>::is_always_lock_free,
              "the device and Python write it too");

// The slot that a step has.
inline char* HostFeedSlot(const HostFeed& feed, uint32_t step) {
  return feed.memory + (step & (feed.slots - 1)) * feed.slot_bytes;
}

inline HostFeedState* HostFeedStateOf(const HostFeed& feed, uint32_t step) {
  return reinterpret_cast<HostFeedState*>(HostFeedSlot(feed, step));
}

// What is wrong with a request, or null.
const char* CheckHostFeed(const XlaOpsHostFeedRequest& request);

// Of all slots.
int64_t HostFeedMemoryBytes(const XlaOpsHostFeedRequest& request);

// `memory` is HostFeedMemoryBytes, aligned to a line, and stays.
void AddHostFeed(const XlaOpsHostFeedRequest& request, void* memory,
                 XlaOpsHostFeed* feed);

inline auto HostInfeedBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()  // step
      .Ret<ffi::AnyBuffer>()  // data
      .Ret<ffi::AnyBuffer>()  // next
      .Attr<int64_t>("feed");
}

inline auto HostOutfeedBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()  // values
      .Arg<ffi::AnyBuffer>()  // step
      .Ret<ffi::AnyBuffer>()  // out
      .Attr<int64_t>("feed")
      .Attr<int64_t>("channel");
}

ffi::Error MakeHostInfeedParams(ffi::AnyBuffer step,
                                ffi::Result<ffi::AnyBuffer> data,
                                ffi::Result<ffi::AnyBuffer> next, int64_t feed,
                                HostInfeedParams* params);

ffi::Error MakeHostOutfeedParams(ffi::AnyBuffer values, ffi::AnyBuffer step,
                                 ffi::Result<ffi::AnyBuffer> out, int64_t feed,
                                 int64_t channel, HostOutfeedParams* params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_CHECKS_H_
