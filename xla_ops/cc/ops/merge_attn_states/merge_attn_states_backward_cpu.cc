// CPU kernel and handler of merge_attn_states_backward, tokens spread over
// XLA's threads.

#include <cmath>
#include <cstdint>
#include <limits>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward.h"
#include "xla_ops/cc/ops/merge_attn_states/merge_attn_states_backward_checks.h"

namespace xla_ops {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Weights {
  float prefix;
  float suffix;
  bool is_empty;
};

Weights WeightsOf(float prefix_lse, float suffix_lse) {
  if (prefix_lse == kInf) prefix_lse = -kInf;
  if (suffix_lse == kInf) suffix_lse = -kInf;
  if (prefix_lse == -kInf && suffix_lse == -kInf) return {1.0f, 0.0f, true};
  const float max = prefix_lse > suffix_lse ? prefix_lse : suffix_lse;
  const float prefix = std::exp(prefix_lse - max);
  const float suffix = std::exp(suffix_lse - max);
  const float sum = prefix + suffix;
  return {prefix / sum, suffix / sum, false};
}

// All pointers: [head_dim]. Returns the sum of g * (prefix - suffix).
template <typename T>
float GradientHead(const T* grad, const T* prefix, const T* suffix,
                   const Weights& weights, int64_t head_dim, T* dprefix,
                   T* dsuffix) {
  float sum = 0.0f;
  for (int64_t d = 0; d < head_dim; ++d) {
    const float g = ToFloat(grad[d]);
    sum += g * (ToFloat(prefix[d]) - ToFloat(suffix[d]));
    dprefix[d] =
        FromFloat<T>(weights.prefix == 0.0f ? 0.0f : weights.prefix * g);
    dsuffix[d] =
        FromFloat<T>(weights.suffix == 0.0f ? 0.0f : weights.suffix * g);
  }
  return sum;
}

void MergeAttnStatesBackward(const MergeAttnStatesBackwardParams& params,
                             ffi::ThreadPool& pool) {
  const int64_t head_dim = params.head_dim;
  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelFor(
        pool, params.num_tokens, params.num_heads * (2 * head_dim + 32),
        [&](int64_t token) {
          for (int64_t head = 0; head < params.num_heads; ++head) {
            const int64_t at = head * params.num_tokens + token;
            const int64_t start = (token * params.num_heads + head) * head_dim;
            const Weights weights =
                WeightsOf(params.prefix_lse[at], params.suffix_lse[at]);
            const float sum = GradientHead(
                static_cast<const T*>(params.grad_output) + start,
                static_cast<const T*>(params.prefix_output) + start,
                static_cast<const T*>(params.suffix_output) + start, weights,
                head_dim, static_cast<T*>(params.dprefix_output) + start,
                static_cast<T*>(params.dsuffix_output) + start);
            const float both = weights.prefix * weights.suffix;
            const float shift = both == 0.0f ? 0.0f : both * sum;
            const float lse = params.grad_lse == nullptr || weights.is_empty
                                  ? 0.0f
                                  : params.grad_lse[at];
            params.dprefix_lse[at] = shift + weights.prefix * lse;
            params.dsuffix_lse[at] = weights.suffix * lse - shift;
          }
        });
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(merge_attn_states_backward,
                    MergeAttnStatesBackwardBinding(),
                    MakeMergeAttnStatesBackwardParams, MergeAttnStatesBackward);

}  // namespace xla_ops
