// Attention on Hopper's warpgroup products and bulk copies, for prefill in
// fp16 and bf16. The roles and the pipeline are FlashAttention-3's (Shah et
// al., 2024, https://arxiv.org/abs/2407.08608), but for one overlap: see
// attention_sm90_mainloop.cuh.
//
// A persistent block takes work items one by one from a counter in the
// workspace: a split of the KV tokens of a tile of kRows packed query rows (the
// query heads of one KV head folded into rows: packed row r is token r / group,
// head r % group) of one sequence and KV head. Roles of its warpgroups:
//   producer, warp 0      takes items, and copies K and V tiles by TMA
//   producer, warps 1-3   copy the query tile, row by row where it is no box
//   consumers             64 query rows each
// KV tiles are taken from the last to the first, so that those that need a
// mask come first.
//
//   attention_sm90_shape.cuh      sizes, barriers, shared memory
//   attention_sm90_scheduler.cuh  items
//   attention_sm90_load.cuh       the producer: rows or pages, and queries
//   attention_sm90_mainloop.cuh   the consumers
//   attention_sm90_epilogue.cuh   what they write
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_load.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_mainloop.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_scheduler.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_shape.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

template <typename T, int kHeadDim, bool kAllPanels>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim, kAllPanels>::kThreads, 1)
    AttentionSm90Kernel(const __grid_constant__ Sm90Maps maps,
                        const __grid_constant__ AttentionArgs args) {
#if XLA_OPS_HAS_WGMMA
  using Shape = Sm90Shape<kHeadDim, kAllPanels>;
  constexpr int kStages = Shape::kStages;
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ uint64_t barrier_space[Sm90Barriers<kStages>::kCount];
  __shared__ Sm90Item items[2];
  __shared__ unsigned masks[kStages];
  const Sm90Barriers<kStages> barriers(barrier_space);
  const uint32_t query = (SharedAddress(dynamic_shared) + 1023) & ~1023u;
  const uint32_t keys = query + Shape::kQueryBytes;
  const uint32_t values = keys + kStages * Shape::kTileBytes;

  if (threadIdx.x == 0) {
    // Warps arrive, by one lane, but for the query's copies row by row.
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    for (int i = 0; i < 2; ++i) {
      InitBarrier(barriers.item_full(i), 1);
      InitBarrier(barriers.item_empty(i), 3 + kConsumerWarps);
    }
    InitBarrier(barriers.query_full(), maps.query_tokens > 0 ? 1 : 96);
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(barriers.key_full(i), 1);
      InitBarrier(barriers.key_empty(i), kConsumerWarps);
      InitBarrier(barriers.value_full(i), 1);
      InitBarrier(barriers.value_empty(i), kConsumerWarps);
    }
    InitBarrier(barriers.value_tail(), 1);
    FenceBarrierInit();
    PrefetchMap(&maps.key);
    PrefetchMap(&maps.value);
    if (maps.query_tokens > 0) PrefetchMap(&maps.query);
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    DeallocateRegisters<Shape::kProducerRegisters>();
    if (threadIdx.x < 32) {
      LoadKeysAndValues<Shape>(maps, args, barriers, items, masks, keys,
                               values);
    } else {
      LoadQueries<T, Shape>(maps, args, barriers, items, query);
    }
  } else {
    AllocateRegisters<Shape::kConsumerRegisters>();
    Consume<T, kHeadDim, Shape>(args, barriers, items, masks, query, keys,
                                values);
  }
#endif  // XLA_OPS_HAS_WGMMA
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_
