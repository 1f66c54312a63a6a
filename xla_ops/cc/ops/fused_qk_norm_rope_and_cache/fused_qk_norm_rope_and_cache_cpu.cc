// The CPU handlers of the fused_qk_norm_rope_and_cache targets.

#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_cpu.h"

#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_checks.h"

namespace xla_ops {

XLA_OPS_CPU_HANDLER(fused_qk_norm_rope_and_cache,
                    FusedQkNormRopeAndCacheBinding(),
                    MakeFusedQkNormRopeAndCacheParams, FusedQkNormRopeAndCache);
XLA_OPS_CPU_HANDLER(fused_qk_norm_rope_and_cache_stacked,
                    FusedQkNormRopeAndCacheStackedBinding(),
                    MakeFusedQkNormRopeAndCacheStackedParams,
                    FusedQkNormRopeAndCache);

}  // namespace xla_ops
