// Sizes of the Hopper kernel of attention's gradient
// (attention_backward_sm90.cuh), and what lies in shared memory.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_SHAPE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_SHAPE_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/wgmma.cuh"

namespace xla_ops {

// kHeadDim is the padded head_dim. Up to 128 a consumer has 64 keys and all
// columns of dk and dv; at 256 both have the same 64 keys, and half of the
// columns each.
template <int kHeadDim>
struct BackwardSm90Shape {
  static constexpr bool kIsWide = kHeadDim == 256;
  static constexpr int kConsumers = 2;
  static constexpr int kKeys = kIsWide ? 64 : 128;         // of a tile
  static constexpr int kRows = kHeadDim == 64 ? 128 : 64;  // of a query tile
  static constexpr int kStages = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kRowPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kKeyBytes = kPanels * kKeyPanelBytes;
  static constexpr int kRowBytes = kPanels * kRowPanelBytes;
  // Weights or the gradient of logits, keys by rows. Twice: the second is
  // written while the other consumer still reads the first.
  static constexpr int kWeightBytes = kKeys * kRows * 2;
  static constexpr int kWeightBuffers = kIsWide ? 4 : 2;
  // A consumer's part of a dq tile: 64 rows by these columns. Wide ones are
  // added from registers, for want of shared memory.
  static constexpr int kSumColumns = kIsWide ? 128 : 64;
  static constexpr int kSumElements = 64 * kSumColumns;
  static constexpr int kSumBytes = kIsWide ? 0 : kSumElements * 4;
  static constexpr int kRowFloatBytes = kRows * 4;  // of lse, or delta
  // In this order, from the next multiple of 1024 on.
  static constexpr int kSharedBytes =
      1024 + 2 * kKeyBytes + 2 * kStages * kRowBytes +
      kWeightBuffers * kWeightBytes + kConsumers * kSumBytes +
      2 * kStages * kRowFloatBytes;
  static_assert(kSharedBytes <= 226 * 1024 + 512);
};

// Tensors of rank 5 as the copy engine sees them, in boxes of a tile's rows
// and a panel's columns: [1, 1, head, row, head_dim].
struct BackwardSm90Maps {
  CUtensorMap query;
  CUtensorMap grad;
  CUtensorMap key;
  CUtensorMap value;
};

// A thread's four floats i of a consumer's part of a dq tile, in registers as
// wgmma.cuh says, lie at [i, thread]: nobody but BackwardSm90StoreKernel
// reads them.
__device__ __forceinline__ int SumIndex(int i, int thread) {
  return (i * 128 + thread) * 4;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_SHAPE_CUH_
