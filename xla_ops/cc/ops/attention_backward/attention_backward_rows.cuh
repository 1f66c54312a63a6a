// lse and delta of attention's rows, before the products of their gradient.
//
// Tested by tests/gpu/check_attention_backward.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_ROWS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_ROWS_CUH_

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"

namespace xla_ops {

constexpr int kDeltaThreads = 128;

// Grid: query tiles of a head, heads. Eight lanes share a row. `kClear`:
// elements of the tile's dq_sum, which it sets to zero; 0: none.
template <typename T, int kQueryRows, int kClear>
__global__ void __launch_bounds__(kDeltaThreads)
    BackwardDeltaKernel(const __grid_constant__ AttentionBackwardArgs args) {
  constexpr int kLanes = 8;
  const AttentionArgs& batch = args.batch;
  const int head = blockIdx.x / args.max_query_tiles;
  const BackwardTile tile = FindBackwardTile<kQueryRows, false>(
      args, blockIdx.x % args.max_query_tiles);
  if (tile.rows == 0) return;
  const int64_t place = blockIdx.x;
  if constexpr (kClear > 0) {
    float4* sums = reinterpret_cast<float4*>(args.dq_sum + place * kClear);
    for (int i = threadIdx.x; i < kClear / 4; i += kDeltaThreads) {
      sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  const int lane = threadIdx.x % kLanes;
  const T* grad = static_cast<const T*>(args.grad_out);
  const T* out = static_cast<const T*>(args.out);
  for (int row = threadIdx.x / kLanes; row < kQueryRows;
       row += kDeltaThreads / kLanes) {
    float lse = CUDART_INF_F;
    float delta = 0.0f;
    const int token = tile.range.query_start + tile.first + row;
    if (row < tile.rows) {
      const int64_t start =
          (int64_t{token} * batch.num_heads + head) * batch.head_dim;
      for (int column = lane * kPiece; column < batch.head_dim;
           column += kLanes * kPiece) {
        float a[kPiece];
        float b[kPiece];
        LoadPiece(grad + start + column, batch.aligned, a);
        LoadPiece(out + start + column, batch.aligned, b);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) delta += a[i] * b[i];
      }
      lse = args.lse[int64_t{head} * batch.num_tokens + token];
    }
    delta = WarpSum(delta, kLanes);
    if (lane != 0) continue;
    if (row < tile.rows && args.grad_lse != nullptr) {
      delta -= args.grad_lse[int64_t{head} * batch.num_tokens + token];
    }
    // A row that saw nothing takes part in nothing, whatever its gradient.
    if (lse == CUDART_INF_F || tile.seq < 0) {
      lse = CUDART_INF_F;
      delta = 0.0f;
    }
    args.row_lse[place * kQueryRows + row] = lse * kLog2E;
    args.row_delta[place * kQueryRows + row] = delta;
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_ROWS_CUH_
