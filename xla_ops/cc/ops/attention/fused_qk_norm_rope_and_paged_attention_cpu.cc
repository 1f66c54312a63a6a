// The CPU handler of fused_qk_norm_rope_and_paged_attention: one after the
// other.

#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/ops/attention/attention_cpu.h"
#include "xla_ops/cc/ops/attention/fused_qk_norm_rope_and_paged_attention.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_cpu.h"

namespace xla_ops {
namespace {

ffi::Error WriteAndAttend(const PreparedAttentionParams& params,
                          ffi::ThreadPool& pool) {
  FusedQkNormRopeAndCache(params.write, pool);
  return Attention(params.read, pool);
}

}  // namespace

XLA_OPS_CPU_HANDLER(fused_qk_norm_rope_and_paged_attention,
                    PreparedAttentionBinding(), MakePreparedAttentionParams,
                    WriteAndAttend);

}  // namespace xla_ops
