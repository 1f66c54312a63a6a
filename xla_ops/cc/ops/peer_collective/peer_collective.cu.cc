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
#include <type_traits>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/exact_div.h"
#include "xla_ops/cc/device/launch.h"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/rms.cuh"
#include "xla_ops/cc/ops/peer_collective/peer_collective_launch.h"

namespace xla_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = 512;  // of a row that is normed
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

// Units that a thread of a block has: every `stride`-th from `first` to `end`.
struct Units {
  int64_t first;
  int64_t end;
  int64_t stride;
};

__device__ __forceinline__ Units UnitsOfGrid(int64_t count) {
  return {int64_t{blockIdx.x} * kThreads + threadIdx.x, count,
          int64_t{gridDim.x} * kThreads};
}

// One call, as a thread of its grid takes part in it. To wait for one unit
// after the other would cost the memory's latency each time, so kBatch of them
// are on the way at once.
template <int kBatch>
class Call {
 public:
  __device__ Call(const PeerGroup& group, const uint2* input)
      : group_(group),
        state_(reinterpret_cast<PeerState*>(group.memory[group.rank])),
        input_(input),
        // No block of this call changes it before all have read it.
        number_(*const_cast<volatile uint32_t*>(&state_->calls) + 1) {}

  __device__ void Send(const Units& mine) const {
    for (int64_t at = mine.first; at < mine.end; at += kBatch * mine.stride) {
      uint2 units[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = at + b * mine.stride;
        if (i < mine.end) units[b] = input_[i];
      }
      for (int step = 1; step < group_.size; ++step) {
        const int other = (group_.rank + step) % group_.size;
        uint4* const to = Packets(other, group_.rank) + at;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (at + b * mine.stride < mine.end) {
            StorePacket(to + b * mine.stride, units[b], number_);
          }
        }
      }
    }
  }

  // Calls use(b, i, rank, unit) for each of the thread's units of every rank,
  // and end(b, i) behind those of all; unit i is the b-th of a batch.
  template <typename Use, typename End>
  __device__ void Receive(const Units& mine, Use&& use, End&& end) const {
    for (int64_t at = mine.first; at < mine.end; at += kBatch * mine.stride) {
      const int count = static_cast<int>(min(
          int64_t{kBatch}, (mine.end - at + mine.stride - 1) / mine.stride));
      for (int rank = 0; rank < group_.size; ++rank) {
        const uint4* from = Packets(group_.rank, rank) + at;
        const bool is_own = rank == group_.rank;
        uint4 packets[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (!is_own && b < count) {
            packets[b] = LoadPacket(from + b * mine.stride);
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (b >= count) continue;
          use(b, at + b * mine.stride, rank,
              is_own ? input_[at + b * mine.stride]
                     : WaitForPacket(from + b * mine.stride, packets[b],
                                     number_, group_.timeout_ns));
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b < count) end(b, at + b * mine.stride);
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
  const uint32_t number_;
};

// Of sums and gathers that are nothing else.
constexpr int kBatch = 4;

template <typename T>
union Unit {
  static constexpr int kSize = kPeerUnitBytes / sizeof(T);
  uint2 bits;
  T values[kSize];
  __device__ Unit() {}
};

template <typename T>
__device__ __forceinline__ uint2 Rounded(const float* values) {
  Unit<T> unit;
#pragma unroll
  for (int j = 0; j < Unit<T>::kSize; ++j) {
    unit.values[j] = FromFloat<T>(values[j]);
  }
  return unit.bits;
}

// Adds a rank's unit to the sum, which rank 0's begins.
template <typename T>
__device__ __forceinline__ void Add(uint2 bits, int rank, float* sums) {
  Unit<T> unit;
  unit.bits = bits;
#pragma unroll
  for (int j = 0; j < Unit<T>::kSize; ++j) {
    const float value = ToFloat(unit.values[j]);
    sums[j] = rank == 0 ? value : sums[j] + value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    PeerSumKernel(const __grid_constant__ PeerGroup group,
                  const uint2* __restrict__ input, uint2* __restrict__ out,
                  const int64_t units) {
  const Call<kBatch> call(group, input);
  const Units mine = UnitsOfGrid(units);
  call.Send(mine);
  float sums[kBatch][Unit<T>::kSize];
  call.Receive(
      mine,
      [&](int b, int64_t, int rank, uint2 bits) {
        Add<T>(bits, rank, sums[b]);
      },
      [&](int b, int64_t i) { out[i] = Rounded<T>(sums[b]); });
  call.End();
}

__global__ void __launch_bounds__(kThreads)
    PeerGatherKernel(const __grid_constant__ PeerGroup group,
                     const uint2* __restrict__ input, uint2* __restrict__ out,
                     const int64_t units) {
  const Call<kBatch> call(group, input);
  const Units mine = UnitsOfGrid(units);
  call.Send(mine);
  call.Receive(
      mine,
      [&](int, int64_t i, int rank, uint2 unit) {
        out[rank * units + i] = unit;
      },
      [](int, int64_t) {});
  call.End();
}

// The sum, what is added to it, and the norm of that: a block a row, of which
// a thread has kUnits units. Rounds where fused_add_rms_norm does.
template <typename T, int kUnits>
__global__ void __launch_bounds__(kRowThreads)
    PeerAddRmsNormKernel(const __grid_constant__ PeerGroup group,
                         const uint2* __restrict__ input,
                         const uint2* __restrict__ residual,
                         const uint2* __restrict__ weight,
                         uint2* __restrict__ out,
                         uint2* __restrict__ residual_out, const int num_rows,
                         const int row_units, const ExactDiv hidden_size,
                         const float eps) {
  constexpr int kSize = Unit<T>::kSize;
  __shared__ WarpResults scratch;
  const Call<kUnits> call(group, input);
  const auto units_of = [&](int row) {
    const int64_t start = int64_t{row} * row_units;
    return Units{start + threadIdx.x, start + row_units, kRowThreads};
  };
  const int first = static_cast<int>(blockIdx.x);
  const int step = static_cast<int>(gridDim.x);
  for (int row = first; row < num_rows; row += step) call.Send(units_of(row));
  for (int row = first; row < num_rows; row += step) {
    const Units mine = units_of(row);
    Unit<T> total[kUnits];
    Unit<T> scale[kUnits];
#pragma unroll
    for (int b = 0; b < kUnits; ++b) {
      const int at = static_cast<int>(threadIdx.x) + b * kRowThreads;
      if (at >= row_units) continue;
      total[b].bits = residual[mine.first + b * kRowThreads];
      scale[b].bits = weight[at];
    }
    float sums[kUnits][kSize];
    float squares = 0.0f;
    call.Receive(
        mine,
        [&](int b, int64_t, int rank, uint2 bits) {
          Add<T>(bits, rank, sums[b]);
        },
        [&](int b, int64_t i) {
          Unit<T> sum;
          sum.bits = Rounded<T>(sums[b]);
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            total[b].values[j] = FromFloat<T>(ToFloat(sum.values[j]) +
                                              ToFloat(total[b].values[j]));
            const float value = ToFloat(total[b].values[j]);
            squares += value * value;
          }
          residual_out[i] = total[b].bits;
        });
    const float factor = RootMeanSquareScale(
        BlockSum<kRowThreads / 32, true>(squares, scratch), hidden_size, eps);
#pragma unroll
    for (int b = 0; b < kUnits; ++b) {
      if (static_cast<int>(threadIdx.x) + b * kRowThreads >= row_units)
        continue;
      Unit<T> normed;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const T value = FromFloat<T>(ToFloat(total[b].values[j]) * factor);
        normed.values[j] =
            FromFloat<T>(ToFloat(value) * ToFloat(scale[b].values[j]));
      }
      out[mine.first + b * kRowThreads] = normed.bits;
    }
    __syncthreads();  // scratch has been read
  }
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

cudaError_t LaunchPeerAddRmsNorm(cudaStream_t stream,
                                 const PeerAddRmsNormParams& params) {
  if (params.num_rows == 0 || params.row_units == 0) return cudaSuccess;
  const auto blocks =
      static_cast<unsigned>(std::min(kMaxBlocks, params.num_rows));
  return DispatchCudaFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch = [&](auto units) {
      return LaunchKernel<PeerAddRmsNormKernel<T, decltype(units)::value>>(
          stream, blocks, kRowThreads, params.group,
          static_cast<const uint2*>(params.input),
          static_cast<const uint2*>(params.residual),
          static_cast<const uint2*>(params.weight),
          static_cast<uint2*>(params.out),
          static_cast<uint2*>(params.residual_out),
          static_cast<int>(params.num_rows), static_cast<int>(params.row_units),
          ExactDiv(static_cast<float>(params.row_units * kPeerUnitBytes /
                                      static_cast<int64_t>(sizeof(T)))),
          params.eps);
    };
    static_assert(kPeerMaxRowUnits == 4 * kRowThreads);
    return params.row_units <= 2 * kRowThreads
               ? launch(std::integral_constant<int, 2>{})
               : launch(std::integral_constant<int, 4>{});
  });
}

}  // namespace xla_ops
