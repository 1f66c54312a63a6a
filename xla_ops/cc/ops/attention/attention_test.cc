// xla_ops.paged_attention's CPU handler on hand-built frames: ragged batches
// in every paged layout against attention in double, tables out of range,
// empty operands, threads, guard bytes, debug reports. Features are tested
// by attention_features_test.cc, error texts by attention_errors_test.cc.

#include "xla_ops/cc/ops/attention/attention.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention/attention_testing.h"

extern "C" XlaOpsHandlersFn xla_ops_handlers;

namespace xla_ops::testing {
namespace {

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
constexpr double kLowest = std::numeric_limits<int32_t>::min();
constexpr double kHighest = std::numeric_limits<int32_t>::max();

// Of every row: nothing seen.
void ExpectEmpty(const Batch& batch) {
  for (int64_t i = 0; i < batch.out.size(); ++i) {
    EXPECT_EQ(batch.out.Get(i), 0.0);
  }
  for (int64_t i = 0; i < batch.lse.size(); ++i) {
    EXPECT_EQ(batch.lse.Get(i), std::numeric_limits<double>::infinity());
  }
}

XLA_OPS_TEST(MixedBatchesInEveryPagedLayout) {
  for (const DType dtype : kDTypes) {
    for (const Layout layout : {Layout::kNhd, Layout::kHnd, Layout::kStacked}) {
      for (const int64_t page_size : {1, 3, 16, 64}) {
        Shape shape;
        shape.dtype = dtype;
        shape.layout = layout;
        shape.page_size = page_size;
        ExpectRight(Batch(shape, Mixed(), 3, 2));
      }
    }
  }
}

XLA_OPS_TEST(HeadsAndHeadDims) {
  for (const auto& [heads, kv_heads] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 1}, {3, 3}, {6, 2}, {8, 1}, {5, 1}}) {
    for (const int64_t head_dim : {8, 24, 64, 72, 128, 256}) {
      Shape shape;
      shape.dtype = head_dim % 16 ? DType::kF32 : DType::kBF16;
      shape.num_heads = heads;
      shape.num_kv_heads = kv_heads;
      shape.head_dim = head_dim;
      ExpectRight(Batch(shape, {{1, 33}, {18, 40}}));
    }
  }
}

XLA_OPS_TEST(LongSequences) {
  Shape shape;
  shape.page_size = 16;
  Batch batch(shape, {{1, 3000}, {40, 1000}});
  ExpectRight(batch);
  batch.window_left = 99;
  ExpectRight(batch);
}

XLA_OPS_TEST(MissingBlocksMaskTheirTokens) {
  for (const double bad : {-1.0, 1e9, kLowest, kHighest}) {
    Batch batch(Shape(), Mixed());
    batch.block_table.Set(2 * batch.max_blocks + 3, bad);
    batch.block_table.Set(1 * batch.max_blocks, bad);
    for (int64_t page = 0; page < batch.max_blocks; ++page) {
      batch.block_table.Set(page, bad);  // sequence 0 sees nothing at all
    }
    ExpectOk(batch.Run());
    batch.ExpectResult();
    for (int64_t i = 0; i < 4 * 16; ++i) EXPECT_EQ(batch.out.Get(i), 0.0);
  }
}

XLA_OPS_TEST(WildTablesAreClamped) {
  const std::vector<Seq> seqs = {{4, 9}, {3, 3}, {6, 20}};
  // cu_seqlens_q: negative, descending, past the end.
  for (const std::vector<double>& starts :
       {std::vector<double>{-5, 3, 2, 10},
        {2, 2, 40, 30},
        {kHighest, kLowest, 5, kHighest},
        {kLowest, kLowest, kLowest, kLowest},
        {20, 10, 5, 0},
        {0, kHighest, 3, 4}}) {
    Batch batch(Shape(), seqs, 2);
    for (int i = 0; i < 4; ++i) batch.cu_seqlens_q.Set(i, starts[i]);
    ExpectRight(batch);
  }
  for (const double count : {kLowest, -1.0, 0.0, 1.0, 2.0, 9.0, kHighest}) {
    Batch batch(Shape(), seqs, 2);
    batch.num_seqs.Set(0, count);
    ExpectRight(batch);
  }
  for (const double kv_len : {kLowest, -1.0, 0.0}) {
    Batch batch(Shape(), seqs, 2);
    batch.seqused_k.Set(1, kv_len);
    ExpectRight(batch);
  }
  // Past the table's end: clamped to it. Its last page is not a block.
  Batch batch(Shape(), seqs, 2);
  batch.seqused_k.Set(2, kHighest);
  ExpectRight(batch);
}

XLA_OPS_TEST(EmptyOperands) {
  // No sequence at all.
  Batch none(Shape(), {}, 5);
  ExpectOk(none.Run());
  ExpectEmpty(none);
  ExpectRight(Batch(Shape(), {{0, 4}}));  // no token
  // A cache without blocks, a table without pages, pages without room.
  Batch no_blocks(Shape(), {{4, 9}});
  no_blocks.num_blocks = 0;
  ExpectOk(no_blocks.Run());
  ExpectEmpty(no_blocks);
  Batch no_pages(Shape(), {{4, 9}});
  no_pages.block_table = TestTensor(DType::kS32, {1, 0});
  ExpectOk(no_pages.Run());
  ExpectEmpty(no_pages);
  Batch no_room(Shape(), {{4, 9}});
  no_room.shape.page_size = 0;
  ExpectOk(no_room.Run());
  ExpectEmpty(no_room);
  Shape no_heads;
  no_heads.num_heads = 0;
  ExpectRight(Batch(no_heads, {{4, 9}}));
  no_heads.num_kv_heads = 0;
  ExpectRight(Batch(no_heads, {{4, 9}}));
}

XLA_OPS_TEST(NanInOneTokenStaysInRowsThatSeeIt) {
  Shape shape;
  Batch batch(shape, {{6, 6}});
  // Token 3 is seen by rows 3, 4 and 5.
  batch.value.Set(batch.TokenAt(0, 3), NAN);
  ExpectOk(batch.Run());
  const int64_t row = shape.num_heads * shape.head_dim;
  for (int64_t i = 0; i < 3 * row; ++i) {
    EXPECT_TRUE(std::isfinite(batch.out.Get(i)));
  }
  for (int64_t i = 3; i < 6; ++i) {
    EXPECT_TRUE(std::isnan(batch.out.Get(i * row)));
  }
}

XLA_OPS_TEST(LargeLogitsDoNotOverflow) {
  Batch batch(Shape(), {{3, 40}});
  for (int64_t i = 0; i < batch.query.size(); ++i) {
    batch.query.Set(i, 1000 * batch.query.Get(i));
  }
  ExpectOk(batch.Run());
  for (int64_t i = 0; i < batch.out.size(); ++i) {
    EXPECT_TRUE(std::abs(batch.out.Get(i)) < 10);
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Shape shape;
  shape.page_size = 16;
  shape.dtype = DType::kBF16;
  Batch alone(shape, {{100, 200}, {1, 300}, {64, 64}}, 3);
  Batch together = alone;
  ExpectOk(alone.Run());
  TestThreads threads(4);
  ExpectOk(together.Run(&threads));
  EXPECT_TRUE(alone.out.bytes() == together.out.bytes());
  EXPECT_TRUE(alone.lse.bytes() == together.lse.bytes());
  together.ExpectResult();
}

XLA_OPS_TEST(SplitsNeedAWorkspaceAndChangeNothing) {
  Batch batch(Shape(), Mixed());
  batch.num_splits = 3;
  const int64_t bytes = AttentionWorkspaceBytes(batch.num_tokens, 4, 16, 3);
  batch.workspace = TestTensor(DType::kU8, {bytes});
  ExpectRight(batch);
  batch.workspace = TestTensor(DType::kU8, {bytes - 1});
  ExpectInvalid(batch.Run(), "paged_attention: workspace must have at least " +
                                 std::to_string(bytes) + " elements, got " +
                                 std::to_string(bytes - 1));
}

// What a run in debug mode writes to stderr.
std::string Report(Batch* batch) {
  batch->debug = true;
  std::FILE* file = std::tmpfile();
  std::fflush(stderr);
  const int saved = dup(STDERR_FILENO);
  dup2(fileno(file), STDERR_FILENO);
  const CallStatus status = batch->Run();
  std::fflush(stderr);
  dup2(saved, STDERR_FILENO);
  close(saved);
  ExpectOk(status);
  std::rewind(file);
  char text[2048];
  const size_t size = std::fread(text, 1, sizeof(text), file);
  std::fclose(file);
  return std::string(text, size);
}

XLA_OPS_TEST(DebugReportsWhatIsMaskedAndClamped) {
  Batch right(Shape(), Mixed(), 1, 1);
  EXPECT_EQ(Report(&right), "");

  Batch masked(Shape(), {{1, 9}});
  masked.block_table.Set(1, 99);
  EXPECT_EQ(Report(&masked),
            "xla_ops: paged_attention: block_tables[0, 1] must be from 0 to "
            "4, got 99; masked\n");

  Batch paged(Shape(), {{2, 9}, {2, 2}});
  paged.num_seqs.Set(0, 3);
  paged.cu_seqlens_q.Set(1, 5);
  paged.cu_seqlens_q.Set(2, 3);
  paged.seqused_k.Set(0, -7);
  EXPECT_EQ(Report(&paged),
            "xla_ops: paged_attention: num_seqs[0] must be from 0 to 2, got "
            "3; clamped\n"
            "xla_ops: paged_attention: query_start_loc[1] must be from 0 to "
            "4, got 5; clamped\n"
            "xla_ops: paged_attention: context_lens[0] must be from 0 to 16, "
            "got -7; clamped\n"
            "xla_ops: paged_attention: query_start_loc[2] must be from 4 to "
            "4, got 3; clamped\n");

  Shape shape;
  shape.layout = Layout::kContiguous;
  shape.leftpad = 1;
  shape.slack = 1;
  Batch rows(shape, {{2, 9}, {2, 2}});  // 15 rows
  rows.cu_seqlens_k.Set(0, -1);
  rows.cu_seqlens_k.Set(2, 16);
  rows.leftpad_k.Set(0, -1);
  rows.seqused_k.Set(1, 5);
  EXPECT_EQ(Report(&rows),
            "xla_ops: flash_attn_varlen: cu_seqlens_k[0] must be from 0 to "
            "15, got -1; clamped\n"
            "xla_ops: flash_attn_varlen: leftpad_k[0] must be from 0 to 10, "
            "got -1; clamped\n"
            "xla_ops: flash_attn_varlen: cu_seqlens_k[2] must be from 11 to "
            "15, got 16; clamped\n"
            "xla_ops: flash_attn_varlen: seqused_k[1] must be from 0 to 4, "
            "got 5; clamped\n");

  // The first few say enough.
  Shape small;
  small.page_size = 1;
  Batch many(small, {{1, 100}});
  many.block_table.Fill(-1);
  const std::string text = Report(&many);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 8);
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 3u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.flash_attn_varlen");
  EXPECT_EQ(std::string(handlers[1].target), "xla_ops.paged_attention");
  EXPECT_EQ(std::string(handlers[0].platform), "Host");
  EXPECT_EQ(std::string(handlers[1].platform), "Host");
  EXPECT_TRUE(handlers[0].bundle.execute == xla_ops_flash_attn_varlen_cpu);
  EXPECT_TRUE(handlers[1].bundle.execute == xla_ops_paged_attention_cpu);
  EXPECT_EQ(std::string(handlers[2].target),
            "xla_ops.fused_qk_norm_rope_and_paged_attention");
}

}  // namespace
}  // namespace xla_ops::testing

XLA_OPS_TEST_MAIN()
