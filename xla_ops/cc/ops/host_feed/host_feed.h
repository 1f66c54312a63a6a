// A program's inputs and results through memory that the host and the device
// both see, without a transfer.
//
// A transfer to a GPU of XLA's waits for the program before, and the host hears
// of one from there a millisecond or two late while it launches the next
// program. Here the host lays a step's input in a slot before it launches the
// step's program, which reads it from there, and watches a number for results.
//
//   xla_ops.host_infeed(step) -> (data, next)
//     step: int32 [1], the step's number, of which slots are used in turn
//     data: int32 [n], n at most in_elements: what the host has laid there
//     next: int32 [1], step + 1, for the next step's program
//   xla_ops.host_outfeed(values, step) -> out
//     values: int32 [n], n at most out_elements
//     out: values, which the host then finds in the step's slot
//
// Both have the attributes `feed`, and outfeed `channel`, 0 or 1: which of a
// step's two results it is. The host lays a step's input before its program is
// launched, and in a slot whose last step has returned channel 0; a program
// that finds no input of its step fails.
//
// Tested by host_feed_test.cc and tests/programs/test_feed.py; on a GPU every
// step of benchmarks/vllm_engine.py runs it.

#ifndef XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_H_
#define XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_H_

#include <cstdint>

#define XLA_OPS_HOST_FEED_CHANNELS 2

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t struct_size;
  int64_t device;        // as CUDA counts; the CPU's library does not read it
  int64_t slots;         // a power of two
  int64_t in_elements;   // of the largest input
  int64_t out_elements;  // of the largest result
} XlaOpsHostFeedRequest;

typedef struct {
  int64_t struct_size;
  int64_t feed;     // the handlers' attribute
  int64_t address;  // of the first slot
  // Of a slot: its bytes, where its input lies, and the results of the
  // channels, one behind the other. At its beginning is the number of the
  // input's step.
  int64_t slot_bytes;
  int64_t in_offset;
  int64_t out_offset;
} XlaOpsHostFeed;

typedef struct {
  int64_t struct_size;
  int64_t feed;
  int64_t step;
  int64_t channel;
  int64_t timeout_us;
} XlaOpsHostFeedWait;

typedef struct {
  int64_t struct_size;
  int64_t is_there;  // 0 or 1
} XlaOpsHostFeedResult;

// Makes a feed, for as long as the process lives. Both return what is wrong,
// until the thread's next call, or null.
__attribute__((visibility("default"))) const char* xla_ops_host_feed_make(
    const XlaOpsHostFeedRequest* request, XlaOpsHostFeed* feed);

// Waits until a step has returned a channel's result, or the time is over.
__attribute__((visibility("default"))) const char* xla_ops_host_feed_wait(
    const XlaOpsHostFeedWait* request, XlaOpsHostFeedResult* result);

#ifdef __cplusplus
}  // extern "C"

namespace xla_ops {

// As handlers and kernels need it.
struct HostFeed {
  char* memory;  // slots, one behind the other
  int64_t slots;
  int64_t slot_bytes;
  int64_t in_elements;
  int64_t out_elements;
};

// A slot begins with int64 fields, on a line of its own: the step whose input
// lies there, and for each channel the step whose result does. A step is its
// number's 32 bits, or kNoStep.
constexpr int64_t kNoStep = -1;
constexpr int64_t kHostFeedInOffset = 64;

// Whole lines.
constexpr int64_t HostFeedBytes(int64_t elements) {
  return (elements * static_cast<int64_t>(sizeof(int32_t)) + 63) / 64 * 64;
}

constexpr int64_t HostFeedOutOffset(int64_t in_elements) {
  return kHostFeedInOffset + HostFeedBytes(in_elements);
}

// Of a channel's result in its step's slot.
constexpr int64_t HostFeedResultOffset(const HostFeed& feed, int64_t channel) {
  return HostFeedOutOffset(feed.in_elements) +
         channel * HostFeedBytes(feed.out_elements);
}

struct HostInfeedParams {
  HostFeed feed;
  const int32_t* step;
  int32_t* data;
  int32_t* next;
  int64_t elements;
};

struct HostOutfeedParams {
  HostFeed feed;
  int64_t channel;
  const int32_t* values;
  const int32_t* step;
  int32_t* out;
  int64_t elements;
};

}  // namespace xla_ops
#endif  // __cplusplus

#endif  // XLA_OPS_CC_OPS_HOST_FEED_HOST_FEED_H_
