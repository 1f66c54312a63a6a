// The error texts of attention's gradient that are not attention's own, and
// that those come by the gradient's names.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_checks.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_testing.h"

namespace xla_ops::testing {
namespace {

BackwardBatch Good(Layout layout = Layout::kContiguous,
                   const char* kv_cache_dtype = "auto") {
  Shape shape;
  shape.dtype = DType::kF16;
  shape.layout = layout;
  shape.kv_cache_dtype = kv_cache_dtype;
  BackwardBatch b(shape, {{4, 9}, {3, 3}, {6, 20}});
  b.UseSinks();
  b.UseGradOfLse();
  b.Forward();
  return b;
}

template <typename Change>
void ExpectError(BackwardBatch b, const std::string& text,
                 const Change& change) {
  change(&b);
  ExpectInvalid(b.Run(), (b.batch.shape.paged() ? "paged_attention_backward: "
                                                : "flash_attn_varlen_"
                                                  "backward: ") +
                             text);
}

TestTensor Float32(std::vector<int64_t> dims) {
  return TestTensor(DType::kF32, std::move(dims));
}
TestTensor Float16(std::vector<int64_t> dims) {
  return TestTensor(DType::kF16, std::move(dims));
}

XLA_OPS_TEST(GoodOnesAreNone) {
  ExpectOk(Good().Run());
  ExpectOk(Good(Layout::kNhd).Run());
}

XLA_OPS_TEST(NamesAreTheGradients) {
  const auto no_query = [](BackwardBatch* b) { b->batch.query = Float16({4}); };
  ExpectError(Good(),
              "q must have shape [num_tokens, num_heads, head_dim], got [4]",
              no_query);
  ExpectError(
      Good(Layout::kNhd),
      "query must have shape [num_tokens, num_heads, head_dim], got [4]",
      no_query);
  ExpectError(Good(Layout::kNhd), "context_lens must be int32, got float32",
              [](BackwardBatch* b) { b->batch.seqused_k = Float32({3}); });
}

XLA_OPS_TEST(WantsErrors) {
  const auto want = [](BackwardBatch* b) { b->wants_dkv = true; };
  ExpectError(Good(Layout::kNhd),
              "wants_dkv must be false with block_tables, got true", want);
  ExpectError(Good(Layout::kContiguous, "fp8"),
              "wants_dkv must be false with kv_cache_dtype fp8, got true",
              want);
  ExpectError(Good(), "wants_dsinks must be false without sinks, got true",
              [](BackwardBatch* b) { b->batch.sinks = Float32({0}); });
  const std::string rule =
      " must have no element where it is not wanted, got shape ";
  const auto keep = [](bool BackwardBatch::* wants) {
    return [wants](BackwardBatch* b) {
      b->*wants = false;
      b->keep_unwanted = true;
    };
  };
  ExpectError(Good(), "dq" + rule + "[13, 4, 16]",
              keep(&BackwardBatch::wants_dq));
  ExpectError(Good(), "dk" + rule + "[32, 2, 16]",
              keep(&BackwardBatch::wants_dkv));
  ExpectError(Good(), "dsinks" + rule + "[4]",
              keep(&BackwardBatch::wants_dsinks));
}

XLA_OPS_TEST(OperandErrors) {
  ExpectError(Good(), "grad_out must have shape [13, 4, 16], got [13, 64]",
              [](BackwardBatch* b) { b->grad_out = Float16({13, 64}); });
  ExpectError(Good(), "grad_out must be float16, got float32",
              [](BackwardBatch* b) { b->grad_out = Float32({13, 4, 16}); });
  ExpectError(Good(), "out must have shape [13, 4, 16], got [4, 13, 16]",
              [](BackwardBatch* b) { b->batch.out = Float16({4, 13, 16}); });
  ExpectError(Good(), "lse must be float32, got float16",
              [](BackwardBatch* b) { b->batch.lse = Float16({4, 13}); });
  ExpectError(Good(), "lse must have shape [4, 13], got [13, 4]",
              [](BackwardBatch* b) { b->batch.lse = Float32({13, 4}); });
  ExpectError(Good(), "grad_lse must be float32, got float16",
              [](BackwardBatch* b) { b->grad_lse = Float16({4, 13}); });
  ExpectError(Good(), "grad_lse must have shape [4, 13], got [13, 4]",
              [](BackwardBatch* b) { b->grad_lse = Float32({13, 4}); });
}

XLA_OPS_TEST(ResultErrors) {
  ExpectError(Good(), "dq must have shape [13, 4, 16], got [13, 64]",
              [](BackwardBatch* b) { b->dq = Float16({13, 64}); });
  ExpectError(Good(), "dk must be float16, got float32",
              [](BackwardBatch* b) { b->dk = Float32({32, 2, 16}); });
  ExpectError(Good(), "dv must have shape [32, 2, 16], got [32, 4, 16]",
              [](BackwardBatch* b) { b->dv = Float16({32, 4, 16}); });
  ExpectError(Good(), "dsinks must be float32, got float16",
              [](BackwardBatch* b) { b->dsinks = Float16({4}); });
  ExpectError(Good(), "dsinks must have shape [4], got [2]",
              [](BackwardBatch* b) { b->dsinks = Float32({2}); });
  ExpectError(Good(), "workspace must be uint8, got float32",
              [](BackwardBatch* b) { b->workspace = Float32({64}); });
}

// Checked by CUDA handlers alone, so on parameters as they would bind them.
XLA_OPS_TEST(CudaLimits) {
  AttentionBackwardParams params = {};
  params.batch.num_tokens = 100;
  params.batch.num_heads = 4;
  params.batch.num_kv_heads = 2;
  params.batch.head_dim = 64;
  params.batch.max_num_seqs = 3;
  const int64_t bytes = AttentionBackwardWorkspaceBytes(100, 4, 64, 3);
  params.workspace_bytes = bytes;
  const AttentionNames& names = kPagedAttentionBackwardNames;
  EXPECT_TRUE(CheckCudaLimits(names, params).success());
  params.workspace_bytes = bytes - 1;
  EXPECT_EQ(CheckCudaLimits(names, params).message(),
            "paged_attention_backward: workspace must have at least " +
                std::to_string(bytes) + " elements, got " +
                std::to_string(bytes - 1));
  params.batch.num_tokens = int64_t{1} << 31;
  EXPECT_EQ(CheckCudaLimits(names, params).message(),
            "paged_attention_backward: query must have at most 2147483647 rows "
            "(token, head), got 8589934592");
}

}  // namespace
}  // namespace xla_ops::testing

XLA_OPS_TEST_MAIN()
