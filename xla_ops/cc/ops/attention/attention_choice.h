// Which CUDA kernel takes a call of attention: a question of shapes, types,
// addresses and the device, for lengths are on the device. No CUDA header, so
// that it can be tested without one. attention.cu.cc launches what this
// chooses; docs/architecture.md has the same as a table.
//
// Tested by attention_choice_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHOICE_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHOICE_H_

#include <cstdint>
#include <string>

#include "xla_ops/cc/ops/attention/attention.h"

namespace xla_ops {

// In order of preference: the first one that can run a call does. A kernel of
// its own for another architecture is one more entry here, with its row in
// attention_choice_shared.cc and in attention.cu.cc.
enum class AttentionKernel : int {
  kMixed,  // kSm90 and kMma, each for some of the sequences
  kSm90,
  kMma,
  kSimt,
  kNone
};
constexpr int kNumAttentionKernels = static_cast<int>(AttentionKernel::kNone);

// What the kernels need to know of a device, and what was loaded for it.
struct AttentionDevice {
  int16_t capability;       // 90 for 9.0
  int16_t multiprocessors;  // as many persistent blocks are launched
  bool has_wgmma;           // the Hopper kernels have code that it runs
  bool has_mma;             // the mma.sync kernels have theirs
  bool can_overlap;         // device/overlap.cuh
  bool has_clusters;        // decode runs in clusters of kMaxClusterSplits
};

// "mixed", "sm90", "mma", "simt"; "none" for kNone.
const char* Name(AttentionKernel kernel);

// The first kernel that can run the call on the device, and is worth it; kSimt
// always can. Calls are within the limits of attention.h, and have a query.
AttentionKernel ChooseAttentionKernel(const AttentionParams& params,
                                      const AttentionDevice& device);

// The same behind `after`, which could not run it after all.
AttentionKernel NextAttentionKernel(AttentionKernel after,
                                    const AttentionParams& params,
                                    const AttentionDevice& device);

// One line for debug mode that names the kernel and what it was chosen by,
// such as "xla_ops: paged_attention: kernel mma for query bfloat16 [64, 32,
// 128], 8 KV heads bfloat16, 64 sequences, page_size 16, 1 split".
std::string DescribeChoice(AttentionKernel kernel,
                           const AttentionParams& params);

// What a row of the block table can address, or the rows of the contiguous
// buffer; at most INT32_MAX.
int MaxKvLength(const AttentionParams& params);

// Whether every row of query, key, value and out starts and ends on 16 bytes.
bool RowsAligned(const AttentionParams& params);

// Whether the copy engine (TMA) can take steps of `stride` 16-bit elements from
// one of `size` things to the next: a multiple of 16 bytes below 2^40, of 8
// tokens too (MakeMap in attention_sm90.cu.cc).
bool IsTmaStep(int64_t size, int64_t stride);

// Packed rows of the tile that mma.sync has for decode. A call decodes where
// this holds its average sequence. Of kMixed, sequences of at most this many
// run by it, all others by the Hopper kernel: which ones is read on the device.
constexpr int kDecodeRows = 16;
// Of the tiles that it has for prefill, and up to which head_dim it has the
// larger one.
constexpr int kMmaFewRows = 64;
constexpr int kMmaManyRows = 128;
constexpr int kMmaManyRowsMaxHeadDim = 128;

// Packed rows of the tile of a call by mma.sync: one of the three. Many rows
// get the most out of K and V, but a short sequence does not fill them, and few
// tiles leave multiprocessors idle.
int MmaTileRows(const AttentionParams& params, const AttentionDevice& device);

// Splits that a cluster of decode's blocks combines by itself, at most.
constexpr int kMaxClusterSplits = 16;

// How many splits a call by mma.sync has as clusters; 0 where a kernel of its
// own has to combine them. `num_splits` is what the call asks for.
int ClusterSplits(const AttentionParams& params, const AttentionDevice& device,
                  int num_splits);

// Of the Hopper kernel. Pages are copied in boxes of at least this many
// tokens, a divisor of every tile.
constexpr int kSm90MinBoxTokens = 16;
// There token and row numbers stay below this, so that sums of two fit in 32
// bits. There are no more items of work than rows of [num_splits,
// num_tokens, num_heads].
constexpr int64_t kSm90MaxTokens = int64_t{1} << 30;

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CHOICE_H_
