// host_infeed and host_outfeed on the CPU: steps through few slots, a result
// that is waited for from another thread, numbers that begin anew, and wrong
// operands.

#include "xla_ops/cc/ops/host_feed/host_feed.h"

#include <time.h>

#include <cstdint>
#include <string>
#include <thread>  // NOLINT
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/host_feed/host_feed_checks.h"

extern "C" XLA_FFI_Error* xla_ops_host_infeed_cpu(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* xla_ops_host_outfeed_cpu(XLA_FFI_CallFrame* frame);

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::TestTensor;

constexpr int64_t kIn = 37;
constexpr int64_t kOut = 5;

XlaOpsHostFeed Make(int64_t slots) {
  const XlaOpsHostFeedRequest request = {sizeof(request), 0, slots, kIn, kOut};
  XlaOpsHostFeed feed = {};
  const char* wrong = xla_ops_host_feed_make(&request, &feed);
  EXPECT_EQ(std::string(wrong == nullptr ? "" : wrong), "");
  return feed;
}

std::string WhyNot(int64_t slots, int64_t in, int64_t out) {
  const XlaOpsHostFeedRequest request = {sizeof(request), 0, slots, in, out};
  XlaOpsHostFeed feed = {};
  const char* wrong = xla_ops_host_feed_make(&request, &feed);
  return wrong == nullptr ? "" : wrong;
}

char* SlotOf(const XlaOpsHostFeed& feed, int64_t slots, int64_t step) {
  return reinterpret_cast<char*>(feed.address) +
         (step & (slots - 1)) * feed.slot_bytes;
}

// As the host does it.
void Feed(const XlaOpsHostFeed& feed, int64_t slots, uint32_t step) {
  char* const slot = SlotOf(feed, slots, step);
  auto* const in = reinterpret_cast<int32_t*>(slot + feed.in_offset);
  for (int64_t i = 0; i < kIn; ++i) {
    in[i] = static_cast<int32_t>(step * 100 + i);
  }
  reinterpret_cast<HostFeedState*>(slot)->fed.store(step);
}

bool IsThere(const XlaOpsHostFeed& feed, uint32_t step, int64_t channel,
             int64_t timeout_us) {
  const XlaOpsHostFeedWait request = {sizeof(request), feed.feed, step, channel,
                                      timeout_us};
  XlaOpsHostFeedResult result = {sizeof(result), -1};
  const char* wrong = xla_ops_host_feed_wait(&request, &result);
  EXPECT_EQ(std::string(wrong == nullptr ? "" : wrong), "");
  return result.is_there == 1;
}

TestTensor Number(uint32_t step) {
  return TestTensor(DType::kS32, {1},
                    {static_cast<double>(static_cast<int32_t>(step))});
}

CallStatus Infeed(int64_t feed, const TestTensor& step, TestTensor* data,
                  TestTensor* next) {
  CallFrame frame;
  AddArgs(&frame, {&step});
  AddResults(&frame, {data, next});
  frame.AddAttr("feed", feed);
  return frame.Call(xla_ops_host_infeed_cpu);
}

CallStatus Outfeed(int64_t feed, int64_t channel, const TestTensor& values,
                   const TestTensor& step, TestTensor* out) {
  CallFrame frame;
  AddArgs(&frame, {&values, &step});
  AddResults(&frame, {out});
  frame.AddAttr("feed", feed).AddAttr("channel", channel);
  return frame.Call(xla_ops_host_outfeed_cpu);
}

// One step as a program runs it: returns the first `kOut` numbers of its input,
// the channel added.
void Run(const XlaOpsHostFeed& feed, uint32_t step) {
  TestTensor data(DType::kS32, {kIn});
  TestTensor next(DType::kS32, {1});
  const TestTensor number = Number(step);
  EXPECT_EQ(Infeed(feed.feed, number, &data, &next).message, std::string());
  EXPECT_EQ(next.Get(0), static_cast<int32_t>(step + 1));
  for (int64_t channel = 0; channel < 2; ++channel) {
    std::vector<double> values;
    for (int64_t i = 0; i < kOut; ++i) values.push_back(data.Get(i) + channel);
    TestTensor out(DType::kS32, {kOut});
    EXPECT_EQ(Outfeed(feed.feed, channel,
                      TestTensor(DType::kS32, {kOut}, values), number, &out)
                  .message,
              std::string());
    for (int64_t i = 0; i < kOut; ++i) EXPECT_EQ(out.Get(i), values[i]);
  }
}

void ExpectResult(const XlaOpsHostFeed& feed, int64_t slots, uint32_t step) {
  for (int64_t channel = 0; channel < 2; ++channel) {
    EXPECT_EQ(IsThere(feed, step, channel, 0), true);
    const auto* const out = reinterpret_cast<const int32_t*>(
        SlotOf(feed, slots, step) + feed.out_offset +
        channel * HostFeedBytes(kOut));
    for (int64_t i = 0; i < kOut; ++i) {
      EXPECT_EQ(out[i], static_cast<int32_t>(step * 100 + i + channel));
    }
  }
}

void RunSteps(int64_t slots, uint32_t first) {
  const XlaOpsHostFeed feed = Make(slots);
  for (uint32_t i = 0; i < 20; ++i) {
    const uint32_t step = first + i;
    EXPECT_EQ(IsThere(feed, step, 0, 0), false);
    Feed(feed, slots, step);
    Run(feed, step);
    ExpectResult(feed, slots, step);
    if (i < slots) continue;
    // Its slot has been taken, which needs no waiting.
    EXPECT_EQ(IsThere(feed, step - slots, 0, 60'000'000), false);
  }
}

XLA_OPS_TEST(StepsTakeSlotsInTurn) {
  for (const int64_t slots : {1, 2, 8}) {
    RunSteps(slots, 0);
    RunSteps(slots, 0x7FFFFFF8u);
    RunSteps(slots, 0xFFFFFFF8u);
  }
}

XLA_OPS_TEST(ResultsOfAnotherThreadAreWaitedFor) {
  const XlaOpsHostFeed feed = Make(4);
  Feed(feed, 4, 0);
  std::thread later([&] {
    const timespec sleep = {0, 20'000'000};
    nanosleep(&sleep, nullptr);
    Run(feed, 0);
  });
  EXPECT_EQ(IsThere(feed, 0, 1, 1'000), false);
  EXPECT_EQ(IsThere(feed, 0, 1, 60'000'000), true);
  later.join();
}

XLA_OPS_TEST(WrongOperands) {
  const XlaOpsHostFeed feed = Make(2);
  TestTensor data(DType::kS32, {kIn});
  TestTensor next(DType::kS32, {1});
  TestTensor long_data(DType::kS32, {kIn + 1});
  TestTensor floats(DType::kF32, {kIn});
  const TestTensor number = Number(0);
  const TestTensor pair(DType::kS32, {2}, {0, 0});
  ExpectInvalid(Infeed(feed.feed, number, &data, &next),
                "host_infeed: step must be one that the host has fed, got 0");
  ExpectInvalid(
      Infeed(feed.feed + 1, number, &data, &next),
      "host_infeed: feed must be one that this process has made, got " +
          std::to_string(feed.feed + 1));
  ExpectInvalid(Infeed(-1, number, &data, &next),
                "host_infeed: feed must be one that this process has made, got "
                "-1");
  ExpectInvalid(Infeed(feed.feed, pair, &data, &next),
                "host_infeed: step must have shape [1], got [2]");
  ExpectInvalid(Infeed(feed.feed, number, &long_data, &next),
                "host_infeed: data must have at most 37 elements, got 38");
  ExpectInvalid(Infeed(feed.feed, number, &floats, &next),
                "host_infeed: data must be int32, got float32");
  TestTensor out(DType::kS32, {kOut});
  TestTensor long_out(DType::kS32, {kOut + 1});
  const TestTensor values(DType::kS32, {kOut}, {1, 2, 3, 4, 5});
  const TestTensor many(DType::kS32, {kOut + 1}, {1, 2, 3, 4, 5, 6});
  ExpectInvalid(Outfeed(feed.feed, 2, values, number, &out),
                "host_outfeed: channel must be 0 or 1, got 2");
  ExpectInvalid(Outfeed(feed.feed, 0, many, number, &long_out),
                "host_outfeed: values must have at most 5 elements, got 6");
  ExpectInvalid(Outfeed(feed.feed, 0, values, number, &long_out),
                "host_outfeed: out must have shape [5], got [6]");
  EXPECT_EQ(WhyNot(3, kIn, kOut),
            std::string("slots must be a power of two, at most 1024"));
  EXPECT_EQ(WhyNot(0, kIn, kOut),
            std::string("slots must be a power of two, at most 1024"));
  EXPECT_EQ(WhyNot(2, 0, kOut),
            std::string("in_elements must be 1 to 2^31 - 1"));
  EXPECT_EQ(WhyNot(2, kIn, -1),
            std::string("out_elements must be 1 to 2^31 - 1"));
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
