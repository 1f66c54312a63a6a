// Attention's gradient without tensor cores: fp32, GPUs older than compute
// capability 8.0, 8-bit keys and values, operands that are not aligned to 16
// bytes. A warp has one row of dq, or one row of dk and dv, and goes over the
// rows of the other side one by one: right before fast.
//
// Tested by tests/gpu/check_attention_backward.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SIMT_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SIMT_CUH_

#include <cstdint>

#include "xla_ops/cc/ops/attention/attention_simt.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"

namespace xla_ops {

constexpr int kBackwardSimtThreads = 128;
constexpr int kBackwardSimtRows = 64;  // of a tile; four warps share it

// A lane has the piece of eight columns of its number: head_dim is 256 or
// less.
__device__ __forceinline__ float Dot(const float (&a)[kPiece],
                                     const float (&b)[kPiece]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) sum += a[i] * b[i];
  return WarpSum(sum);
}

__device__ __forceinline__ void AddScaled(float factor,
                                          const float (&piece)[kPiece],
                                          float (&sums)[kPiece]) {
#pragma unroll
  for (int i = 0; i < kPiece; ++i) sums[i] += factor * piece[i];
}

// Grid: x tiles of keys of a KV head, KV heads; y parts of a tile.
template <typename T>
__global__ void __launch_bounds__(kBackwardSimtThreads)
    BackwardSimtKeysKernel(const __grid_constant__ AttentionBackwardArgs args) {
  const AttentionArgs& batch = args.batch;
  const BackwardTile tile = FindBackwardTile<kBackwardSimtRows, true>(
      args, blockIdx.x % args.max_key_tiles);
  const int row = blockIdx.y * 4 + threadIdx.x / 32;
  if (row >= tile.rows) return;
  const int kv_head = blockIdx.x / args.max_key_tiles;
  const int column = threadIdx.x % 32 * kPiece;
  const bool in_row = column < batch.head_dim;
  const int key = tile.first + row;
  const int64_t key_row = tile.range.key_start + key;
  const int64_t offset =
      key_row * batch.page_stride + kv_head * batch.head_stride + column;
  float k[kPiece] = {};
  float v[kPiece] = {};
  if (in_row) {
    LoadPiece(static_cast<const T*>(batch.key) + offset, batch.aligned, k);
    LoadPiece(static_cast<const T*>(batch.value) + offset, batch.aligned, v);
  }
  float dk[kPiece] = {};
  float dv[kPiece] = {};
  const TokenRange seen_by = RowsThatSee(batch, tile, key, key);
  const int group = batch.group.value();
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const float alibi_slope = AlibiSlope(batch, tile.seq, head);
    const int64_t place = (int64_t{head} * args.max_query_tiles +
                           args.query_tiles[tile.segment]) *
                          kBackwardSimtRows;
    for (int i = seen_by.begin; i < seen_by.end; ++i) {
      const int64_t index =
          (int64_t{tile.range.query_start + i} * batch.num_heads + head) *
              batch.head_dim +
          column;
      float q[kPiece] = {};
      float grad[kPiece] = {};
      if (in_row) {
        LoadPiece(static_cast<const T*>(batch.query) + index, batch.aligned, q);
        LoadPiece(static_cast<const T*>(args.grad_out) + index, batch.aligned,
                  grad);
      }
      const Weight weight =
          WeightOf<true>(batch, Dot(q, k), batch.scale, args.row_lse[place + i],
                         alibi_slope, fabsf(float(i + tile.Shift() - key)));
      const float dx = weight.value * weight.slope *
                       (Dot(grad, v) - args.row_delta[place + i]);
      AddScaled(weight.value, grad, dv);
      AddScaled(dx * args.scale, q, dk);
    }
  }
  if (!in_row) return;
  const int64_t start =
      (key_row * batch.num_kv_heads + kv_head) * batch.head_dim + column;
#pragma unroll
  for (int i = 0; i < kPiece; i += 2) {
    StoreKeyPair<T>(args, args.dk, start + i, dk[i], dk[i + 1]);
    StoreKeyPair<T>(args, args.dv, start + i, dv[i], dv[i + 1]);
  }
}

// KV is the type of keys and values: T, or uint8_t for 8-bit floats. Grid: x
// query tiles of a head, heads; y parts of a tile.
template <typename T, typename KV>
__global__ void __launch_bounds__(kBackwardSimtThreads)
    BackwardSimtQueriesKernel(
        const __grid_constant__ AttentionBackwardArgs args) {
  const AttentionArgs& batch = args.batch;
  const BackwardTile tile = FindBackwardTile<kBackwardSimtRows, false>(
      args, blockIdx.x % args.max_query_tiles);
  const int row = blockIdx.y * 4 + threadIdx.x / 32;
  if (row >= tile.rows) return;
  const int head = blockIdx.x / args.max_query_tiles;
  const int kv_head = batch.group.Divide(head);
  const int column = threadIdx.x % 32 * kPiece;
  const bool in_row = column < batch.head_dim;
  const int64_t index =
      (int64_t{tile.range.query_start + tile.first + row} * batch.num_heads +
       head) *
          batch.head_dim +
      column;
  float q[kPiece] = {};
  float grad[kPiece] = {};
  if (in_row) {
    LoadPiece(static_cast<const T*>(batch.query) + index, batch.aligned, q);
    LoadPiece(static_cast<const T*>(args.grad_out) + index, batch.aligned,
              grad);
  }
  float dq[kPiece] = {};
  const int64_t place = int64_t{blockIdx.x} * kBackwardSimtRows + row;
  const float lse = args.row_lse[place];
  const float delta = args.row_delta[place];
  const int position = tile.first + row + tile.Shift();
  const TokenRange visible =
      tile.seq < 0
          ? TokenRange{0, 0}
          : VisibleTokens(batch, tile.range.key_rows, position, position);
  QueryTile token_place = {};
  token_place.kv_start = tile.range.key_start;
  const int32_t* table =
      batch.block_table + max(tile.seq, 0) * batch.max_blocks;
  const float alibi_slope = AlibiSlope(batch, tile.seq, head);
  const float key_scale = KvScale<0>(batch, tile.seq, kv_head);
  const float value_scale = KvScale<1>(batch, tile.seq, kv_head);
  for (int key = visible.begin; key < visible.end; ++key) {
    const int64_t offset = TokenOffset(
        batch, FindToken(batch, token_place, table, visible, key), kv_head);
    if (offset < 0) continue;
    float k[kPiece] = {};
    float v[kPiece] = {};
    if (in_row) {
      LoadKvPiece(batch, static_cast<const KV*>(batch.key) + offset + column,
                  k);
      LoadKvPiece(batch, static_cast<const KV*>(batch.value) + offset + column,
                  v);
    }
    const Weight weight =
        WeightOf<true>(batch, Dot(q, k), batch.scale * key_scale, lse,
                       alibi_slope, fabsf(float(position - key)));
    const float dx =
        weight.value * weight.slope * (value_scale * Dot(grad, v) - delta);
    AddScaled(dx * args.scale * key_scale, k, dq);
  }
  if (!in_row) return;
  T* target = static_cast<T*>(args.dq) + index;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) target[i] = FromFloat<T>(dq[i]);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_SIMT_CUH_
