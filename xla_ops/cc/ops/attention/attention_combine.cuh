// Adds up the partial results that the splits of the KV tokens left in the
// workspace, and the debug kernel that says what the attention masks.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_COMBINE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_COMBINE_CUH_

#include <math_constants.h>

#include <cstdint>
#include <cstdio>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

constexpr int kCombineThreads = 128;

// A warp a row of [num_tokens, num_heads]. A split whose sum is zero saw
// nothing; its accumulator is not read. The lanes first go over the splits,
// then over head_dim, four elements each.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads) AttentionCombineKernel(
    const __grid_constant__ AttentionArgs args) {
  const int64_t num_rows = args.num_tokens * args.num_heads;
  const int64_t row =
      (int64_t{blockIdx.x} * kCombineThreads + threadIdx.x) / 32;
  if (row >= num_rows) return;
  const int lane = threadIdx.x % 32;

  float max = -CUDART_INF_F;
  for (int split = lane; split < args.num_splits; split += 32) {
    max = fmaxf(max, args.partial_max[split * num_rows + row]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, step));
  }
  max = FiniteMax(max);
  float sum = 0.0f;
  for (int split = lane; split < args.num_splits; split += 32) {
    const int64_t partial_row = split * num_rows + row;
    sum += args.partial_sum[partial_row] *
           Exp2(args.partial_max[partial_row] - max);
  }
  sum = WarpSum(sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;

  for (int column = 4 * lane; column < args.head_dim; column += 128) {
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int split = 0; split < args.num_splits; ++split) {
      const int64_t partial_row = split * num_rows + row;
      if (args.partial_sum[partial_row] == 0.0f) continue;
      const float weight = Exp2(args.partial_max[partial_row] - max);
      const Vector<float, 4> part = LoadVector<4>(
          args.partial_out + partial_row * args.head_dim + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += weight * part[i];
    }
    T* out = static_cast<T*>(args.out) + row * args.head_dim + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = FromFloat<T>(total[i] * inverse);
  }
}

// Debug only, a block a sequence: prints every value that the contract
// clamps or masks.
__global__ void ReportAttentionKernel(
    const __grid_constant__ AttentionArgs args) {
  const int seq = blockIdx.x;
  const int num_seqs = *args.num_seqs;
  if (seq == 0 && threadIdx.x == 0 &&
      (num_seqs < 0 || num_seqs > args.max_num_seqs)) {
    printf(
        "xla_ops: paged_attention: num_seqs must be from 0 to %d, got %d; it is "
        "clamped\n",
        args.max_num_seqs, num_seqs);
  }
  if (seq >= min(num_seqs, args.max_num_seqs)) return;
  const int context = args.context_lens[seq];
  if (threadIdx.x == 0) {
    if (context < 0 || context > args.max_context) {
      printf(
          "xla_ops: paged_attention: context_lens[%d] must be from 0 to %d, "
          "got %d; clamped\n",
          seq, args.max_context, context);
    }
    const int start = args.query_start_loc[seq];
    const int end = args.query_start_loc[seq + 1];
    if (start < 0 || end < start || end > args.num_tokens) {
      printf(
          "xla_ops: paged_attention: query_start_loc must rise from 0 to %lld, got %d "
          "and %d at sequence %d; it is clamped\n",
          static_cast<long long>(args.num_tokens), start, end, seq);
    }
  }
  const int clamped = ContextLength(args, seq);
  if (clamped == 0) return;
  const int num_pages = args.page_size.Divide(clamped - 1) + 1;
  for (int page = threadIdx.x; page < num_pages; page += blockDim.x) {
    const int block = args.block_tables[seq * args.max_blocks + page];
    if (static_cast<uint32_t>(block) >= args.num_blocks) {
      printf(
          "xla_ops: paged_attention: block_tables[%d, %d] must be from 0 to "
          "%lld, got %d; masked\n",
          seq, page, static_cast<long long>(args.num_blocks) - 1, block);
    }
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_COMBINE_CUH_
