// Attention's gradient on Hopper's warpgroup products and bulk copies, for
// contiguous keys in fp16 and bf16. Tiles, products and
// what is kept in registers are those of FlashAttention-3's backward (Shah et
// al., 2024, https://arxiv.org/abs/2407.08608).
//
// A block has a tile of 128 keys of a sequence and KV head, and goes over the
// query heads that read it and their tiles of query rows. All products have
// keys as rows, so that weights and ds go from one product's registers to the
// next one's:
//   S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q
// of which each of two consumers has 64 keys; only for
//   dQ += dS K
// dS goes through shared memory, where each consumer takes both's, for its
// half of the columns (head_dim 128) or of the rows (64). What belongs to one
// tile of dq comes from many blocks: each adds it to sums in fp32 by bulk
// copies, in any order, and BackwardSm90StoreKernel rounds them. A producer
// warp copies tiles.
// Head_dim 256: attention_backward_sm90_wide.cuh.
//
// Tested by tests/gpu/check_attention_backward.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_load.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_products.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_shape.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_wide.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

// A consumer warpgroup.
template <typename T, int kHeadDim, bool kTransform>
__device__ __forceinline__ void BackwardConsume(
    const AttentionBackwardArgs& args,
    BackwardSm90Barriers<BackwardSm90Shape<kHeadDim>::kStages>& barriers,
    const BackwardSm90Shared<BackwardSm90Shape<kHeadDim>>& shared,
    const BackwardSm90Work& work) {
  using Shape = BackwardSm90Shape<kHeadDim>;
  constexpr int kRows = Shape::kRows;
  const AttentionArgs& batch = args.batch;
  const int consumer = threadIdx.x / 128 - 1;
  const int thread = threadIdx.x % 128;
  const int lane = threadIdx.x % 32;
  const bool elected = lane == 0;
  // This thread's keys, in the tile: this one and the eighth after it.
  const int own_key = consumer * 64 + thread / 32 * 16 + lane / 4;
  const uint32_t own_keys = shared.keys + consumer * 64 * kPanelRowBytes;
  const uint32_t own_values = shared.values + consumer * 64 * kPanelRowBytes;
  const int shift = work.tile.Shift();
  const int group = batch.group.value();

  float dk[kHeadDim / 2];
  float dv[kHeadDim / 2];
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.0f;

  Ring<Shape::kStages> ring;
  int turn = 0;
  Wait(&barriers.key_full, 0);
  for (int head = work.kv_head * group; head < (work.kv_head + 1) * group;
       ++head) {
    const float alibi_slope =
        kTransform ? AlibiSlope(batch, work.tile.seq, head) : 0.0f;
#pragma unroll 1
    for (int tile = work.tile_begin; tile < work.tile_end; ++tile) {
      const int stage = ring.stage;
      const uint32_t query = shared.queries + stage * Shape::kRowBytes;
      const uint32_t grad = shared.grads + stage * Shape::kRowBytes;
      float scores[kRows / 2];
      float products[kRows / 2];
      Wait(&barriers.query_full[stage], ring.parity);
      StartKeyProduct<T, Shape>(own_keys, query, scores);
      Wait(&barriers.grad_full[stage], ring.parity);
      StartKeyProduct<T, Shape>(own_values, grad, products);
      WgmmaWait<1>();
      FenceRegisters(scores);

      const int first_position = tile * kRows + shift;
      uint32_t weights[kRows / 16][4];
      FindWeights<T, kRows, kTransform>(
          batch, work.tile.first + own_key, work.tile.range.key_rows,
          first_position + lane % 4 * 2,
          IsMasked(batch, work.tile.range.key_rows, first_position,
                   first_position + Shape::kRows - 1, work.tile.first,
                   work.tile.first + Shape::kKeys - 1),
          shared.lses + stage * Shape::kRowFloatBytes + lane % 4 * 8,
          alibi_slope, scores, weights);
      StartRowProduct<T, Shape>(weights, grad, dv);
      WgmmaWait<1>();
      FenceRegisters(products);

      uint32_t changes[kRows / 16][4];
      FindChanges<T, kRows>(
          shared.deltas + stage * Shape::kRowFloatBytes + lane % 4 * 8,
          products, scores, changes);
      const uint32_t ds = shared.weights + turn * Shape::kWeightBytes;
      turn ^= 1;
      StoreKeysByRows<Shape::kKeyPanelBytes>(ds, own_key, 0, changes);
      FenceSharedForAsync();
      if (thread == 0) WaitForAddsToRead();
      SyncNamed(1, 256);

      float dq[32];
      StartQueryProduct<T, Shape>(
          ds + (kHeadDim == 64 ? consumer : 0) * Shape::kKeyPanelBytes,
          shared.keys + (kHeadDim == 64 ? 0 : consumer) * Shape::kKeyPanelBytes,
          dq);
      StartRowProduct<T, Shape>(changes, query, dk);
      WgmmaWait<2>();
      FenceRegisters(dv);
      if (elected) Arrive(&barriers.grad_empty[stage]);
      WgmmaWait<1>();
      FenceRegisters(dq);
      const uint32_t sums = shared.sums + consumer * Shape::kSumBytes;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(
                         sums + SumIndex(i, thread) * 4),
                     "f"(dq[4 * i]), "f"(dq[4 * i + 1]), "f"(dq[4 * i + 2]),
                     "f"(dq[4 * i + 3])
                     : "memory");
      }
      FenceSharedForAsync();
      SyncNamed(2 + consumer, 128);
      if (thread == 0) {
        const int64_t place =
            int64_t{head} * args.max_query_tiles + work.first_place + tile;
        AddBytes(args.dq_sum + (place * Shape::kConsumers + consumer) *
                                   Shape::kSumElements,
                 sums, Shape::kSumBytes);
      }
      WgmmaWait<0>();
      FenceRegisters(dk);
      if (elected) Arrive(&barriers.query_empty[stage]);
      ring.Advance();
    }
  }
  if (thread == 0) WaitForAdds();
  StoreKeyGradients<T>(args, work, own_key, 0, dk, dv);
}

#endif  // XLA_OPS_HAS_WGMMA

// Grid: tiles of keys of a KV head, KV heads.
template <typename T, int kHeadDim, bool kTransform>
__global__ void __launch_bounds__(BackwardSm90Shape<kHeadDim>::kThreads, 1)
    BackwardSm90Kernel(const __grid_constant__ BackwardSm90Maps maps,
                       const __grid_constant__ AttentionBackwardArgs args) {
#if XLA_OPS_HAS_WGMMA
  using Shape = BackwardSm90Shape<kHeadDim>;
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ BackwardSm90Barriers<Shape::kStages> barriers;
  const BackwardSm90Shared<Shape> shared(SharedAddress(dynamic_shared));
  const BackwardSm90Work work = FindWork<Shape>(args);
  if (work.tile.rows == 0) return;
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    InitBarrier(&barriers.key_full, 2);  // of keys, and of values
    InitBarrier(&barriers.tail, 1);
    for (int i = 0; i < Shape::kStages; ++i) {
      // The tile's copies, and the rows' floats.
      InitBarrier(&barriers.query_full[i], 2);
      InitBarrier(&barriers.query_empty[i], kConsumerWarps);
      InitBarrier(&barriers.grad_full[i], 2);
      InitBarrier(&barriers.grad_empty[i], kConsumerWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    DeallocateRegisters<Shape::kProducerRegisters>();
    if (threadIdx.x < 32) {
      BackwardProduce<Shape>(maps, args, barriers, shared, work);
    }
  } else {
    AllocateRegisters<Shape::kConsumerRegisters>();
    if constexpr (Shape::kIsWide) {
      BackwardConsumeWide<T, kTransform>(args, barriers, shared, work);
    } else {
      BackwardConsume<T, kHeadDim, kTransform>(args, barriers, shared, work);
    }
  }
#endif  // XLA_OPS_HAS_WGMMA
}

// Grid: query tiles of a head, heads. A warpgroup for each consumer's part.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(128 * BackwardSm90Shape<kHeadDim>::kConsumers)
    BackwardSm90StoreKernel(
        const __grid_constant__ AttentionBackwardArgs args) {
  using Shape = BackwardSm90Shape<kHeadDim>;
  const AttentionArgs& batch = args.batch;
  const BackwardTile tile = FindBackwardTile<Shape::kRows, false>(
      args, blockIdx.x % args.max_query_tiles);
  if (tile.rows == 0) return;
  const int head = blockIdx.x / args.max_query_tiles;
  const int consumer = threadIdx.x / 128;
  const int thread = threadIdx.x % 128;
  const int lane = threadIdx.x % 32;
  const float* sums =
      args.dq_sum + (int64_t{blockIdx.x} * Shape::kConsumers + consumer) *
                        Shape::kSumElements;
  constexpr int kParts = Shape::kSumColumns / 8;
  float4 part[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    part[i] = *reinterpret_cast<const float4*>(sums + SumIndex(i, thread));
  }
  const int first_row =
      (kHeadDim == 64 ? consumer * 64 : 0) + thread / 32 * 16 + lane / 4;
  const int first_column =
      (kHeadDim == 64 ? 0 : consumer * Shape::kSumColumns) + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half;
    if (row >= tile.rows) continue;
    T* target =
        static_cast<T*>(args.dq) +
        (int64_t{tile.range.query_start + tile.first + row} * batch.num_heads +
         head) *
            batch.head_dim;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int column = first_column + 8 * i;
      if (column >= batch.head_dim) break;
      const float x = half == 0 ? part[i].x : part[i].z;
      const float y = half == 0 ? part[i].y : part[i].w;
      *reinterpret_cast<uint32_t*>(target + column) =
          PackPair<T>(x * args.scale, y * args.scale);
    }
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_CUH_
