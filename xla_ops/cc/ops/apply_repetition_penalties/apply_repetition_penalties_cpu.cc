// CPU kernel and handler of apply_repetition_penalties: parts of rows spread
// over XLA's threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties.h"
#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties_checks.h"

namespace xla_ops {
namespace {

// Logits that one thread does at a time.
constexpr int64_t kPartSize = 8192;

template <typename T>
void Penalise(const ApplyRepetitionPenaltiesParams& params, int64_t begin,
              int64_t end, float penalty, T* out) {
  for (int64_t i = begin; i < end; ++i) {
    if (!(params.prompt_mask[i] | params.output_mask[i])) continue;
    const float x = ToFloat(out[i]);
    out[i] = FromFloat<T>(x > 0 ? x / penalty : x * penalty);
  }
}

void ApplyRepetitionPenalties(const ApplyRepetitionPenaltiesParams& params,
                              ffi::ThreadPool& pool) {
  const int64_t size = params.num_seqs * params.vocab_size;
  if (size == 0) return;
  if (params.out != params.logits) {
    std::memcpy(params.out, params.logits,
                static_cast<size_t>(size * SizeOf(params.dtype)));
  }
  const int64_t parts = (params.vocab_size + kPartSize - 1) / kPartSize;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelFor(pool, params.num_seqs * parts,
                std::min(params.vocab_size, kPartSize), [&](int64_t i) {
                  const int64_t seq = i / parts;
                  const int64_t row = seq * params.vocab_size;
                  const int64_t begin = i % parts * kPartSize;
                  const int64_t end =
                      std::min(params.vocab_size, begin + kPartSize);
                  const float penalty =
                      ToFloat(static_cast<const T*>(params.penalties)[seq]);
                  Penalise(params, row + begin, row + end, penalty,
                           static_cast<T*>(params.out));
                });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(apply_repetition_penalties,
                    ApplyRepetitionPenaltiesBinding(),
                    MakeApplyRepetitionPenaltiesParams,
                    ApplyRepetitionPenalties);

}  // namespace xla_ops
