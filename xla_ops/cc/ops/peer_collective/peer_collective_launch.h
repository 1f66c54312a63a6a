// The CUDA launcher of peer_collective; contract in peer_collective.h.

#ifndef XLA_OPS_CC_OPS_PEER_COLLECTIVE_PEER_COLLECTIVE_LAUNCH_H_
#define XLA_OPS_CC_OPS_PEER_COLLECTIVE_PEER_COLLECTIVE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/ops/peer_collective/peer_collective.h"

namespace xla_ops {

constexpr int64_t kPeerUnitBytes = 8;     // of the input
constexpr int64_t kPeerPacketBytes = 16;  // that a unit is sent in

// The first bytes of a rank's memory: of use to the rank itself alone.
struct PeerState {
  uint32_t calls;     // that have ended
  uint32_t finished;  // blocks of the call that runs
};
constexpr int64_t kPeerHeaderBytes = 256;

// A group as a kernel needs it. A rank's memory is its state, and then packets:
// [2] for every other call, [size] by the rank that sent them, [slot_units].
struct PeerGroup {
  char* memory[XLA_OPS_PEER_GROUP_MAX_RANKS];
  int rank;
  int size;
  int64_t slot_units;
  uint64_t timeout_ns;
};

constexpr int64_t PeerMemoryBytes(int64_t size, int64_t slot_units) {
  return kPeerHeaderBytes + 2 * size * slot_units * kPeerPacketBytes;
}

struct PeerCollectiveParams {
  PeerGroup group;
  bool gathers;
  DType dtype;  // of a sum
  const void* input;
  void* out;
  int64_t bytes;  // a multiple of kPeerUnitBytes, at most slot_units of them
};

// Of a row that can be normed behind its sum.
constexpr int64_t kPeerMaxRowUnits = 2048;

struct PeerAddRmsNormParams {
  PeerGroup group;
  DType dtype;
  const void* input;
  const void* residual;
  const void* weight;  // [row]
  void* out;
  void* residual_out;
  int64_t num_rows;
  int64_t row_units;  // at most kPeerMaxRowUnits
  float eps;
};

// Queues the call on `stream`; neither allocates nor synchronises. `input` and
// `out` are aligned to kPeerUnitBytes.
cudaError_t LaunchPeerCollective(cudaStream_t stream,
                                 const PeerCollectiveParams& params);

cudaError_t LaunchPeerAddRmsNorm(cudaStream_t stream,
                                 const PeerAddRmsNormParams& params);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_PEER_COLLECTIVE_PEER_COLLECTIVE_LAUNCH_H_
