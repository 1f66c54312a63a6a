// CPU kernel and handlers of xla_ops.copy_blocks and xla_ops.swap_blocks.
//
// Threads share the work by the position in a block, not by pair, so that
// each position sees the pairs in their order.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_checks.h"

namespace xla_ops {
namespace {

constexpr int kMaxReports = 8;
// Bytes of a run that one thread copies at a time.
constexpr int64_t kPieceSize = 16384;
// Bytes that cost as much as one step of ParallelFor's cost model.
constexpr int64_t kBytesPerStep = 16;

void ReportSkippedPairs(const CopyBlocksParams& params) {
  int reports = 0;
  for (int64_t p = 0; p < params.num_pairs && reports < kMaxReports; ++p) {
    const int64_t source = params.block_mapping[2 * p];
    const int64_t target = params.block_mapping[2 * p + 1];
    if (source < 0 || target < 0) continue;
    if (source < params.num_source_blocks &&
        target < params.num_target_blocks) {
      continue;
    }
    ++reports;
    std::fprintf(stderr,
                 "xla_ops: %s: block_mapping[%lld] must be less than "
                 "[%lld, %lld], got [%lld, %lld]; skipped\n",
                 params.within_one ? "copy_blocks" : "swap_blocks",
                 static_cast<long long>(p),
                 static_cast<long long>(params.num_source_blocks),
                 static_cast<long long>(params.num_target_blocks),
                 static_cast<long long>(source),
                 static_cast<long long>(target));
  }
}

// Copies `size` bytes of every block, for all pairs. `from`, `to`: of block 0.
void CopyPiece(const CopyBlocksParams& params, const char* from, char* to,
               int64_t size) {
  for (int64_t p = 0; p < params.num_pairs; ++p) {
    const int64_t source = params.block_mapping[2 * p];
    const int64_t target = params.block_mapping[2 * p + 1];
    if (source < 0 || source >= params.num_source_blocks || target < 0 ||
        target >= params.num_target_blocks ||
        (params.within_one && source == target)) {
      continue;
    }
    // memmove: where a caller's blocks do overlap, the result is a strange
    // one but no undefined behaviour.
    std::memmove(to + target * params.target_strides.block,
                 from + source * params.source_strides.block,
                 static_cast<size_t>(size));
  }
}

void CopyBlocks(const CopyBlocksParams& params, ffi::ThreadPool& pool) {
  if (params.copy_size > 0) {
    std::memcpy(params.copy_to, params.copy_from,
                static_cast<size_t>(params.copy_size));
  }
  if (params.debug) ReportSkippedPairs(params);
  if (IsEmpty(params)) return;
  const int64_t pieces = (params.run_size + kPieceSize - 1) / kPieceSize;
  const int64_t piece_size = std::min(params.run_size, kPieceSize);
  const int64_t cost = params.num_pairs * (1 + piece_size / kBytesPerStep);
  ParallelFor(pool, params.outer_size * params.inner_size * pieces, cost,
              [&](int64_t i) {
                const int64_t begin = i % pieces * kPieceSize;
                const int64_t inner = i / pieces % params.inner_size;
                const int64_t outer = i / pieces / params.inner_size;
                const auto start = [&](const BlockStrides& strides) {
                  return outer * strides.outer + inner * strides.inner + begin;
                };
                CopyPiece(params, params.source + start(params.source_strides),
                          params.target + start(params.target_strides),
                          std::min(kPieceSize, params.run_size - begin));
              });
}

}  // namespace

XLA_OPS_CPU_HANDLER(copy_blocks, CopyBlocksBinding(), MakeCopyBlocksParams,
                    CopyBlocks);
XLA_OPS_CPU_HANDLER(swap_blocks, SwapBlocksBinding(), MakeSwapBlocksParams,
                    CopyBlocks);

}  // namespace xla_ops
