// The kernels of peer_collective: each rank stores its input into the others'
// memory, and takes what has come into its own.
//
// A unit of 8 bytes travels in a packet of 16: two halves, and behind each the
// number of the call. A store of 8 bytes arrives as a whole, so a half whose
// number is the call's is there; nothing else has to be waited for, neither a
// fence nor a flag (NCCL's LL protocol). It costs twice the bytes, of which a
// decode step has few.
//
// Packets of one call stay until the call after the next. Its kernel follows
// that of the next, for which the other ranks' packets of the next have come,
// so that these have ended the call whose packets it overwrites.
//
// Run by tests/gpu/check_peers.py.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/ops/peer_collective/peer_collective_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
// All of them run at once, on any GPU that this is for: a block that waits
// keeps no other from sending.
constexpr int64_t kMaxBlocks = 128;
constexpr int kSpinsBeforeLook = 1024;  // at the clock

__device__ __forceinline__ void StorePacket(uint4* to, uint2 unit,
                                            uint32_t call) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to),
               "r"(unit.x), "r"(call), "r"(unit.y), "r"(call)
               : "memory");
}

__device__ __forceinline__ uint4 LoadPacket(const uint4* from) {
  uint4 packet;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(packet.x), "=r"(packet.y), "=r"(packet.z), "=r"(packet.w)
               : "l"(from)
               : "memory");
  return packet;
}

__device__ __forceinline__ uint64_t ClockNs() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// The unit that comes with the call's number; `packet` was loaded from there.
__device__ __forceinline__ uint2 WaitForPacket(const uint4* from, uint4 packet,
                                               uint32_t call,
                                               uint64_t timeout_ns) {
  uint64_t start = 0;
  for (int spins = 1; packet.y != call || packet.w != call; ++spins) {
    packet = LoadPacket(from);
    if (spins % kSpinsBeforeLook != 0) continue;
    const uint64_t now = ClockNs();
    if (start == 0) start = now;
    // There is no other way to end with an error.
    if (now - start > timeout_ns) __trap();
  }
  return {packet.x, packet.z};
}

// One call, as a thread of its grid takes part in it.
class Call {
 public:
  __device__ Call(const PeerGroup& group, const uint2* input, int64_t units)
      : group_(group),
        state_(reinterpret_cast<PeerState*>(group.memory[group.rank])),
        input_(input),
        units_(units),
        // No block of this call changes it before all have read it.
        number_(*const_cast<volatile uint32_t*>(&state_->calls) + 1),
        first_(int64_t{blockIdx.x} * kThreads + threadIdx.x),
        stride_(int64_t{gridDim.x} * kThreads) {}

  __device__ void Send() const {
    for (int64_t at = first_; at < units_; at += kBatch * stride_) {
      uint2 units[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = at + b * stride_;
        if (i < units_) units[b] = input_[i];
      }
      for (int step = 1; step < group_.size; ++step) {
        const int other = (group_.rank + step) % group_.size;
        uint4* const to = Packets(other, group_.rank) + at;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (at + b * stride_ < units_) {
            StorePacket(to + b * stride_, units[b], number_);
          }
        }
      }
    }
  }

  // Calls use(b, i, rank, unit) for each of the thread's units of every rank,
  // and end(b, i) behind those of all; unit i is the b-th of kBatch that are on
  // the way at once: to wait for one after the other costs the memory's latency
  // each time.
  template <typename Use, typename End>
  __device__ void Receive(Use&& use, End&& end) const {
    for (int64_t at = first_; at < units_; at += kBatch * stride_) {
      const int count = static_cast<int>(
          min(int64_t{kBatch}, (units_ - at + stride_ - 1) / stride_));
      for (int rank = 0; rank < group_.size; ++rank) {
        const uint4* from = Packets(group_.rank, rank) + at;
        const bool is_own = rank == group_.rank;
        uint4 packets[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (!is_own && b < count) packets[b] = LoadPacket(from + b * stride_);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (b >= count) continue;
          use(b, at + b * stride_, rank,
              is_own ? input_[at + b * stride_]
                     : WaitForPacket(from + b * stride_, packets[b], number_,
                                     group_.timeout_ns));
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b < count) end(b, at + b * stride_);
      }
    }
  }

  // All threads of the grid must call.
  __device__ void End() const {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&state_->finished, 1) == gridDim.x - 1) {
      state_->finished = 0;
      state_->calls = number_;
    }
  }

  static constexpr int kBatch = 4;

 private:
  // Where rank `of` keeps what rank `by` has sent.
  __device__ uint4* Packets(int of, int by) const {
    const int64_t slot = int64_t{number_ & 1} * group_.size + by;
    return reinterpret_cast<uint4*>(group_.memory[of] + kPeerHeaderBytes) +
           slot * group_.slot_units;
  }

  const PeerGroup& group_;
  PeerState* const state_;
  const uint2* const input_;
  const int64_t units_;
  const uint32_t number_;
  const int64_t first_;
  const int64_t stride_;
};

template <typename T>
union Unit {
  static constexpr int kSize = kPeerUnitBytes / sizeof(T);
  uint2 bits;
  T values[kSize];
  __device__ Unit() {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    PeerSumKernel(const __grid_constant__ PeerGroup group,
                  const uint2* __restrict__ input, uint2* __restrict__ out,
                  const int64_t units) {
  constexpr int kSize = Unit<T>::kSize;
  const Call call(group, input, units);
  call.Send();
  float sums[Call::kBatch][kSize];
  call.Receive(
      [&](int b, int64_t, int rank, uint2 bits) {
        Unit<T> unit;
        unit.bits = bits;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float value = ToFloat(unit.values[j]);
          sums[b][j] = rank == 0 ? value : sums[b][j] + value;
        }
      },
      [&](int b, int64_t i) {
        Unit<T> sum;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          sum.values[j] = FromFloat<T>(sums[b][j]);
        }
        out[i] = sum.bits;
      });
  call.End();
}

__global__ void __launch_bounds__(kThreads)
    PeerGatherKernel(const __grid_constant__ PeerGroup group,
                     const uint2* __restrict__ input, uint2* __restrict__ out,
                     const int64_t units) {
  const Call call(group, input, units);
  call.Send();
  call.Receive([&](int, int64_t i, int rank,
                   uint2 unit) { out[rank * units + i] = unit; },
               [](int, int64_t) {});
  call.End();
}

}  // namespace

cudaError_t LaunchPeerCollective(cudaStream_t stream,
                                 const PeerCollectiveParams& params) {
  const int64_t units = params.bytes / kPeerUnitBytes;
  if (units == 0) return cudaSuccess;
  const int64_t blocks = std::min(kMaxBlocks, CeilDivide(units, kThreads));
  const auto* const input = static_cast<const uint2*>(params.input);
  auto* const out = static_cast<uint2*>(params.out);
  const auto grid = static_cast<unsigned>(blocks);
  if (params.gathers) {
    return LaunchKernel<PeerGatherKernel>(stream, grid, kThreads, params.group,
                                          input, out, units);
  }
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return LaunchKernel<PeerSumKernel<T>>(stream, grid, kThreads, params.group,
                                          input, out, units);
  });
}

}  // namespace xla_ops
