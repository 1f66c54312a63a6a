// Adds up the partial results that the splits of the KV tokens left in the
// workspace, and the debug kernel that says what the attention masks.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_COMBINE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_COMBINE_CUH_

#include <math_constants.h>

#include <cstdint>
#include <cstdio>

#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_rows.cuh"
#include "xla_ops/cc/ops/attention/attention_share.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

constexpr int kCombineMaxWarps = 4;
// Accumulators that a lane loads before it uses the first.
constexpr int kCombineBatch = 4;

// Where a row's partial results are: `count` of them, `step` rows apart.
struct PartialRows {
  const float* out;  // the first one's
  const float* max;
  const float* sum;
  int64_t step;
  int count;
};

// By a block's 1 to kCombineMaxWarps warps, each of which takes every so
// many-th split. A split whose sum is zero saw nothing, and its accumulator is
// not read.
__device__ __forceinline__ void CombineRow(
    const AttentionArgs& args, const QueryRow& row, const PartialRows& rows,
    Vector<float, 4> (&totals)[kCombineMaxWarps][32]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int num_warps = blockDim.x / 32;

  // Every warp looks at all splits; that is cheaper than a barrier.
  float max = -CUDART_INF_F;
  float sum = 0.0f;
  for (int split = lane; split < rows.count; split += 32) {
    const int64_t at = split * rows.step;
    const float split_max = rows.max[at];
    const float split_sum = rows.sum[at];
    const float new_max = fmaxf(max, split_max);
    sum = sum * Exp2(max - FiniteMax(new_max)) +
          split_sum * Exp2(split_max - FiniteMax(new_max));
    max = new_max;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float new_max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, step));
    sum *= Exp2(max - FiniteMax(new_max));
    sum += __shfl_xor_sync(kFullWarp, sum, step);
    max = new_max;
  }
  const float factor = EndRow(args, row, max, sum);

  for (int first = 0; first < args.head_dim; first += 128) {
    const int column = first + 4 * lane;
    const bool in_row = column < args.head_dim;
    float total[4] = {};
    for (int base = warp; base < rows.count;
         base += kCombineBatch * num_warps) {
      float weight[kCombineBatch];
      Vector<float, 4> part[kCombineBatch];
#pragma unroll
      for (int i = 0; i < kCombineBatch; ++i) {
        const int split = base + i * num_warps;
        const int64_t at = min(split, rows.count - 1) * rows.step;
        const bool used = in_row && split < rows.count && rows.sum[at] != 0.0f;
        weight[i] = used ? Exp2(rows.max[at] - FiniteMax(max)) : 0.0f;
        part[i] = {};
        if (used) {
          part[i] = LoadVector<4>(rows.out + at * args.head_dim + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kCombineBatch; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] += weight[i] * part[i][j];
      }
    }
    if (num_warps > 1) {
      __syncthreads();  // the totals before have been read
      StoreVector(totals[warp][lane].data,
                  Vector<float, 4>{total[0], total[1], total[2], total[3]});
      __syncthreads();
      if (warp != 0) continue;
      for (int w = 1; w < num_warps; ++w) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] += totals[w][lane][j];
      }
    }
    if (!in_row) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) total[j] *= factor;
    StoreOut(args, row.Index(args) * args.head_dim + column, total);
  }
}

// A block a row of [num_tokens, num_heads], of 1 to kCombineMaxWarps warps.
__global__ void __launch_bounds__(32 * kCombineMaxWarps)
    AttentionCombineKernel(const __grid_constant__ AttentionArgs args) {
  __shared__ Vector<float, 4> totals[kCombineMaxWarps][32];
  WaitForPreviousKernel();
  const int64_t row = blockIdx.x;
  const int token = static_cast<int>(blockIdx.x) / args.num_heads;
  CombineRow(args,
             {token, static_cast<int>(blockIdx.x) - token * args.num_heads},
             {args.partial_out + row * args.head_dim, args.partial_max + row,
              args.partial_sum + row, int64_t{args.num_tokens} * args.num_heads,
              args.num_splits},
             totals);
}

// Combines what the kernel for decode left in slots, a block a slot and KV
// head: of a tile in several slots each takes every so many-th row. Most blocks
// find that their slot is not used, before the previous kernel has ended.
__global__ void __launch_bounds__(32 * kShareWarps)
    AttentionCombineSlotsKernel(const __grid_constant__ AttentionArgs args) {
  __shared__ ShareSearch search;
  __shared__ QueryTile tile;
  __shared__ Vector<float, 4> totals[kCombineMaxWarps][32];
  static_assert(kShareWarps <= kCombineMaxWarps);
  const int kv_head = blockIdx.x;
  const int slot = blockIdx.y;
  const bool used = AnyLong(LongestOfThread(args)) &&
                    FindItem(args, slot, true, search, tile);
  // One block has to, so that this kernel does not end before the previous one.
  if (used || (kv_head == 0 && slot == 0)) WaitForPreviousKernel();
  if (!used) return;
  const ShareItem item = search.item;
  for (int row = item.piece; row < tile.num_rows; row += item.pieces) {
    const int64_t first = SlotRow(args, slot - item.piece, kv_head, row);
    CombineRow(args, tile.Row(args, kv_head, row),
               {args.partial_out + first * args.head_dim,
                args.partial_max + first, args.partial_sum + first,
                int64_t{args.num_kv_heads} * kDecodeRows, item.pieces},
               totals);
  }
}

// Debug only, a block a sequence: prints every value that the contract
// clamps or masks, by the names that the op's errors use.
__device__ inline void ReportClamped(const char* op, const char* name,
                                     int index, int low, int high, int value) {
  if (value >= low && value <= high) return;
  printf("xla_ops: %s: %s[%d] must be from %d to %d, got %d; clamped\n", op,
         name, index, low, high, value);
}

__global__ void ReportAttentionKernel(
    const __grid_constant__ AttentionArgs args) {
  const bool varlen = args.op == AttentionOp::kFlashAttnVarlen;
  const char* op = varlen ? "flash_attn_varlen" : "paged_attention";
  const char* starts = varlen ? "cu_seqlens_q" : "query_start_loc";
  const char* lengths = varlen ? "seqused_k" : "context_lens";
  const char* blocks = varlen ? "block_table" : "block_tables";
  const int seq = blockIdx.x;
  if (args.num_seqs != nullptr && seq == 0 && threadIdx.x == 0) {
    ReportClamped(op, "num_seqs", 0, 0, args.max_num_seqs, *args.num_seqs);
  }
  if (seq >= NumSeqs(args)) return;
  // The running maxima of the sequences before, which the next value may not
  // fall below.
  int start = 0;
  int kv_start = 0;
  for (int i = 0; i <= seq; ++i) {
    start = min(max(start, args.cu_seqlens_q[i]), args.num_tokens);
    if (!args.paged) {
      kv_start = min(max(kv_start, args.cu_seqlens_k[i]), args.max_kv_len);
    }
  }
  QueryTile tile = {};
  tile.seq = seq;
  int kv_end = kv_start;
  if (!args.paged) {
    kv_end = min(max(kv_start, args.cu_seqlens_k[seq + 1]), args.max_kv_len);
  }
  const int used = args.seqused_k != nullptr ? args.seqused_k[seq] : 0;
  SetKeys(args, used, kv_start, kv_end, tile);
  if (threadIdx.x == 0) {
    if (seq == 0) {
      ReportClamped(op, starts, 0, 0, args.num_tokens, args.cu_seqlens_q[0]);
    }
    ReportClamped(op, starts, seq + 1, start, args.num_tokens,
                  args.cu_seqlens_q[seq + 1]);
    if (!args.paged) {
      if (seq == 0) {
        ReportClamped(op, "cu_seqlens_k", 0, 0, args.max_kv_len,
                      args.cu_seqlens_k[0]);
      }
      ReportClamped(op, "cu_seqlens_k", seq + 1, kv_start, args.max_kv_len,
                    args.cu_seqlens_k[seq + 1]);
    }
    if (args.seqused_k != nullptr) {
      ReportClamped(op, lengths, seq, 0, args.max_kv_len - kv_start, used);
    }
    if (args.leftpad_k != nullptr) {
      ReportClamped(op, "leftpad_k", seq, 0,
                    tile.kv_len + tile.kv_start - kv_start,
                    args.leftpad_k[seq]);
    }
  }
  if (!args.paged || tile.kv_len == 0) return;
  const int num_pages = args.page_size.Divide(tile.kv_len - 1) + 1;
  for (int page = threadIdx.x; page < num_pages; page += blockDim.x) {
    const int block = args.block_table[seq * args.max_blocks + page];
    if (static_cast<uint32_t>(block) >= args.num_blocks) {
      printf("xla_ops: %s: %s[%d, %d] must be from 0 to %lld, got %d; masked\n",
             op, blocks, seq, page, static_cast<long long>(args.num_blocks) - 1,
             block);
    }
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_COMBINE_CUH_
