// The Hopper kernel of attention's gradient at head_dim 256; see
// attention_backward_sm90.cuh.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_WIDE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_WIDE_CUH_

#include <cstdint>

#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_shape.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_load.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_products.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward_sm90_shape.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

// Adds four floats to memory, which others may add to as well.
__device__ __forceinline__ void AddFour(float* target, const float* values) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(
                   __cvta_generic_to_global(target)),
               "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// Starts sums += A B for a tile B of query rows, 128 columns of it, and A
// [key, row] in shared memory.
template <typename T, typename Shape>
__device__ __forceinline__ void StartSharedRowProduct(uint32_t a, uint32_t b,
                                                      float (&sums)[64]) {
  const uint64_t a_layout = DescriptorLayout(kAtomBytes, 16);
  const uint64_t b_layout = DescriptorLayout(kAtomBytes, Shape::kRowPanelBytes);
  FenceRegisters(sums);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < Shape::kRows / 16; ++k) {
    WgmmaSS<T, false, true>(sums, DescriptorAt(a_layout, a + k * 32),
                            DescriptorAt(b_layout, b + k * 2 * kAtomBytes),
                            true);
  }
  WgmmaCommit();
}

// A consumer of head_dim 256. dk and dv of 64 keys fill the registers of both,
// half of the columns each; so both need all weights and ds, of which each
// computes those of half of the query rows. They go through shared memory:
//   S^T = K Q^T,  dP^T = V dO^T    64 keys by its 32 rows
//   dV += P^T dO,  dK += dS^T Q    64 keys by its 128 columns
//   dQ += dS K                     64 rows by its 128 columns
template <typename T, bool kTransform>
__device__ __forceinline__ void BackwardConsumeWide(
    const AttentionBackwardArgs& args,
    BackwardSm90Barriers<BackwardSm90Shape<256>::kStages>& barriers,
    const BackwardSm90Shared<BackwardSm90Shape<256>>& shared,
    const BackwardSm90Work& work) {
  using Shape = BackwardSm90Shape<256>;
  constexpr int kOwnRows = Shape::kRows / 2;
  const AttentionArgs& batch = args.batch;
  const int consumer = threadIdx.x / 128 - 1;
  const int thread = threadIdx.x % 128;
  const int lane = threadIdx.x % 32;
  const bool elected = lane == 0;
  const int own_key = thread / 32 * 16 + lane / 4;
  const int own_row = consumer * kOwnRows;
  const int first_panel = consumer * 2;
  const uint32_t own_floats = (own_row + lane % 4 * 2) * 4;
  const int shift = work.tile.Shift();
  const int group = batch.group.value();

  float dk[64];
  float dv[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) dk[i] = dv[i] = 0.0f;

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
      float scores[kOwnRows / 2];
      float products[kOwnRows / 2];
      Wait(&barriers.query_full[stage], ring.parity);
      StartKeyProduct<T, Shape>(shared.keys, query + own_row * kPanelRowBytes,
                                scores);
      Wait(&barriers.grad_full[stage], ring.parity);
      StartKeyProduct<T, Shape>(shared.values, grad + own_row * kPanelRowBytes,
                                products);
      WgmmaWait<1>();
      FenceRegisters(scores);
      const int first_position = tile * Shape::kRows + shift;
      uint32_t rounded[kOwnRows / 16][4];
      FindWeights<T, kOwnRows, kTransform>(
          batch, work.tile.first + own_key, work.tile.range.key_rows,
          first_position + own_row + lane % 4 * 2,
          IsMasked(batch, work.tile.range.key_rows, first_position,
                   first_position + Shape::kRows - 1, work.tile.first,
                   work.tile.first + Shape::kKeys - 1),
          shared.lses + stage * Shape::kRowFloatBytes + own_floats, alibi_slope,
          scores, rounded);
      const uint32_t weights = shared.weights + turn * 2 * Shape::kWeightBytes;
      const uint32_t ds = weights + Shape::kWeightBytes;
      turn ^= 1;
      StoreKeysByRows<Shape::kKeyPanelBytes>(weights, own_key, own_row,
                                             rounded);
      WgmmaWait<0>();
      FenceRegisters(products);
      FindChanges<T, kOwnRows>(
          shared.deltas + stage * Shape::kRowFloatBytes + own_floats, products,
          scores, rounded);
      StoreKeysByRows<Shape::kKeyPanelBytes>(ds, own_key, own_row, rounded);
      FenceSharedForAsync();
      SyncNamed(1, 256);

      float dq[64];
      StartSharedRowProduct<T, Shape>(
          weights, grad + first_panel * Shape::kRowPanelBytes, dv);
      StartQueryProduct<T, Shape>(
          ds, shared.keys + first_panel * Shape::kKeyPanelBytes, dq);
      StartSharedRowProduct<T, Shape>(
          ds, query + first_panel * Shape::kRowPanelBytes, dk);
      WgmmaWait<2>();
      FenceRegisters(dv);
      if (elected) Arrive(&barriers.grad_empty[stage]);
      WgmmaWait<1>();
      FenceRegisters(dq);
      const int64_t place =
          int64_t{head} * args.max_query_tiles + work.first_place + tile;
      float* sums = args.dq_sum + (place * Shape::kConsumers + consumer) *
                                      Shape::kSumElements;
#pragma unroll
      for (int i = 0; i < Shape::kSumColumns / 8; ++i) {
        AddFour(sums + SumIndex(i, thread), dq + 4 * i);
      }
      WgmmaWait<0>();
      FenceRegisters(dk);
      if (elected) Arrive(&barriers.query_empty[stage]);
      ring.Advance();
    }
  }
  StoreKeyGradients<T>(args, work, own_key, first_panel * kPanelColumns, dk,
                       dv);
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SM90_WIDE_CUH_
