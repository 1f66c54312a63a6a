// CPU kernel and handler of xla_ops.merge_attn_states, tokens spread over
// XLA's threads.

#include <cmath>
#include <cstdint>
#include <limits>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_checks.h"

namespace xla_ops {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Weights {
  float prefix;
  float suffix;
  float lse;
};

Weights WeightsOf(float prefix_lse, float suffix_lse) {
  if (prefix_lse == kInf) prefix_lse = -kInf;
  if (suffix_lse == kInf) suffix_lse = -kInf;
  if (prefix_lse == -kInf && suffix_lse == -kInf) return {1.0f, 0.0f, -kInf};
  const float max = prefix_lse > suffix_lse ? prefix_lse : suffix_lse;
  const float prefix = std::exp(prefix_lse - max);
  const float suffix = std::exp(suffix_lse - max);
  const float sum = prefix + suffix;
  return {prefix / sum, suffix / sum, std::log(sum) + max};
}

// `prefix`, `suffix`, `out`: [head_dim]; `out` may be one of the others.
template <typename T>
void MergeHead(const T* prefix, const T* suffix, const Weights& weights,
               int64_t head_dim, T* out) {
  for (int64_t d = 0; d < head_dim; ++d) {
    const float p = ToFloat(prefix[d]) * weights.prefix;
    const float s = ToFloat(suffix[d]) * weights.suffix;
    out[d] = FromFloat<T>((weights.prefix == 0.0f ? 0.0f : p) +
                          (weights.suffix == 0.0f ? 0.0f : s));
  }
}

void MergeAttnStates(const MergeAttnStatesParams& params,
                     ffi::ThreadPool& pool) {
  const int64_t head_dim = params.head_dim;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelFor(
        pool, params.num_tokens, params.num_heads * (head_dim + 32),
        [&](int64_t token) {
          for (int64_t head = 0; head < params.num_heads; ++head) {
            const int64_t at = head * params.num_tokens + token;
            const int64_t start = (token * params.num_heads + head) * head_dim;
            const Weights weights =
                WeightsOf(params.prefix_lse[at], params.suffix_lse[at]);
            MergeHead(static_cast<const T*>(params.prefix_output) + start,
                      static_cast<const T*>(params.suffix_output) + start,
                      weights, head_dim,
                      static_cast<T*>(params.output) + start);
            params.output_lse[at] = weights.lse;
          }
        });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(merge_attn_states, MergeAttnStatesBinding(),
                    MakeMergeAttnStatesParams, MergeAttnStates);

}  // namespace xla_ops
