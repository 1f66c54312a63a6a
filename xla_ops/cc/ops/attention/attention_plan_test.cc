// Tests what the library tells a caller to ask for: the number of splits and
// the bytes of the workspace.

#include "xla_ops/cc/ops/attention/attention_plan.h"

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_num_splits.h"

namespace xla_ops {
namespace {

XlaOpsAttentionRequest Request() {
  XlaOpsAttentionRequest request = {};
  request.struct_bytes = sizeof(request);
  request.num_tokens = 1;
  request.num_heads = 32;
  request.num_kv_heads = 8;
  request.head_dim = 128;
  request.max_num_seqs = 1;
  request.max_kv_len = 4096;
  return request;
}

struct Answer {
  std::string error;
  XlaOpsAttentionPlan plan;
};

Answer Ask(const XlaOpsAttentionRequest& request, bool can_split = true) {
  Answer answer = {"", {sizeof(XlaOpsAttentionPlan), -1, -1}};
  const char* error = MakeAttentionPlan(request, can_split, &answer.plan);
  if (error != nullptr) answer.error = error;
  return answer;
}

XLA_OPS_TEST(SplitsGrowAsTheRootOfTheLength) {
  EXPECT_EQ(ChooseDecodeSplits(8, 1024), 16);
  EXPECT_EQ(ChooseDecodeSplits(8, 4096), 32);
  EXPECT_EQ(ChooseDecodeSplits(8, 1000000), 64);
  EXPECT_EQ(ChooseDecodeSplits(1, 1000000), 64);
  // Pieces have at least 64 tokens.
  EXPECT_EQ(ChooseDecodeSplits(8, 127), 1);
  EXPECT_EQ(ChooseDecodeSplits(8, 128), 2);
  // At most 512 blocks.
  EXPECT_EQ(ChooseDecodeSplits(64, 4096), 8);
  EXPECT_EQ(ChooseDecodeSplits(256, 4096), 2);
  EXPECT_EQ(ChooseDecodeSplits(257, 4096), 1);
  EXPECT_EQ(ChooseDecodeSplits(512, 4096), 1);
  EXPECT_EQ(ChooseDecodeSplits(INT64_MAX, 4096), 1);
  EXPECT_EQ(ChooseDecodeSplits(0, 0), 1);
}

XLA_OPS_TEST(PrefillIsSplitWhereTilesLeaveMultiprocessorsIdle) {
  EXPECT_EQ(ChoosePrefillSplits(32, 32768), 4);
  EXPECT_EQ(ChoosePrefillSplits(33, 32768), 4);
  EXPECT_EQ(ChoosePrefillSplits(66, 32768), 2);
  EXPECT_EQ(ChoosePrefillSplits(1, 65536), 64);
  // No wave less, or not enough to pay for the combining kernel.
  EXPECT_EQ(ChoosePrefillSplits(132, 32768), 1);
  EXPECT_EQ(ChoosePrefillSplits(1024, 32768), 1);
  EXPECT_EQ(ChoosePrefillSplits(32, 256), 1);
  EXPECT_EQ(ChoosePrefillSplits(INT64_MAX, INT32_MAX), 1);
  EXPECT_EQ(ChoosePrefillSplits(0, 0), 1);
}

XLA_OPS_TEST(TilesAreThoseOfTheKernelOfTheCall) {
  const auto splits = [](int64_t tokens, int64_t heads, int64_t kv_heads,
                         int64_t seqs, int64_t length, int64_t head_dim) {
    XlaOpsAttentionRequest request = Request();
    request.num_tokens = tokens;
    request.num_heads = heads;
    request.num_kv_heads = kv_heads;
    request.head_dim = head_dim;
    request.max_num_seqs = seqs;
    request.max_kv_len = length;
    return ChooseNumSplits(request);
  };
  // 4096 packed rows are 32 tiles of 128, or 22 of 192.
  EXPECT_EQ(splits(512, 8, 1, 1, 32768, 128), 4);
  EXPECT_EQ(splits(512, 8, 1, 1, 32768, 64), ChoosePrefillSplits(22, 32768));
  // 64 tiles of each of 8 KV heads.
  EXPECT_EQ(splits(2048, 32, 8, 1, 32768, 128), 1);
  // Decode: a tile a sequence, with up to 16 rows in it.
  EXPECT_EQ(splits(8, 32, 8, 8, 4096, 128), ChooseDecodeSplits(64, 4096));
  EXPECT_EQ(splits(32, 32, 8, 8, 4096, 128), ChooseDecodeSplits(120, 4096));
  EXPECT_EQ(splits(64, 32, 8, 64, 4096, 128), 1);
  // Sizes that nothing holds.
  EXPECT_EQ(splits(INT64_MAX, 64, 1, 1, 4096, 128), 1);
  EXPECT_EQ(splits(1, 32, 8, INT64_MAX, 4096, 128), 1);
  EXPECT_EQ(splits(0, 0, 0, 0, 0, 128), 1);
}

XLA_OPS_TEST(ABoundThatGrowsSeldomChangesThePlan) {
  int changes = 0;
  for (int64_t length = 256; length < 16384; ++length) {
    changes +=
        ChooseDecodeSplits(2, length) != ChooseDecodeSplits(2, length + 1);
  }
  EXPECT_EQ(changes, 4);
}

XLA_OPS_TEST(TheLibraryChoosesAndSizesTheWorkspace) {
  const Answer answer = Ask(Request());
  EXPECT_EQ(answer.error, "");
  EXPECT_EQ(answer.plan.num_splits, 32);
  EXPECT_EQ(answer.plan.workspace_bytes, 128 + 32 * 32 * 130 * 4);
  EXPECT_EQ(answer.plan.workspace_bytes,
            AttentionWorkspaceBytes(1, 32, 128, 32));
}

XLA_OPS_TEST(SlotsAreForManySequencesThatDecode) {
  const auto slots = [](int64_t tokens, int64_t seqs, int64_t kv_heads,
                        int64_t length) {
    XlaOpsAttentionRequest request = Request();
    request.num_tokens = tokens;
    request.num_kv_heads = kv_heads;
    request.max_num_seqs = seqs;
    request.max_kv_len = length;
    const Answer answer = Ask(request);
    EXPECT_EQ(answer.error, "");
    const int64_t bytes =
        answer.plan.workspace_bytes -
        AttentionWorkspaceBytes(tokens, 32, 128, answer.plan.num_splits);
    return bytes == 0 ? 0 : bytes / AttentionSlotBytes(kv_heads, 128);
  };
  EXPECT_EQ(slots(64, 64, 8, 32768), 48);
  EXPECT_EQ(slots(1000, 1000, 8, 32768), 48);
  EXPECT_EQ(slots(64, 64, 32, 32768), 12);
  EXPECT_EQ(slots(200, 64, 8, 32768), 48);
  // Few are cut by shapes.
  EXPECT_EQ(slots(8, 8, 8, 32768), 0);
  EXPECT_EQ(slots(64, 64, 1, 32768), 0);
  // None is long.
  EXPECT_EQ(slots(64, 64, 8, 4095), 0);
  EXPECT_EQ(slots(64, 64, 8, 4096), 48);
  // Prefill, and prefill beside decode.
  EXPECT_EQ(slots(65536, 64, 8, 32768), 0);
  EXPECT_EQ(slots(4096, 64, 8, 32768), 0);
}

XLA_OPS_TEST(SlotsOfSizesThatNothingHolds) {
  XlaOpsAttentionRequest request = Request();
  request.num_tokens = 64;
  request.max_num_seqs = 64;
  request.max_kv_len = INT64_MAX;
  EXPECT_EQ(ChooseNumSlots(request), 48);
  request.num_kv_heads = 2000;
  EXPECT_EQ(ChooseNumSlots(request), 0);
  request.num_kv_heads = 0;
  EXPECT_EQ(ChooseNumSlots(request), 0);
  request.max_num_seqs = INT64_MAX;
  EXPECT_EQ(ChooseNumSlots(request), 0);
  request.max_num_seqs = 64;
  request.num_tokens = INT64_MAX;
  EXPECT_EQ(ChooseNumSlots(request), 0);
}

XLA_OPS_TEST(TheCallerMayChoose) {
  XlaOpsAttentionRequest request = Request();
  request.num_splits = 3;
  for (const bool can_split : {false, true}) {
    const Answer answer = Ask(request, can_split);
    EXPECT_EQ(answer.plan.num_splits, 3);
    EXPECT_EQ(answer.plan.workspace_bytes, 128 + 3 * 32 * 130 * 4);
  }
  request.num_splits = 1;
  EXPECT_EQ(Ask(request).plan.workspace_bytes, 128);
  // One may be the library's choice, which a caller hands back.
  request.num_tokens = 64;
  request.max_num_seqs = 64;
  request.max_kv_len = 32768;
  EXPECT_EQ(Ask(request).plan.workspace_bytes,
            128 + 48 * AttentionSlotBytes(8, 128));
  EXPECT_EQ(Ask(request, false).plan.workspace_bytes, 128);
  request.num_splits = 2;
  EXPECT_EQ(Ask(request).plan.workspace_bytes,
            AttentionWorkspaceBytes(64, 32, 128, 2));
}

XLA_OPS_TEST(TheCpuLibraryNeverSplits) {
  const XlaOpsAttentionRequest request = Request();
  XlaOpsAttentionPlan plan = {sizeof(plan), -1, -1};
  EXPECT_EQ(xla_ops_attention_plan(&request, &plan), nullptr);
  EXPECT_EQ(plan.num_splits, 1);
  EXPECT_EQ(plan.workspace_bytes, 128);
}

XLA_OPS_TEST(LaterStructsAreLarger) {
  XlaOpsAttentionRequest request = Request();
  request.struct_bytes += 8;
  EXPECT_EQ(Ask(request).error, "");
}

XLA_OPS_TEST(WrongRequestsAreRefused) {
  XlaOpsAttentionRequest request = Request();
  request.struct_bytes -= 8;
  EXPECT_EQ(Ask(request).error,
            "request.struct_bytes must be at least "
            "sizeof(XlaOpsAttentionRequest)");
  request = Request();
  request.num_splits = 1025;
  EXPECT_EQ(Ask(request).error, "num_splits must be from 0 to 1024");
  request.num_splits = -1;
  EXPECT_EQ(Ask(request).error, "num_splits must be from 0 to 1024");
  request = Request();
  request.max_kv_len = -1;
  EXPECT_EQ(Ask(request).error, "sizes must be at least 0");
  request = Request();
  request.num_tokens = int64_t{1} << 60;
  EXPECT_EQ(Ask(request).error, "the workspace must have less than 2^63 bytes");
  request = Request();
  XlaOpsAttentionPlan plan = {sizeof(plan) - 8, -1, -1};
  EXPECT_EQ(std::string(MakeAttentionPlan(request, true, &plan)),
            "plan.struct_bytes must be at least sizeof(XlaOpsAttentionPlan)");
  EXPECT_EQ(plan.num_splits, -1);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
