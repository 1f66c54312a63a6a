// The small kernels of attention's gradient that serve every way to the
// products: the table of segments before them, sinks after them.
//
// Tested by tests/gpu/check_attention_backward.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_TABLE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_TABLE_CUH_

#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/ops/attention_backward/attention_backward.cuh"

namespace xla_ops {

constexpr int kTableThreads = 1024;

__device__ __forceinline__ int NumTiles(int a, int b) {
  return a == 0 ? 0 : (a - 1) / b + 1;
}

// Inclusive scan over the block, on top of `carry`, which becomes the last
// thread's. `combine` is associative, with `none` its neutral element.
template <typename F>
__device__ __forceinline__ int BlockScan(int x, int none, F&& combine,
                                         int& carry, int* warps) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x = combine(x, other);
  }
  __syncthreads();  // the last scan's readers are done
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  int before = carry;
  for (int w = 0; w < kTableThreads / 32; ++w) {
    if (w < warp) before = combine(before, warps[w]);
    carry = combine(carry, warps[w]);
  }
  return combine(x, before);
}

// One block.
__global__ void __launch_bounds__(kTableThreads)
    BackwardTableKernel(const __grid_constant__ AttentionBackwardArgs args) {
  __shared__ int warps[kTableThreads / 32];
  __shared__ int ends[2][kTableThreads];
  const AttentionArgs& batch = args.batch;
  const int num_seqs = NumSeqs(batch);
  const auto larger = [](int a, int b) { return max(a, b); };
  const auto sum = [](int a, int b) { return a + b; };
  int query_carry = 0;
  int key_carry = 0;
  int query_tiles = 0;
  int key_tiles = 0;
  for (int base = 0; base < num_seqs + 2; base += kTableThreads) {
    const int segment = base + threadIdx.x;
    int query_end = batch.num_tokens;
    int key_end = batch.max_kv_len;
    if (segment <= num_seqs) {
      query_end = min(max(batch.cu_seqlens_q[segment], 0), batch.num_tokens);
      if (!batch.paged) {
        key_end = min(max(batch.cu_seqlens_k[segment], 0), batch.max_kv_len);
      }
    }
    int query_start = query_carry;
    int key_start = key_carry;
    query_end = BlockScan(query_end, 0, larger, query_carry, warps);
    key_end = BlockScan(key_end, 0, larger, key_carry, warps);
    ends[0][threadIdx.x] = query_end;
    ends[1][threadIdx.x] = key_end;
    __syncthreads();
    if (threadIdx.x > 0) {
      query_start = ends[0][threadIdx.x - 1];
      key_start = ends[1][threadIdx.x - 1];
    }
    BackwardSegment range = {query_start, query_end - query_start, key_start,
                             key_end - key_start};
    const bool exists = segment < num_seqs + 2;
    const bool is_sequence = segment >= 1 && segment <= num_seqs;
    if (is_sequence) {
      QueryTile tile;
      tile.seq = segment - 1;
      const int used =
          batch.seqused_k == nullptr ? 0 : batch.seqused_k[tile.seq];
      SetKeys(batch, used, key_start, key_end, tile);
      range.key_start = tile.kv_start;
      range.key_rows = tile.kv_len;
    } else if (batch.paged || args.shared_keys || !exists) {
      range.key_rows = 0;
    }
    const int own_query_tiles =
        exists ? NumTiles(range.query_rows, args.query_tile_rows) : 0;
    const int own_key_tiles = exists && !batch.paged
                                  ? NumTiles(range.key_rows, args.key_tile_rows)
                                  : 0;
    const int query_tiles_end =
        BlockScan(own_query_tiles, 0, sum, query_tiles, warps);
    const int key_tiles_end =
        BlockScan(own_key_tiles, 0, sum, key_tiles, warps);
    if (exists) {
      args.segments[segment] = range;
      args.query_tiles[segment] = query_tiles_end - own_query_tiles;
      args.key_tiles[segment] = key_tiles_end - own_key_tiles;
    }
  }
  if (threadIdx.x == 0) {
    args.query_tiles[num_seqs + 2] = query_tiles;
    args.key_tiles[num_seqs + 2] = key_tiles;
  }
}

constexpr int kSinkThreads = 256;

// A block a head; sums in one order, whatever the run.
__global__ void __launch_bounds__(kSinkThreads)
    BackwardSinksKernel(const __grid_constant__ AttentionBackwardArgs args) {
  __shared__ WarpResults results;
  const int head = blockIdx.x;
  const float sink = args.batch.sinks[head] * kLog2E;
  const int64_t start =
      int64_t{head} * args.max_query_tiles * args.query_tile_rows;
  const int rows =
      args.query_tiles[NumSeqs(args.batch) + 2] * args.query_tile_rows;
  float sum = 0.0f;
  for (int row = threadIdx.x; row < rows; row += kSinkThreads) {
    const float lse = args.row_lse[start + row];
    if (lse != CUDART_INF_F) {
      sum += Exp2(sink - lse) * args.row_delta[start + row];
    }
  }
  sum = BlockSum<kSinkThreads / 32, true>(sum, results);
  if (threadIdx.x == 0) args.dsinks[head] = -sum;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_TABLE_CUH_
