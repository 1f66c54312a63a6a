// The kernels of host_infeed and host_outfeed: the device reads and writes host
// memory over the bus.
//
// Run by benchmarks/vllm_engine.py, part `right`.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/ops/host_feed/host_feed_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// A bus answers in a microsecond or two: a load a thread of this many blocks
// asks for 256 KB at once.
constexpr int64_t kMaxBlocks = 64;

struct Slots {
  char* memory;
  uint32_t mask;  // of a step's slot
  int64_t slot_bytes;

  __device__ char* Of(uint32_t step) const {
    return memory + (step & mask) * slot_bytes;
  }
};

Slots SlotsOf(const HostFeed& feed) {
  return {feed.memory, static_cast<uint32_t>(feed.slots - 1), feed.slot_bytes};
}

// Whether the host has fed the slot's step; what it has laid there can be read
// by all of the block then. One thread asks: a thread's acquiring load takes 30
// ns of the bus, whatever the others of its warp load.
__device__ __forceinline__ bool IsFed(const char* slot, uint32_t step) {
  int64_t fed = 0;
  if (threadIdx.x == 0) {
    asm volatile("ld.acquire.sys.global.b64 %0, [%1];"
                 : "=l"(fed)
                 : "l"(slot)
                 : "memory");
  }
  return __syncthreads_or(fed == int64_t{step} && threadIdx.x == 0) != 0;
}

__global__ void __launch_bounds__(kThreads)
    HostInfeedKernel(Slots slots, const int32_t* __restrict__ step_of,
                     int32_t* __restrict__ data, int32_t* __restrict__ next,
                     int64_t elements) {
  const auto step = static_cast<uint32_t>(*step_of);
  const char* const slot = slots.Of(step);
  // There is no other way to end with an error.
  if (!IsFed(slot, step)) __trap();
  // Loads that a warp makes one of, where volatile ones would go alone.
  const auto* const from =
      reinterpret_cast<const int4*>(slot + kHostFeedInOffset);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = first; i < (elements + 3) / 4; i += stride) {
    const int4 four = from[i];
    if (4 * i + 4 <= elements) {
      reinterpret_cast<int4*>(data)[i] = four;
    } else {
      const int32_t values[] = {four.x, four.y, four.z};
      for (int64_t j = 4 * i; j < elements; ++j) data[j] = values[j - 4 * i];
    }
  }
  if (first == 0) *next = static_cast<int32_t>(step + 1);
}

// One block, so that the number follows all values.
__global__ void __launch_bounds__(kThreads)
    HostOutfeedKernel(Slots slots, const int32_t* __restrict__ values,
                      const int32_t* __restrict__ step_of,
                      int32_t* __restrict__ out, int64_t elements,
                      int64_t offset, int channel) {
  const auto step = static_cast<uint32_t>(*step_of);
  char* const slot = slots.Of(step);
  auto* const to = reinterpret_cast<int32_t*>(slot + offset);
  for (int64_t i = threadIdx.x; i < elements; i += kThreads) {
    const int32_t value = values[i];
    to[i] = value;
    out[i] = value;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    auto* const returned = reinterpret_cast<int64_t*>(slot) + 1 + channel;
    asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(returned),
                 "l"(int64_t{step})
                 : "memory");
  }
}

}  // namespace

cudaError_t LaunchHostInfeed(cudaStream_t stream,
                             const HostInfeedParams& params) {
  const int64_t blocks = std::clamp<int64_t>(
      CeilDivide(params.elements, 4 * kThreads), 1, kMaxBlocks);
  return LaunchKernel<HostInfeedKernel>(
      stream, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
      SlotsOf(params.feed), params.step, params.data, params.next,
      params.elements);
}

cudaError_t LaunchHostOutfeed(cudaStream_t stream,
                              const HostOutfeedParams& params) {
  return LaunchKernel<HostOutfeedKernel>(
      stream, dim3(1), dim3(kThreads), SlotsOf(params.feed), params.values,
      params.step, params.out, params.elements,
      HostFeedResultOffset(params.feed, params.channel),
      static_cast<int>(params.channel));
}

}  // namespace xla_ops
