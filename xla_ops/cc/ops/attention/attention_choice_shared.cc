// Which CUDA kernel takes a call; see attention_choice.h.

#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/ops/attention/attention_choice.h"

namespace xla_ops {
namespace {

// Fewer packed rows a sequence than this, on average, leave more than half of
// the Hopper kernel's tile of 128 or 192 rows empty: smaller tiles do better.
constexpr int64_t kSm90MinRows = 64;
// With this many the sequences that only decode take little of a call's time,
// by whichever kernel, and a second one costs its launch.
constexpr int64_t kMixedMaxRows = 1024;

bool IsAligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool PointersAligned(const AttentionParams& params) {
  return IsAligned16(params.query) && IsAligned16(params.key) &&
         IsAligned16(params.value) && IsAligned16(params.out);
}

int64_t PackedRows(const AttentionParams& params) {
  return params.num_tokens * (params.num_heads / params.num_kv_heads);
}

// What the Hopper kernel can do, whether or not it is worth it.
bool FitsSm90(const AttentionParams& params, const AttentionDevice& device) {
  if (device.capability != 90 || !device.has_wgmma) return false;
  if (params.dtype == DType::kF32 || params.kv_dtype != params.dtype) {
    return false;
  }
  if (params.head_dim % 8 != 0 || params.head_dim > 256) return false;
  if (params.max_num_seqs == 0 || params.num_blocks == 0 ||
      params.page_size == 0 || params.max_num_seqs >= kSm90MaxTokens) {
    return false;
  }
  return (!params.paged || params.page_size % kSm90MinBoxTokens == 0) &&
         PointersAligned(params) &&
         IsTmaStep(params.num_kv_heads, params.head_stride) &&
         IsTmaStep(params.page_size, params.page_stride) &&
         IsTmaStep(params.num_blocks, params.block_stride) &&
         params.num_tokens <
             kSm90MaxTokens / (params.num_heads * params.num_splits) &&
         MaxKvLength(params) < kSm90MaxTokens &&
         params.page_size < kSm90MaxTokens &&
         params.num_blocks < (int64_t{1} << 31);
}

bool CanRunMma(const AttentionParams& params, const AttentionDevice& device) {
  return device.has_mma && params.dtype != DType::kF32 && RowsAligned(params);
}

bool CanRunSm90(const AttentionParams& params, const AttentionDevice& device) {
  return FitsSm90(params, device) &&
         PackedRows(params) >= kSm90MinRows * params.max_num_seqs;
}

// Where the average sequence has more rows than decode has, and fewer than
// prefill, some have many and others may have few.
bool CanRunMixed(const AttentionParams& params, const AttentionDevice& device) {
  return params.max_num_seqs > 1 && FitsSm90(params, device) &&
         CanRunMma(params, device) &&
         PackedRows(params) > kDecodeRows * params.max_num_seqs &&
         PackedRows(params) < kMixedMaxRows * params.max_num_seqs;
}

bool CanRunSimt(const AttentionParams&, const AttentionDevice&) { return true; }

struct Row {
  AttentionKernel kernel;
  const char* name;
  bool (*can_run)(const AttentionParams&, const AttentionDevice&);
};

constexpr Row kRows[] = {
    {AttentionKernel::kMixed, "mixed", CanRunMixed},
    {AttentionKernel::kSm90, "sm90", CanRunSm90},
    {AttentionKernel::kMma, "mma", CanRunMma},
    {AttentionKernel::kSimt, "simt", CanRunSimt},
};

constexpr bool InOrder() {
  for (int i = 0; i < kNumAttentionKernels; ++i) {
    if (kRows[i].kernel != static_cast<AttentionKernel>(i)) return false;
  }
  return sizeof(kRows) / sizeof(kRows[0]) == kNumAttentionKernels;
}
static_assert(InOrder());

AttentionKernel FirstFrom(int index, const AttentionParams& params,
                          const AttentionDevice& device) {
  for (; index < kNumAttentionKernels; ++index) {
    if (kRows[index].can_run(params, device)) return kRows[index].kernel;
  }
  return AttentionKernel::kNone;
}

}  // namespace

bool IsTmaStep(int64_t size, int64_t stride) {
  return size == 1 ||
         (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 36));
}

const char* Name(AttentionKernel kernel) {
  return kernel == AttentionKernel::kNone
             ? "none"
             : kRows[static_cast<int>(kernel)].name;
}

AttentionKernel NextAttentionKernel(AttentionKernel after,
                                    const AttentionParams& params,
                                    const AttentionDevice& device) {
  return FirstFrom(static_cast<int>(after) + 1, params, device);
}

AttentionKernel ChooseAttentionKernel(const AttentionParams& params,
                                      const AttentionDevice& device) {
  return FirstFrom(0, params, device);
}

int MmaTileRows(const AttentionParams& params, const AttentionDevice& device) {
  const int64_t rows = PackedRows(params);
  if (rows <= kDecodeRows * params.max_num_seqs) return kDecodeRows;
  const int64_t tiles = rows / kMmaManyRows;
  const bool fills_tiles = tiles >= params.max_num_seqs;
  // With fewer, twice as many of half the rows run at once.
  const bool fills_device =
      tiles * params.num_kv_heads * params.num_splits > device.multiprocessors;
  return params.head_dim <= kMmaManyRowsMaxHeadDim && fills_tiles &&
                 fills_device
             ? kMmaManyRows
             : kMmaFewRows;
}

// A cluster's blocks have to find room on neighbouring multiprocessors, which
// with more clusters than these costs more than a kernel that combines
// (benchmarks/NOTES.md). Half of the splits that were asked for, but in a
// cluster, win where there are a few clusters to fill the GPU.
int ClusterSplits(const AttentionParams& params, const AttentionDevice& device,
                  int num_splits) {
  constexpr int64_t kMostClusters = 16;
  constexpr int64_t kLeastToHalve = 4;
  const bool is_power = (num_splits & (num_splits - 1)) == 0;
  if (!device.has_clusters || num_splits < 2 || !is_power ||
      num_splits > 2 * kMaxClusterSplits ||
      MmaTileRows(params, device) != kDecodeRows) {
    return 0;
  }
  const int64_t seqs = std::max<int64_t>(0, params.max_num_seqs);
  const int64_t tiles = std::min(
      params.num_tokens,
      std::max<int64_t>(0, PackedRows(params) - seqs) / kDecodeRows + seqs);
  if (tiles > kMostClusters / params.num_kv_heads) return 0;
  if (num_splits <= kMaxClusterSplits) return num_splits;
  return tiles * params.num_kv_heads >= kLeastToHalve ? kMaxClusterSplits : 0;
}

std::string DescribeChoice(AttentionKernel kernel,
                           const AttentionParams& params) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  return std::string("xla_ops: ") +
         (params.op == AttentionOp::kFlashAttnVarlen ? "flash_attn_varlen"
                                                     : "paged_attention") +
         ": kernel " + Name(kernel) + " for query " + Name(params.dtype) +
         " [" + text(params.num_tokens) + ", " + text(params.num_heads) + ", " +
         text(params.head_dim) + "], " + text(params.num_kv_heads) +
         " KV heads " + Name(params.kv_dtype) + ", " +
         text(params.max_num_seqs) + " sequences, " +
         (params.paged ? "page_size " + text(params.page_size) : "contiguous") +
         ", " + text(params.num_splits) +
         (params.num_splits == 1 ? " split" : " splits");
}

// Divided first: the product may not fit in 64 bits.
int MaxKvLength(const AttentionParams& params) {
  const int64_t blocks = params.paged ? params.max_blocks : params.num_blocks;
  if (params.page_size == 0 || blocks == 0) return 0;
  if (blocks > INT32_MAX / params.page_size) return INT32_MAX;
  return static_cast<int>(blocks * params.page_size);
}

bool RowsAligned(const AttentionParams& params) {
  const int64_t size = 16 / SizeOf(params.dtype);
  const int64_t kv_size = 16 / SizeOf(params.kv_dtype);
  return PointersAligned(params) && params.head_dim % size == 0 &&
         params.head_dim % kv_size == 0 && params.block_stride % kv_size == 0 &&
         params.page_stride % kv_size == 0 && params.head_stride % kv_size == 0;
}

}  // namespace xla_ops
