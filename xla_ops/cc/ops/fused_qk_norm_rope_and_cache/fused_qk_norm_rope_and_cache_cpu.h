// The CPU kernel of fused_qk_norm_rope_and_cache, for its handlers and that of
// fused_qk_norm_rope_and_paged_attention.

#ifndef XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_CPU_H_
#define XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_CPU_H_

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"

namespace xla_ops {

// `copies` first, then all of the contract in the header of the parameters.
void FusedQkNormRopeAndCache(const FusedQkNormRopeAndCacheParams& params,
                             ffi::ThreadPool& pool);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_FUSED_QK_NORM_ROPE_AND_CACHE_FUSED_QK_NORM_ROPE_AND_CACHE_CPU_H_
