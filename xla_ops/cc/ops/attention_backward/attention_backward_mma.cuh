// Attention's gradient on tensor cores (mma.sync), for fp16 and bf16 from
// compute capability 8.0 on. Two kernels, neither of which adds to what
// another block has written, so that every run gives the same bits:
//   dk, dv  a block has a tile of keys, and goes over the heads that read it
//           and their query rows
//   dq      a block has a tile of query rows, and goes over their keys
// Both compute the weights anew from lse, which is seven products where a
// kernel that shares them needs five: the price of the same bits.
//
// The products are those of the forward (attention_mma_tile.cuh), with keys
// for queries where results are rows of keys. Alignment: as there.
//
// Tested by tests/gpu/check_attention_backward.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_MMA_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_MMA_CUH_

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/softmax_fragment.cuh"
#include "xla_ops/cc/ops/attention/attention_mma_tile.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"

namespace xla_ops {

// kHeadDim is the padded head_dim. Four warps have 16 rows of the block's own
// tile each; at head_dim 256 eight do, each half of its columns, since their
// sums fill a thread's registers.
template <int kHeadDim>
struct BackwardMmaShape {
  static constexpr int kOwnRows = 64;
  static constexpr int kOtherRows = kHeadDim == 256 ? 32 : 64;
  static constexpr int kColumnParts = kHeadDim == 256 ? 2 : 1;
  static constexpr int kColumns = kHeadDim / kColumnParts;
  static constexpr int kThreads = 128 * kColumnParts;
  static constexpr int kOwnBytes = kOwnRows * kHeadDim * 2;
  static constexpr int kOtherBytes = kOtherRows * kHeadDim * 2;
  // Two tensors of each. A block has 99 KB on the smaller GPUs.
  static constexpr int kSharedBytes = 2 * (kOwnBytes + kOtherBytes);
  static_assert(kSharedBytes <= 97 * 1024);
  static constexpr int kMinBlocks = kHeadDim == 64 ? 2 : 1;
};

#if XLA_OPS_HAS_MMA

// Copies rows to shared memory; `offset(row)` is a row's first element, -1 for
// zeros.
template <typename T, int kHeadDim, int kRows, typename F>
__device__ __forceinline__ void CopyRows(const T* source, int head_dim,
                                         uint32_t tile, F&& offset) {
  constexpr int kChunks = kHeadDim / kChunk;
  for (int i = threadIdx.x; i < kRows * kChunks; i += blockDim.x) {
    const int row = i / kChunks;
    const int column = i % kChunks * kChunk;
    const int64_t start = offset(row);
    const bool valid = start >= 0 && column < head_dim;
    CopyAsync(TileAddress<kHeadDim>(tile, row, i % kChunks),
              valid ? source + start + column : source, valid);
  }
}

// sums += weights B for 16 rows, all kRows rows of B and its columns from
// `column` on.
template <typename T, int kHeadDim, int kRows, int kColumns>
__device__ __forceinline__ void MultiplyRows(
    const float (&weights)[kRows / 8][4], uint32_t tile, int column,
    float (&sums)[kColumns / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    uint32_t a[4];
    PackWeights<T>(Flat(weights), k, a);
    const int row = 16 * k + lane % 16;
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      LoadMatricesTransposed(
          TileAddress<kHeadDim>(tile, row, column / kChunk + 2 * n + lane / 16),
          b);
      Mma<T>(a, b[0], b[1], sums[2 * n]);
      Mma<T>(a, b[2], b[3], sums[2 * n + 1]);
    }
  }
}

template <int kSize>
__device__ __forceinline__ void Clear(float (&fragments)[kSize][4]) {
#pragma unroll
  for (auto& fragment : fragments) {
#pragma unroll
    for (float& value : fragment) value = 0.0f;
  }
}

// Grid: tiles of keys of a KV head, KV heads.
template <typename T, int kHeadDim, bool kTransform>
__global__ void __launch_bounds__(BackwardMmaShape<kHeadDim>::kThreads,
                                  BackwardMmaShape<kHeadDim>::kMinBlocks)
    BackwardMmaKeysKernel(const __grid_constant__ AttentionBackwardArgs args) {
  using Shape = BackwardMmaShape<kHeadDim>;
  constexpr int kRows = Shape::kOtherRows;
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ float lses[kRows];
  __shared__ float deltas[kRows];
  const AttentionArgs& batch = args.batch;
  const BackwardTile tile = FindBackwardTile<Shape::kOwnRows, true>(
      args, blockIdx.x % args.max_key_tiles);
  if (tile.rows == 0) return;
  const int kv_head = blockIdx.x / args.max_key_tiles;
  const uint32_t keys = SharedAddress(dynamic_shared);
  const uint32_t values = keys + Shape::kOwnBytes;
  const uint32_t queries = values + Shape::kOwnBytes;
  const uint32_t grads = queries + Shape::kOtherBytes;
  const auto key_offset = [&](int row) {
    return row < tile.rows
               ? (tile.range.key_start + tile.first + row) * batch.page_stride +
                     kv_head * batch.head_stride
               : -1;
  };
  CopyRows<T, kHeadDim, Shape::kOwnRows>(static_cast<const T*>(batch.key),
                                         batch.head_dim, keys, key_offset);
  CopyRows<T, kHeadDim, Shape::kOwnRows>(static_cast<const T*>(batch.value),
                                         batch.head_dim, values, key_offset);
  CommitCopies();

  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 % 4 * 16;
  const int column = threadIdx.x / 128 * Shape::kColumns;
  const TokenRange seen_by =
      RowsThatSee(batch, tile, tile.first, tile.first + tile.rows - 1);
  float dk[Shape::kColumns / 8][4];
  float dv[Shape::kColumns / 8][4];
  Clear(dk);
  Clear(dv);
  const QueryOperand<kHeadDim> key_rows(keys, warp_row);
  const QueryOperand<kHeadDim> value_rows(values, warp_row);
  const int group = batch.group.value();
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const float alibi_slope = AlibiSlope(batch, tile.seq, head);
    for (int first = seen_by.begin / kRows * kRows; first < seen_by.end;
         first += kRows) {
      const auto offset = [&](int row) {
        return first + row < tile.range.query_rows
                   ? (int64_t{tile.range.query_start + first + row} *
                          batch.num_heads +
                      head) *
                         batch.head_dim
                   : -1;
      };
      __syncthreads();
      CopyRows<T, kHeadDim, kRows>(static_cast<const T*>(batch.query),
                                   batch.head_dim, queries, offset);
      CopyRows<T, kHeadDim, kRows>(static_cast<const T*>(args.grad_out),
                                   batch.head_dim, grads, offset);
      CommitCopies();
      if (threadIdx.x < kRows) {
        const int64_t place =
            (int64_t{head} * args.max_query_tiles +
             args.query_tiles[tile.segment] + first / Shape::kOwnRows) *
                Shape::kOwnRows +
            first % Shape::kOwnRows + threadIdx.x;
        lses[threadIdx.x] = args.row_lse[place];
        deltas[threadIdx.x] = args.row_delta[place];
      }
      WaitForCopies();
      __syncthreads();
      float weights[kRows / 8][4];
      float grad[kRows / 8][4];
      Clear(weights);
      Clear(grad);
      MultiplyKeys<T, kHeadDim, kRows>(key_rows, queries, 0, weights);
      MultiplyKeys<T, kHeadDim, kRows>(value_rows, grads, 0, grad);
      const int first_position = first + tile.Shift();
      const bool masked = IsMasked(batch, tile.range.key_rows, first_position,
                                   first_position + kRows - 1, tile.first,
                                   tile.first + Shape::kOwnRows - 1);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 8 * n + lane % 4 * 2 + i % 2;
          const int key = tile.first + warp_row + lane / 4 + i / 2 * 8;
          const int position = first_position + row;
          Weight weight =
              WeightOf<kTransform>(batch, weights[n][i], batch.scale, lses[row],
                                   alibi_slope, fabsf(float(position - key)));
          if (masked &&
              (key >= tile.range.key_rows || !Sees(batch, position, key))) {
            weight.value = 0.0f;
          }
          weights[n][i] = weight.value;
          grad[n][i] = weight.value * weight.slope * (grad[n][i] - deltas[row]);
        }
      }
      MultiplyRows<T, kHeadDim, kRows, Shape::kColumns>(weights, grads, column,
                                                        dv);
      MultiplyRows<T, kHeadDim, kRows, Shape::kColumns>(grad, queries, column,
                                                        dk);
    }
  }
  WaitForCopies();  // of a tile that no row sees
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + lane / 4 + 8 * i;
    if (row >= tile.rows) continue;
    const int64_t start =
        (int64_t{tile.range.key_start + tile.first + row} * batch.num_kv_heads +
         kv_head) *
        batch.head_dim;
#pragma unroll
    for (int n = 0; n < Shape::kColumns / 8; ++n) {
      const int c = column + 8 * n + lane % 4 * 2;
      if (c >= batch.head_dim) break;
      StoreKeyPair<T>(args, args.dv, start + c, dv[n][2 * i], dv[n][2 * i + 1]);
      StoreKeyPair<T>(args, args.dk, start + c, dk[n][2 * i] * args.scale,
                      dk[n][2 * i + 1] * args.scale);
    }
  }
}

// Grid: query tiles of a head, heads. The last tiles, which see most under a
// causal mask, come first.
template <typename T, int kHeadDim, bool kTransform>
__global__ void __launch_bounds__(BackwardMmaShape<kHeadDim>::kThreads,
                                  BackwardMmaShape<kHeadDim>::kMinBlocks)
    BackwardMmaQueriesKernel(
        const __grid_constant__ AttentionBackwardArgs args) {
  using Shape = BackwardMmaShape<kHeadDim>;
  constexpr int kKeys = Shape::kOtherRows;
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ bool valid[kKeys];
  const AttentionArgs& batch = args.batch;
  const int index =
      args.max_query_tiles - 1 - blockIdx.x % args.max_query_tiles;
  const BackwardTile tile =
      FindBackwardTile<Shape::kOwnRows, false>(args, index);
  if (tile.rows == 0) return;
  const int head = blockIdx.x / args.max_query_tiles;
  const int kv_head = batch.group.Divide(head);
  const uint32_t queries = SharedAddress(dynamic_shared);
  const uint32_t grads = queries + Shape::kOwnBytes;
  const uint32_t keys = grads + Shape::kOwnBytes;
  const uint32_t values = keys + Shape::kOtherBytes;
  const auto offset = [&](int row) {
    return row < tile.rows
               ? (int64_t{tile.range.query_start + tile.first + row} *
                      batch.num_heads +
                  head) *
                     batch.head_dim
               : -1;
  };
  CopyRows<T, kHeadDim, Shape::kOwnRows>(static_cast<const T*>(batch.query),
                                         batch.head_dim, queries, offset);
  CopyRows<T, kHeadDim, Shape::kOwnRows>(static_cast<const T*>(args.grad_out),
                                         batch.head_dim, grads, offset);
  CommitCopies();

  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 % 4 * 16;
  const int column = threadIdx.x / 128 * Shape::kColumns;
  const int first_position = tile.first + tile.Shift();
  TokenRange visible = {0, 0};
  if (tile.seq >= 0) {
    visible = VisibleTokens(batch, tile.range.key_rows, first_position,
                            first_position + tile.rows - 1);
  }
  QueryTile place = {};
  place.kv_start = tile.range.key_start;
  const int32_t* table =
      batch.block_table + max(tile.seq, 0) * batch.max_blocks;
  const float alibi_slope = AlibiSlope(batch, tile.seq, head);
  float lse[2];
  float delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row =
        (int64_t{head} * args.max_query_tiles + index) * Shape::kOwnRows +
        warp_row + lane / 4 + 8 * i;
    lse[i] = args.row_lse[row];
    delta[i] = args.row_delta[row];
  }
  float dq[Shape::kColumns / 8][4];
  Clear(dq);
  const QueryOperand<kHeadDim> query_rows(queries, warp_row);
  const QueryOperand<kHeadDim> grad_rows(grads, warp_row);
  for (int first = visible.begin / kKeys * kKeys; first < visible.end;
       first += kKeys) {
    const auto key_offset = [&](int row) {
      return TokenOffset(
          batch, FindToken(batch, place, table, visible, first + row), kv_head);
    };
    __syncthreads();
    CopyRows<T, kHeadDim, kKeys>(static_cast<const T*>(batch.key),
                                 batch.head_dim, keys, key_offset);
    CopyRows<T, kHeadDim, kKeys>(static_cast<const T*>(batch.value),
                                 batch.head_dim, values, key_offset);
    CommitCopies();
    if (threadIdx.x < kKeys) valid[threadIdx.x] = key_offset(threadIdx.x) >= 0;
    WaitForCopies();
    __syncthreads();
    float weights[kKeys / 8][4];
    float grad[kKeys / 8][4];
    Clear(weights);
    Clear(grad);
    MultiplyKeys<T, kHeadDim, kKeys>(query_rows, keys, 0, weights);
    MultiplyKeys<T, kHeadDim, kKeys>(grad_rows, values, 0, grad);
    const bool masked = batch.paged || first < visible.begin ||
                        IsMasked(batch, visible.end, first_position,
                                 first_position + Shape::kOwnRows - 1, first,
                                 first + kKeys - 1);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + lane / 4 + i / 2 * 8;
        const int key = first + 8 * n + lane % 4 * 2 + i % 2;
        const int position = first_position + row;
        const Weight weight =
            WeightOf<kTransform>(batch, weights[n][i], batch.scale, lse[i / 2],
                                 alibi_slope, fabsf(float(position - key)));
        const bool seen =
            !masked || (valid[key - first] && Sees(batch, position, key));
        grad[n][i] =
            seen ? weight.value * weight.slope * (grad[n][i] - delta[i / 2])
                 : 0.0f;
      }
    }
    MultiplyRows<T, kHeadDim, kKeys, Shape::kColumns>(grad, keys, column, dq);
  }
  WaitForCopies();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + lane / 4 + 8 * i;
    if (row >= tile.rows) continue;
    uint32_t* pairs =
        reinterpret_cast<uint32_t*>(static_cast<T*>(args.dq) + offset(row));
#pragma unroll
    for (int n = 0; n < Shape::kColumns / 8; ++n) {
      const int c = column + 8 * n + lane % 4 * 2;
      if (c >= batch.head_dim) break;
      pairs[c / 2] =
          PackPair<T>(dq[n][2 * i] * args.scale, dq[n][2 * i + 1] * args.scale);
    }
  }
}

#else

template <typename T, int kHeadDim, bool kTransform>
__global__ void BackwardMmaKeysKernel(
    const __grid_constant__ AttentionBackwardArgs) {}

template <typename T, int kHeadDim, bool kTransform>
__global__ void BackwardMmaQueriesKernel(
    const __grid_constant__ AttentionBackwardArgs) {}

#endif  // XLA_OPS_HAS_MMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_MMA_CUH_
