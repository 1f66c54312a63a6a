// AttentionParams as the CUDA kernels take them.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_ARGS_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_ARGS_CUH_

#include <algorithm>
#include <cstdint>

#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_choice.h"
#include "xla_ops/cc/ops/attention/attention_share.h"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

// A window of `bound` tokens or more hides nothing.
inline int Window(int64_t window, int bound) {
  return window < 0 || window >= bound ? -1 : static_cast<int>(window);
}

// Has the workspace hold partial results of so many rows.
inline void SetPartials(int64_t rows, const AttentionParams& params,
                        AttentionArgs* args) {
  args->partial_out = reinterpret_cast<float*>(
      static_cast<char*>(params.workspace) + kAttentionSchedulerBytes);
  args->partial_max = args->partial_out + rows * params.head_dim;
  args->partial_sum = args->partial_max + rows;
}

// As many tiles of `tile_rows` packed rows as any cu_seqlens_q could need
// (attention_tiles.cuh). The limits in attention.h and kTileRows >= 4 keep them
// below 2^31. With few_rows, a tile a segment.
inline int64_t NumTiles(const AttentionArgs& args, int tile_rows) {
  const int64_t group = args.group.value();
  return (args.few_rows > 0 ? 0 : args.num_tokens * group / tile_rows) +
         args.max_num_seqs + 2;
}

// A grid has some room in y behind the KV heads (attention.h).
constexpr int64_t kMostSlotBlocks = 4096;

inline AttentionArgs MakeAttentionArgs(const AttentionParams& params) {
  AttentionArgs args = {};
  args.query = params.query;
  args.key = params.key;
  args.value = params.value;
  args.cu_seqlens_q = params.cu_seqlens_q;
  args.cu_seqlens_k = params.cu_seqlens_k;
  args.seqused_k = params.seqused_k;
  args.block_table = params.block_table;
  args.leftpad_k = params.leftpad_k;
  args.num_seqs = params.num_seqs;
  args.alibi_slopes = params.alibi_slopes;
  args.sinks = params.sinks;
  args.k_scale = params.k_scale;
  args.v_scale = params.v_scale;
  args.out = params.out;
  args.lse = params.lse;
  args.max_blocks = params.max_blocks;
  args.block_stride = params.block_stride;
  args.page_stride = params.page_stride;
  args.head_stride = params.head_stride;
  args.alibi_seq_stride = params.alibi_seq_stride;
  for (int i = 0; i < 2; ++i) {
    args.kv_scale_seq_stride[i] = params.kv_scale_seq_stride[i];
    args.kv_scale_head_stride[i] = params.kv_scale_head_stride[i];
  }
  args.page_size = FastDiv(std::max<int64_t>(1, params.page_size));
  args.group = FastDiv(params.num_heads / params.num_kv_heads);
  args.num_blocks = static_cast<uint32_t>(
      std::min(params.num_blocks, int64_t{INT32_MAX} + 1));
  args.num_tokens = static_cast<int>(params.num_tokens);
  args.num_heads = static_cast<int>(params.num_heads);
  args.num_kv_heads = static_cast<int>(params.num_kv_heads);
  args.head_dim = static_cast<int>(params.head_dim);
  args.max_num_seqs = static_cast<int>(params.max_num_seqs);
  args.max_kv_len = MaxKvLength(params);
  // A sequence's splits hold at least one piece of 64 tokens each at the
  // longest length; more would only add empty ones.
  args.num_splits = static_cast<int>(
      std::min(params.num_splits,
               std::max<int64_t>(1, (int64_t{args.max_kv_len} + 63) / 64)));
  // No token lies farther before a row than the longest sequence, nor farther
  // behind one than there are rows.
  args.window_left = Window(params.window_left, args.max_kv_len);
  args.window_right = Window(params.window_right, args.num_tokens);
  args.scale = params.scale * kLog2E;
  if (params.soft_cap > 0.0f) {
    args.scale = params.scale / params.soft_cap;
    args.soft_cap = params.soft_cap * kLog2E;
  }
  args.transform = params.soft_cap > 0.0f || params.alibi_slopes != nullptr ||
                   !(params.scale > 0.0f);
  args.op = params.op;
  args.dtype = params.dtype;
  args.paged = params.paged;
  args.e5m2 = params.kv_dtype == DType::kF8E5M2;
  args.aligned = RowsAligned(params);
  args.next_item = static_cast<unsigned*>(params.workspace);
  if (args.num_splits > 1) {
    SetPartials(args.num_splits * params.num_tokens * params.num_heads, params,
                &args);
  }
  return args;
}

// The same for the kernel for decode, which has as many slots as the workspace
// holds, where a sequence can be long.
inline AttentionArgs WithSlots(const AttentionParams& params,
                               AttentionArgs args) {
  const int64_t slots =
      (params.workspace_bytes - kAttentionSchedulerBytes) /
      AttentionSlotBytes(params.num_kv_heads, params.head_dim);
  if (args.num_splits > 1 || args.max_kv_len <= kShareLongTokens || slots < 2 ||
      slots * params.num_kv_heads > kMostSlotBlocks ||
      NumTiles(args, kDecodeRows) > INT32_MAX / params.num_kv_heads) {
    return args;
  }
  args.num_slots = static_cast<int>(slots);
  const bool fp8 = params.kv_dtype != params.dtype;
  args.share_tile_shift = DecodeTileTokens(fp8, params.head_dim) == 128 ? 7 : 6;
  SetPartials(slots * params.num_kv_heads * kAttentionSlotRows, params, &args);
  return args;
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_ARGS_CUH_
