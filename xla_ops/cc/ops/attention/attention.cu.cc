// Launches attention on CUDA: picks a kernel, sizes its grid from bounds
// alone, and combines the splits.
//
//   attention_sm90.h       prefill on Hopper's own tensor cores
//   attention_mma.cuh      fp16 and bf16 on tensor cores, sm_80 on; its
//                          pieces in attention_mma_tile.cuh
//   attention_simt.cuh     everything else
//   attention_combine.cuh  splits; debug report
//   attention_tiles.cuh    tiles and addresses; attention_rows.cuh: rows
//   attention_fp8.cu.cc    compiles the kernels for 8-bit keys and values
//
// Tested by tests/gpu/check_kernels.py, tests/ops/test_paged_attention.py and
// tests/ops/test_flash_attn_varlen.py.

#include "xla_ops/cc/ops/attention/attention.h"

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/overlap.cuh"
#include "xla_ops/cc/device/per_device.h"
#include "xla_ops/cc/device/vector.cuh"
#include "xla_ops/cc/ops/attention/attention_combine.cuh"
#include "xla_ops/cc/ops/attention/attention_kernels.cuh"
#include "xla_ops/cc/ops/attention/attention_launch.h"
#include "xla_ops/cc/ops/attention/attention_sm90.h"

namespace xla_ops {
namespace {

struct Prepared {
  bool has_mma;      // the tensor cores' kernels have their instructions
  bool can_overlap;  // device/overlap.cuh
};

// Prepares all kernels for the current device, once, and says what those that
// were loaded for it can do. One query serves all of them: they are compiled
// together.
cudaError_t Prepare(Prepared* prepared) {
  static PerDevice<Prepared> devices;
  return devices.Get(
      [](Prepared* result) {
        cudaFuncAttributes attributes;
        cudaError_t error = cudaFuncGetAttributes(
            &attributes, AttentionMmaKernel<__half, false, 64, 1>);
        if (error != cudaSuccess) return error;
        result->has_mma = attributes.ptxVersion >= 80;
        result->can_overlap = CanOverlap(attributes);
        if (result->has_mma) {
          error = PrepareMma<__half, false>();
          if (error == cudaSuccess) error = PrepareMma<__nv_bfloat16, false>();
        }
        if (error == cudaSuccess) error = PrepareSimt<float>();
        if (error == cudaSuccess) error = PrepareSimt<__half>();
        if (error == cudaSuccess) error = PrepareSimt<__nv_bfloat16>();
        if (error == cudaSuccess) error = PrepareAttentionFp8(result->has_mma);
        if (error == cudaSuccess) error = PrepareKernel(AttentionCombineKernel);
        if (error == cudaSuccess) error = PrepareAttentionSm90();
        return error;
      },
      prepared);
}

// Whether every row of query, key, value and out starts and ends on 16 bytes.
bool RowsAligned(const AttentionParams& params) {
  const int64_t size = 16 / SizeOf(params.dtype);
  const int64_t kv_size = 16 / SizeOf(params.kv_dtype);
  return IsAligned(params.query, 16) && IsAligned(params.key, 16) &&
         IsAligned(params.value, 16) && IsAligned(params.out, 16) &&
         params.head_dim % size == 0 && params.head_dim % kv_size == 0 &&
         params.block_stride % kv_size == 0 &&
         params.page_stride % kv_size == 0 && params.head_stride % kv_size == 0;
}

// What a row of the block table can address, or the rows of the contiguous
// buffer. Divided first: the product may not fit in 64 bits.
int MaxKvLength(const AttentionParams& params) {
  const int64_t blocks = params.paged ? params.max_blocks : params.num_blocks;
  if (params.page_size == 0 || blocks == 0) return 0;
  if (blocks > INT32_MAX / params.page_size) return INT32_MAX;
  return static_cast<int>(blocks * params.page_size);
}

// A window that no distance in 32 bits leaves hides nothing.
int Window(int64_t window) {
  return window < 0 || window >= INT32_MAX ? -1 : static_cast<int>(window);
}

AttentionArgs MakeArgs(const AttentionParams& params) {
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
  args.head_dim = static_cast<int>(params.head_dim);
  args.max_num_seqs = static_cast<int>(params.max_num_seqs);
  args.max_kv_len = MaxKvLength(params);
  // A sequence's splits hold at least one piece of 64 tokens each at the
  // longest length; more would only add empty ones.
  args.num_splits = static_cast<int>(
      std::min(params.num_splits,
               std::max<int64_t>(1, (int64_t{args.max_kv_len} + 63) / 64)));
  args.window_left = Window(params.window_left);
  args.window_right = Window(params.window_right);
  args.scale = params.scale * kLog2E;
  if (params.soft_cap > 0.0f) {
    args.scale = params.scale / params.soft_cap;
    args.soft_cap = params.soft_cap * kLog2E;
  }
  args.dtype = params.dtype;
  args.paged = params.paged;
  args.e5m2 = params.kv_dtype == DType::kF8E5M2;
  args.aligned = RowsAligned(params);
  args.varlen = params.op == std::string_view("flash_attn_varlen");
  if (args.num_splits > 1) {
    const int64_t rows = args.num_splits * params.num_tokens * params.num_heads;
    args.partial_out = reinterpret_cast<float*>(
        static_cast<char*>(params.workspace) + kAttentionSchedulerBytes);
    args.partial_max = args.partial_out + rows * params.head_dim;
    args.partial_sum = args.partial_max + rows;
  }
  return args;
}

cudaError_t LaunchCombine(cudaStream_t stream, const AttentionArgs& args,
                          bool overlap) {
  const int warps = std::min(
      kCombineMaxWarps, (args.num_splits + kCombineBatch - 1) / kCombineBatch);
  return LaunchOverlapping(stream, AttentionCombineKernel,
                           args.num_tokens * args.num_heads, 32 * warps,
                           overlap, args);
}

}  // namespace

cudaError_t PrepareAttention() {
  Prepared prepared = {};
  return Prepare(&prepared);
}

cudaError_t LaunchAttention(cudaStream_t stream,
                            const AttentionParams& params) {
  if (params.num_tokens == 0 || params.num_heads == 0 || params.head_dim == 0) {
    return cudaSuccess;
  }
  if (params.num_tokens > kAttentionMaxRows / params.num_heads ||
      params.max_num_seqs > kAttentionMaxSeqs ||
      params.num_kv_heads > kAttentionMaxKvHeads) {
    return cudaErrorInvalidConfiguration;
  }
  Prepared prepared = {};
  cudaError_t error = Prepare(&prepared);
  if (error != cudaSuccess) return error;

  const AttentionArgs args = MakeArgs(params);
  if (!IsAligned(params.workspace, 16) ||
      params.workspace_bytes <
          AttentionWorkspaceBytes(params.num_tokens, params.num_heads,
                                  params.head_dim, args.num_splits)) {
    return cudaErrorInvalidValue;
  }
  if (params.debug) {
    const int blocks = std::max(1, args.max_num_seqs);
    ReportAttentionKernel<<<blocks, 128, 0, stream>>>(args);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  if (CanLaunchAttentionSm90(params)) {
    return LaunchAttentionSm90(stream, params);
  }
  const bool use_mma =
      prepared.has_mma && args.aligned && params.dtype != DType::kF32;
  if (params.kv_dtype != params.dtype) {
    error = LaunchAttentionFp8(stream, args, use_mma);
  } else if (params.dtype == DType::kF32) {
    error = LaunchSimt<float>(stream, args);
  } else if (params.dtype == DType::kF16) {
    error = use_mma ? LaunchMma<__half, false>(stream, args)
                    : LaunchSimt<__half>(stream, args);
  } else {
    error = use_mma ? LaunchMma<__nv_bfloat16, false>(stream, args)
                    : LaunchSimt<__nv_bfloat16>(stream, args);
  }
  if (error != cudaSuccess || args.num_splits == 1) return error;
  return LaunchCombine(stream, args, prepared.can_overlap);
}

}  // namespace xla_ops
