// The shape of the Hopper attention kernel (attention_sm90.cuh): its tiles,
// its warpgroups, and what lies in shared memory.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_SHAPE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_SHAPE_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/wgmma.cuh"

namespace xla_ops {

// kHeadDim is the padded head_dim (attention_head_dims.h). kAllPanelsInBox: a
// box of K or V holds all panels of its tokens, else one.
template <int kHeadDim, bool kAllPanelsInBox>
struct Sm90Shape {
  static constexpr bool kAllPanels = kAllPanelsInBox;
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kTokens = kHeadDim == 256 ? 80 : 128;  // of a KV tile
  // As many as fit, but that head_dim 64 gains nothing by a fourth, and pages
  // nothing by a third.
  static constexpr int kStages =
      kHeadDim == 256 || (kHeadDim == 128 && kAllPanels) ? 2 : 3;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Of a thread: 64 K registers in all.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static constexpr int kPanels = kHeadDim / 64;
  // The bytes in shared memory from 8 tokens of a K or V tile to the next 8,
  // and from a panel to the next.
  static constexpr int kAtomStride =
      kAllPanels ? kPanels * kAtomBytes : kAtomBytes;
  static constexpr int kPanelStride =
      kAllPanels ? kAtomBytes : kTokens * kPanelRowBytes;
  // Named barriers: 1 and on are the consumers' turns.
  static constexpr int kQueryEmptyBarrier = 1 + kConsumers;
  static constexpr int kQueryEmptyThreads = 128 * kConsumers + 96;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;
  // The dynamic part begins at the next multiple of 1024.
  static constexpr int kSharedBytes =
      1024 + kQueryBytes + 2 * kStages * kTileBytes;
};

// K, V and the query as the copy engine sees them: tensors of rank 5, which
// MakeMap and MakeQueryMap in attention_sm90.cu.cc describe.
struct Sm90Maps {
  CUtensorMap key;
  CUtensorMap value;
  CUtensorMap query;
  int query_tokens;  // of the query's box; 0: rows are copied one by one
  int box_tokens;
  int head_step;  // from a KV head to the next, in the map's coordinate
};

#if XLA_OPS_HAS_WGMMA

// The barriers of a stage of K or V, and of the other buffers, by address:
// X_full says that X has arrived, X_empty that its readers are done with it.
// The address is computed once for all, for the compiler would do so again
// before every use.
template <int kStages>
class Sm90Barriers {
 public:
  static constexpr int kCount = 6 + 4 * kStages;

  explicit __device__ __forceinline__ Sm90Barriers(uint64_t* barriers)
      : first_(__shfl_sync(kFullWarp, SharedAddress(barriers), 0)) {}

  __device__ __forceinline__ uint32_t item_full(int i) const { return At(i); }
  __device__ __forceinline__ uint32_t item_empty(int i) const {
    return At(2 + i);
  }
  __device__ __forceinline__ uint32_t query_full() const { return At(4); }
  // The copy of a V tile that then is cleared in part.
  __device__ __forceinline__ uint32_t value_tail() const { return At(5); }
  __device__ __forceinline__ uint32_t key_full(int stage) const {
    return At(6 + stage);
  }
  __device__ __forceinline__ uint32_t key_empty(int stage) const {
    return At(6 + kStages + stage);
  }
  __device__ __forceinline__ uint32_t value_full(int stage) const {
    return At(6 + 2 * kStages + stage);
  }
  __device__ __forceinline__ uint32_t value_empty(int stage) const {
    return At(6 + 3 * kStages + stage);
  }

 private:
  __device__ __forceinline__ uint32_t At(int i) const {
    return first_ + 8 * static_cast<uint32_t>(i);
  }

  uint32_t first_;
};

// A ring's place: the stage, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_SHAPE_CUH_
