// The size of the workspace, with no overflow left unsaid.

#include <cstdint>
#include <initializer_list>

#include "xla_ops/cc/ops/attention_backward/attention_backward.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_plan.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_workspace.h"

namespace xla_ops {

const char* MakeAttentionBackwardPlan(
    const XlaOpsAttentionBackwardRequest& request, bool uses_workspace,
    XlaOpsAttentionBackwardPlan* plan) {
  if (request.struct_bytes <
      static_cast<int64_t>(sizeof(XlaOpsAttentionBackwardRequest))) {
    return "request.struct_bytes must be at least "
           "sizeof(XlaOpsAttentionBackwardRequest)";
  }
  if (plan->struct_bytes <
      static_cast<int64_t>(sizeof(XlaOpsAttentionBackwardPlan))) {
    return "plan.struct_bytes must be at least "
           "sizeof(XlaOpsAttentionBackwardPlan)";
  }
  for (const int64_t size :
       {request.num_tokens, request.num_heads, request.num_kv_heads,
        request.head_dim, request.max_num_seqs}) {
    if (size < 0) return "sizes must be at least 0";
  }
  if (!uses_workspace) {
    plan->workspace_bytes = 0;
    return nullptr;
  }
  // An upper bound of what AttentionBackwardWorkspaceBytes computes.
  int64_t rows;
  int64_t bytes = 4 * (BackwardPaddedHeadDim(request.head_dim) + 4);
  if (__builtin_add_overflow(request.max_num_seqs, 8, &rows) ||
      __builtin_mul_overflow(rows, kBackwardTileRows, &rows) ||
      __builtin_add_overflow(rows, request.num_tokens, &rows) ||
      __builtin_mul_overflow(rows, request.num_heads + 1, &rows) ||
      __builtin_mul_overflow(rows, bytes, &bytes)) {
    return "the workspace must have less than 2^63 bytes";
  }
  plan->workspace_bytes =
      AttentionBackwardWorkspaceBytes(request.num_tokens, request.num_heads,
                                      request.head_dim, request.max_num_seqs);
  return nullptr;
}

}  // namespace xla_ops
