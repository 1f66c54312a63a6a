// Tests what the library tells a caller to ask for: the bytes of the workspace.

#include "xla_ops/cc/ops/attention_backward/attention_backward_plan.h"

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_workspace.h"

namespace xla_ops {
namespace {

XlaOpsAttentionBackwardRequest Request() {
  return {sizeof(XlaOpsAttentionBackwardRequest), 100, 4, 2, 64, 3};
}

struct Answer {
  std::string error;
  int64_t bytes;
};

Answer Ask(const XlaOpsAttentionBackwardRequest& request,
           bool uses_workspace = true) {
  XlaOpsAttentionBackwardPlan plan = {sizeof(plan), -1};
  const char* error = MakeAttentionBackwardPlan(request, uses_workspace, &plan);
  return {error == nullptr ? "" : error, plan.workspace_bytes};
}

XLA_OPS_TEST(Bytes) {
  // No more than 0 + 3 + 2 tiles of 128 rows.
  const int64_t rows = 4 * 5 * 128;
  const int64_t wanted = 256 + 256 + 2 * 4 * rows + 4 * 64 * rows;
  EXPECT_EQ(AttentionBackwardWorkspaceBytes(100, 4, 64, 3), wanted);
  EXPECT_EQ(Ask(Request()).bytes, wanted);
  EXPECT_EQ(AttentionBackwardWorkspaceBytes(0, 0, 64, 0), 512);
}

XLA_OPS_TEST(TheCpuTakesNone) {
  EXPECT_EQ(Ask(Request(), false).bytes, 0);
  XlaOpsAttentionBackwardPlan plan = {sizeof(plan), -1};
  const XlaOpsAttentionBackwardRequest request = Request();
  EXPECT_TRUE(xla_ops_attention_backward_plan(&request, &plan) == nullptr);
  EXPECT_EQ(plan.workspace_bytes, 0);
}

XLA_OPS_TEST(Errors) {
  XlaOpsAttentionBackwardRequest request = Request();
  request.struct_bytes -= 1;
  EXPECT_EQ(Ask(request).error,
            "request.struct_bytes must be at least "
            "sizeof(XlaOpsAttentionBackwardRequest)");
  request = Request();
  XlaOpsAttentionBackwardPlan plan = {8, -1};
  EXPECT_EQ(std::string(MakeAttentionBackwardPlan(request, true, &plan)),
            "plan.struct_bytes must be at least "
            "sizeof(XlaOpsAttentionBackwardPlan)");
  request.num_heads = -1;
  EXPECT_EQ(Ask(request).error, "sizes must be at least 0");
  request = Request();
  request.num_tokens = int64_t{1} << 60;
  EXPECT_EQ(Ask(request).error, "the workspace must have less than 2^63 bytes");
  request = Request();
  request.max_num_seqs = INT64_MAX;
  EXPECT_EQ(Ask(request).error, "the workspace must have less than 2^63 bytes");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
