// CPU kernel and handler of xla_ops.copy_blocks.
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
    if (source < params.num_blocks && target < params.num_blocks) continue;
    ++reports;
    std::fprintf(
        stderr,
        "xla_ops: copy_blocks: block_mapping[%lld] must be less than "
        "%lld, got [%lld, %lld]; skipped\n",
        static_cast<long long>(p), static_cast<long long>(params.num_blocks),
        static_cast<long long>(source), static_cast<long long>(target));
  }
}

// Copies bytes [begin, begin + size) of one run, for all pairs. `run`: the
// run of block 0.
void CopyPiece(const CopyBlocksParams& params, char* run, int64_t begin,
               int64_t size) {
  for (int64_t p = 0; p < params.num_pairs; ++p) {
    const int64_t source = params.block_mapping[2 * p];
    const int64_t target = params.block_mapping[2 * p + 1];
    if (source < 0 || source >= params.num_blocks || target < 0 ||
        target >= params.num_blocks || source == target) {
      continue;
    }
    // memmove: where a caller's blocks do overlap, the result is a strange
    // one but no undefined behaviour.
    std::memmove(run + target * params.block_stride + begin,
                 run + source * params.block_stride + begin,
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
                char* run = params.cache + outer * params.outer_stride +
                            inner * params.inner_stride;
                CopyPiece(params, run, begin,
                          std::min(kPieceSize, params.run_size - begin));
              });
}

}  // namespace

XLA_OPS_CPU_HANDLER(copy_blocks, CopyBlocksBinding(), MakeCopyBlocksParams,
                    CopyBlocks);

}  // namespace xla_ops
