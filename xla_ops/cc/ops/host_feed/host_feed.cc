// What the handlers of both platforms share: feeds by number, checks, and how
// the host waits.

#include "xla_ops/cc/ops/host_feed/host_feed.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/numbered.h"
#include "xla_ops/cc/ops/host_feed/host_feed_checks.h"

namespace xla_ops {
namespace {

constexpr char kInfeed[] = "host_infeed";
constexpr char kOutfeed[] = "host_outfeed";
constexpr int kSpins = 100;           // before a waiting thread sleeps
constexpr int64_t kSleepNs = 30'000;  // each time

int64_t NowUs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1'000'000} + now.tv_nsec / 1000;
}

ffi::Error FindFeed(const char* op, int64_t number, HostFeed* feed) {
  const HostFeed* const found = Numbered<HostFeed>::All().Find(number);
  if (found == nullptr) {
    return MustError(op, "feed", "be one that this process has made",
                     std::to_string(number));
  }
  *feed = *found;
  return ffi::Error::Success();
}

ffi::Error CheckElements(const char* op, const char* argument, int64_t elements,
                         int64_t most) {
  if (elements <= most) return ffi::Error::Success();
  return MustError(op, argument,
                   "have at most " + std::to_string(most) + " elements",
                   std::to_string(elements));
}

}  // namespace

const char* CheckHostFeed(const XlaOpsHostFeedRequest& request) {
  const int64_t slots = request.slots;
  if (slots < 1 || slots > 1024 || (slots & (slots - 1)) != 0) {
    return "slots must be a power of two, at most 1024";
  }
  if (request.in_elements < 1 || request.in_elements > INT32_MAX) {
    return "in_elements must be 1 to 2^31 - 1";
  }
  if (request.out_elements < 1 || request.out_elements > INT32_MAX) {
    return "out_elements must be 1 to 2^31 - 1";
  }
  return nullptr;
}

int64_t HostFeedMemoryBytes(const XlaOpsHostFeedRequest& request) {
  const int64_t slot =
      HostFeedOutOffset(request.in_elements) +
      XLA_OPS_HOST_FEED_CHANNELS * HostFeedBytes(request.out_elements);
  return request.slots * slot;
}

void AddHostFeed(const XlaOpsHostFeedRequest& request, void* memory,
                 XlaOpsHostFeed* result) {
  auto feed = std::make_unique<HostFeed>();
  feed->memory = static_cast<char*>(memory);
  feed->slots = request.slots;
  feed->slot_bytes = HostFeedMemoryBytes(request) / request.slots;
  feed->in_elements = request.in_elements;
  feed->out_elements = request.out_elements;
  for (int64_t slot = 0; slot < feed->slots; ++slot) {
    auto* const state =
        new (HostFeedSlot(*feed, static_cast<uint32_t>(slot))) HostFeedState;
    state->fed.store(kNoStep);
    for (auto& returned : state->returned) returned.store(kNoStep);
  }
  result->address = reinterpret_cast<int64_t>(feed->memory);
  result->slot_bytes = feed->slot_bytes;
  result->in_offset = kHostFeedInOffset;
  result->out_offset = HostFeedOutOffset(feed->in_elements);
  result->feed = Numbered<HostFeed>::All().Add(std::move(feed));
}

ffi::Error MakeHostInfeedParams(ffi::AnyBuffer step,
                                ffi::Result<ffi::AnyBuffer> data,
                                ffi::Result<ffi::AnyBuffer> next, int64_t feed,
                                HostInfeedParams* params) {
  XLA_OPS_RETURN_IF_ERROR(FindFeed(kInfeed, feed, &params->feed));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kInfeed, "step", step, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kInfeed, "step", step, {1}));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kInfeed, "data", data, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kInfeed, "next", next, step));
  params->elements = static_cast<int64_t>(data->element_count());
  XLA_OPS_RETURN_IF_ERROR(CheckElements(kInfeed, "data", params->elements,
                                        params->feed.in_elements));
  params->step = static_cast<const int32_t*>(step.untyped_data());
  params->data = static_cast<int32_t*>(data->untyped_data());
  params->next = static_cast<int32_t*>(next->untyped_data());
  return ffi::Error::Success();
}

ffi::Error MakeHostOutfeedParams(ffi::AnyBuffer values, ffi::AnyBuffer step,
                                 ffi::Result<ffi::AnyBuffer> out, int64_t feed,
                                 int64_t channel, HostOutfeedParams* params) {
  XLA_OPS_RETURN_IF_ERROR(FindFeed(kOutfeed, feed, &params->feed));
  if (channel < 0 || channel >= XLA_OPS_HOST_FEED_CHANNELS) {
    return MustError(kOutfeed, "channel", "be 0 or 1", std::to_string(channel));
  }
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kOutfeed, "values", values, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckDType(kOutfeed, "step", step, {DType::kS32}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kOutfeed, "step", step, {1}));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kOutfeed, "out", out, values));
  params->elements = static_cast<int64_t>(values.element_count());
  XLA_OPS_RETURN_IF_ERROR(CheckElements(kOutfeed, "values", params->elements,
                                        params->feed.out_elements));
  params->channel = channel;
  params->values = static_cast<const int32_t*>(values.untyped_data());
  params->step = static_cast<const int32_t*>(step.untyped_data());
  params->out = static_cast<int32_t*>(out->untyped_data());
  return ffi::Error::Success();
}

}  // namespace xla_ops

const char* xla_ops_host_feed_wait(const XlaOpsHostFeedWait* request,
                                   XlaOpsHostFeedResult* result) {
  using xla_ops::HostFeed;
  const HostFeed* const feed =
      xla_ops::Numbered<HostFeed>::All().Find(request->feed);
  if (feed == nullptr) return "feed must be one that this process has made";
  if (request->channel < 0 || request->channel >= XLA_OPS_HOST_FEED_CHANNELS) {
    return "channel must be 0 or 1";
  }
  const auto step = static_cast<uint32_t>(request->step);
  const auto& returned =
      xla_ops::HostFeedStateOf(*feed, step)->returned[request->channel];
  const int64_t end = xla_ops::NowUs() + request->timeout_us;
  for (int spins = 0;; ++spins) {
    const int64_t last = returned.load(std::memory_order_acquire);
    result->is_there = last == int64_t{step};
    // A later step has taken the slot, as numbers go that begin anew.
    const bool is_over =
        last != xla_ops::kNoStep &&
        static_cast<int32_t>(static_cast<uint32_t>(last) - step) > 0;
    if (result->is_there || is_over || xla_ops::NowUs() >= end) return nullptr;
    if (spins < xla_ops::kSpins) {
      sched_yield();
    } else {
      const timespec sleep = {0, xla_ops::kSleepNs};
      nanosleep(&sleep, nullptr);
    }
  }
}
