// xla_ops.paged_attention's CPU handler on hand-built frames: ragged batches
// in every layout against attention in double, every error text, guard
// bytes. Cache elements that no row may see are NaN, so that a kernel that
// reads one and lets it count is found out.

#include "xla_ops/cc/ops/attention/attention.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_attention_cpu(XLA_FFI_CallFrame*);
extern "C" XlaOpsHandlersFn xla_ops_handlers;

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

// A sequence: new query tokens, and KV tokens with the new ones included.
struct Seq {
  int64_t num_rows;
  int64_t context;
};

enum class Layout { kNhd, kHnd, kStacked };

struct Shape {
  DType dtype = DType::kF32;
  int64_t num_heads = 4;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 16;
  int64_t page_size = 4;
  Layout layout = Layout::kNhd;
  int64_t sliding_window = 0;
  float soft_cap = 0;
};

// A batch with all its operands, which tests may alter before Run.
struct Batch {
  Batch(const Shape& shape, std::vector<Seq> seqs, int64_t padding_rows = 0,
        int64_t padding_seqs = 0, uint32_t seed = 1);

  CallStatus Run(TaskRunner* threads = nullptr);
  void ExpectResult() const;
  // Where token j of sequence s lies in a cache buffer; -1: nowhere.
  int64_t TokenAt(int64_t s, int64_t j) const;

  Shape shape;
  int64_t num_tokens;
  int64_t max_num_seqs;
  int64_t max_blocks;
  int64_t num_blocks;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t key_offset = 0;
  int64_t value_offset = 0;
  float scale;
  int64_t num_splits = 1;
  bool debug = false;
  TestTensor query, key_cache, value_cache;
  TestTensor context_lens, block_tables, query_start_loc, num_seqs;
  TestTensor out, workspace;

 private:
  static int64_t Rows(const std::vector<Seq>& seqs);
  static int64_t Pages(const Shape& shape, const std::vector<Seq>& seqs,
                       bool longest);
  static std::vector<int64_t> CacheDims(const Shape& shape, int64_t num_blocks);
};

int64_t Batch::Rows(const std::vector<Seq>& seqs) {
  int64_t rows = 0;
  for (const Seq& seq : seqs) rows += seq.num_rows;
  return rows;
}

int64_t Batch::Pages(const Shape& shape, const std::vector<Seq>& seqs,
                     bool longest) {
  int64_t sum = 0;
  int64_t max = 0;
  for (const Seq& seq : seqs) {
    const int64_t pages = (seq.context + shape.page_size - 1) / shape.page_size;
    sum += pages;
    max = std::max(max, pages);
  }
  return longest ? max : sum;
}

std::vector<int64_t> Batch::CacheDims(const Shape& shape, int64_t num_blocks) {
  std::vector<int64_t> dims = {num_blocks, shape.page_size, shape.num_kv_heads,
                               shape.head_dim};
  if (shape.layout == Layout::kHnd) std::swap(dims[1], dims[2]);
  if (shape.layout == Layout::kStacked) dims.insert(dims.begin(), 2);
  return dims;
}

Batch::Batch(const Shape& shape_in, std::vector<Seq> seqs, int64_t padding_rows,
             int64_t padding_seqs, uint32_t seed)
    : shape(shape_in),
      num_tokens(Rows(seqs) + padding_rows),
      max_num_seqs(static_cast<int64_t>(seqs.size()) + padding_seqs),
      max_blocks(Pages(shape, seqs, true) + 1),
      num_blocks(Pages(shape, seqs, false) + 2),
      scale(1 / std::sqrt(static_cast<float>(shape.head_dim))),
      query(shape.dtype, {num_tokens, shape.num_heads, shape.head_dim}),
      key_cache(shape.dtype, CacheDims(shape, num_blocks)),
      value_cache(shape.layout == Layout::kStacked
                      ? TestTensor(shape.dtype, {0})
                      : key_cache),
      context_lens(DType::kS32, {max_num_seqs}),
      block_tables(DType::kS32, {max_num_seqs, max_blocks}),
      query_start_loc(DType::kS32, {max_num_seqs + 1}),
      num_seqs(DType::kS32, {1}, {static_cast<double>(seqs.size())}),
      out(query),
      workspace(DType::kU8, {0}) {
  const bool hnd = shape.layout == Layout::kHnd;
  page_stride = shape.head_dim * (hnd ? 1 : shape.num_kv_heads);
  head_stride = shape.head_dim * (hnd ? shape.page_size : 1);
  block_stride = shape.page_size * shape.num_kv_heads * shape.head_dim;
  if (shape.layout == Layout::kStacked) {
    value_offset = num_blocks * block_stride;
  }

  std::mt19937 random(seed);
  query.FillRandom(&random, 2.0);
  std::vector<int64_t> blocks(num_blocks);
  for (int64_t i = 0; i < num_blocks; ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random);
  std::normal_distribution<double> normal;
  int64_t next_block = 0;
  query_start_loc.Fill(static_cast<double>(Rows(seqs)));
  query_start_loc.Set(0, 0);
  for (size_t s = 0; s < seqs.size(); ++s) {
    query_start_loc.Set(
        s + 1, query_start_loc.Get(s) + static_cast<double>(seqs[s].num_rows));
    context_lens.Set(s, static_cast<double>(seqs[s].context));
    for (int64_t j = 0; j < seqs[s].context; ++j) {
      if (j % shape.page_size == 0) {
        block_tables.Set(s * max_blocks + j / shape.page_size,
                         static_cast<double>(blocks[next_block++]));
      }
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
        for (int64_t d = 0; d < shape.head_dim; ++d) {
          const int64_t at = TokenAt(s, j) + h * head_stride + d;
          key_cache.Set(key_offset + at, normal(random));
          (shape.layout == Layout::kStacked ? key_cache : value_cache)
              .Set(value_offset + at, normal(random));
        }
      }
    }
  }
}

int64_t Batch::TokenAt(int64_t s, int64_t j) const {
  const double block = block_tables.Get(s * max_blocks + j / shape.page_size);
  if (block < 0 || block >= static_cast<double>(num_blocks)) return -1;
  return static_cast<int64_t>(block) * block_stride +
         j % shape.page_size * page_stride;
}

CallStatus Batch::Run(TaskRunner* threads) {
  const bool stacked = shape.layout == Layout::kStacked;
  CallFrame frame;
  AddArgs(&frame, {&query, &key_cache, stacked ? &key_cache : &value_cache,
                   &context_lens, &block_tables, &query_start_loc, &num_seqs});
  AddResults(&frame, {&out, &workspace});
  frame.AddAttr("scale", scale)
      .AddAttr("sliding_window", shape.sliding_window)
      .AddAttr("soft_cap", shape.soft_cap)
      .AddAttr("num_splits", num_splits)
      .AddAttr("num_kv_heads", shape.num_kv_heads)
      .AddAttr("num_blocks", num_blocks)
      .AddAttr("page_size", shape.page_size)
      .AddAttr("block_stride", block_stride)
      .AddAttr("page_stride", page_stride)
      .AddAttr("head_stride", head_stride)
      .AddAttr("key_offset", key_offset)
      .AddAttr("value_offset", value_offset)
      .AddAttr("debug", debug)
      .SetTaskRunner(threads);
  return frame.Call(xla_ops_attention_cpu);
}

// The definition in double, row by row, from the operands as they are now.
void Batch::ExpectResult() const {
  out.ExpectGuardsIntact();
  const TestTensor& values =
      shape.layout == Layout::kStacked ? key_cache : value_cache;
  const auto clamp = [](double x, double low, double high) {
    return static_cast<int64_t>(std::min(std::max(x, low), high));
  };
  const int64_t seqs = clamp(num_seqs.Get(0), 0, max_num_seqs);
  std::vector<double> want(query.size(), 0.0);
  int64_t begin = clamp(query_start_loc.Get(0), 0, num_tokens);
  for (int64_t s = 0; s < seqs; ++s) {
    const int64_t end = clamp(query_start_loc.Get(s + 1),
                              static_cast<double>(begin), num_tokens);
    const int64_t context =
        clamp(context_lens.Get(s), 0, max_blocks * shape.page_size);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t position = row - begin + context - (end - begin);
      for (int64_t h = 0; h < shape.num_heads; ++h) {
        const int64_t head =
            h / (shape.num_heads / shape.num_kv_heads) * head_stride;
        const int64_t at = (row * shape.num_heads + h) * shape.head_dim;
        std::vector<std::pair<int64_t, double>> seen;  // address, logit
        double max = -std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j <= position && j < context; ++j) {
          if (shape.sliding_window && j <= position - shape.sliding_window) {
            continue;
          }
          if (TokenAt(s, j) < 0) continue;
          double logit = 0;
          for (int64_t d = 0; d < shape.head_dim; ++d) {
            logit += query.Get(at + d) *
                     key_cache.Get(key_offset + TokenAt(s, j) + head + d);
          }
          logit *= scale;
          if (shape.soft_cap > 0) {
            logit = shape.soft_cap * std::tanh(logit / shape.soft_cap);
          }
          max = std::max(max, logit);
          seen.emplace_back(TokenAt(s, j) + head, logit);
        }
        double sum = 0;
        for (const auto& [address, logit] : seen) {
          sum += std::exp(logit - max);
          for (int64_t d = 0; d < shape.head_dim; ++d) {
            want[at + d] +=
                std::exp(logit - max) * values.Get(value_offset + address + d);
          }
        }
        for (int64_t d = 0; d < shape.head_dim && sum > 0; ++d) {
          want[at + d] /= sum;
        }
      }
    }
    begin = end;
  }
  const double step = shape.dtype == DType::kF32   ? 0
                      : shape.dtype == DType::kF16 ? std::ldexp(1.0, -11)
                                                   : std::ldexp(1.0, -8);
  for (int64_t i = 0; i < out.size(); ++i) {
    // Values are of order 1: fp32 accumulation, then one rounding. The
    // comparison fails for NaN.
    EXPECT_TRUE(std::abs(out.Get(i) - want[i]) <=
                2e-5 + step * std::abs(want[i]));
  }
}

void ExpectRight(Batch batch) {
  ExpectOk(batch.Run());
  batch.ExpectResult();
}

// Decode, whole prefill, chunked prefill, one token, an empty query, and a
// context shorter than its query, whose first rows see nothing.
std::vector<Seq> Mixed() {
  return {{1, 37}, {23, 23}, {9, 50}, {1, 1}, {0, 12}, {5, 3}, {2, 0}};
}

XLA_OPS_TEST(MixedBatchesInEveryLayout) {
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

XLA_OPS_TEST(WindowsAndSoftCaps) {
  for (const int64_t window :
       {int64_t{1}, int64_t{2}, int64_t{5}, int64_t{32}, int64_t{1000},
        std::numeric_limits<int64_t>::max()}) {
    for (const float soft_cap : {0.0f, 0.5f, 30.0f}) {
      Shape shape;
      shape.sliding_window = window;
      shape.soft_cap = soft_cap;
      ExpectRight(Batch(shape, Mixed(), 1, 1));
    }
  }
}

XLA_OPS_TEST(LongContext) {
  Shape shape;
  shape.page_size = 16;
  ExpectRight(Batch(shape, {{1, 3000}, {40, 1000}}));
  shape.sliding_window = 100;
  ExpectRight(Batch(shape, {{1, 3000}, {40, 1000}}));
}

XLA_OPS_TEST(MissingBlocksMaskTheirTokens) {
  for (const double bad : {-1.0, 1e9, -2147483648.0, 2147483647.0}) {
    Shape shape;
    Batch batch(shape, Mixed());
    batch.block_tables.Set(2 * batch.max_blocks + 3, bad);
    batch.block_tables.Set(1 * batch.max_blocks, bad);
    for (int64_t page = 0; page < batch.max_blocks; ++page) {
      batch.block_tables.Set(page, bad);  // sequence 0 sees nothing at all
    }
    ExpectOk(batch.Run());
    batch.ExpectResult();
    for (int64_t i = 0; i < 4 * 16; ++i) EXPECT_EQ(batch.out.Get(i), 0.0);
  }
}

XLA_OPS_TEST(WildTablesAreClamped) {
  const double lowest = std::numeric_limits<int32_t>::min();
  const double highest = std::numeric_limits<int32_t>::max();
  Shape shape;
  // query_start_loc: negative, descending, past the end.
  for (const std::vector<double>& starts : {std::vector<double>{-5, 3, 2, 10},
                                            {2, 2, 40, 30},
                                            {highest, lowest, 5, highest},
                                            {lowest, lowest, lowest, lowest},
                                            {20, 10, 5, 0},
                                            {0, highest, 3, 4}}) {
    Batch batch(shape, {{4, 9}, {3, 3}, {6, 20}}, 2);
    for (int i = 0; i < 4; ++i) batch.query_start_loc.Set(i, starts[i]);
    ExpectOk(batch.Run());
    batch.ExpectResult();
  }
  for (const double count : {lowest, -1.0, 0.0, 1.0, 2.0, 9.0, highest}) {
    Batch batch(shape, {{4, 9}, {3, 3}, {6, 20}}, 2);
    batch.num_seqs.Set(0, count);
    ExpectOk(batch.Run());
    batch.ExpectResult();
  }
  for (const double context : {lowest, -1.0, 0.0}) {
    Batch batch(shape, {{4, 9}, {3, 3}, {6, 20}}, 2);
    batch.context_lens.Set(1, context);
    ExpectOk(batch.Run());
    batch.ExpectResult();
  }
  // Past the table's end: clamped to it. Its last page is not a block.
  Batch batch(shape, {{4, 9}, {3, 3}, {6, 20}}, 2);
  batch.context_lens.Set(2, highest);
  ExpectOk(batch.Run());
  batch.ExpectResult();
}

XLA_OPS_TEST(EmptyOperands) {
  Shape shape;
  // No sequence at all: every row is zero.
  Batch none(shape, {}, 5);
  ExpectOk(none.Run());
  none.ExpectResult();
  for (int64_t i = 0; i < none.out.size(); ++i) {
    EXPECT_EQ(none.out.Get(i), 0.0);
  }
  ExpectRight(Batch(shape, {{0, 4}}));  // no token
  // A cache without blocks, with and without strides that fit none.
  Batch empty(shape, {{4, 9}});
  empty.num_blocks = 0;
  ExpectOk(empty.Run());
  empty.ExpectResult();
  Batch no_pages(shape, {{4, 9}});
  no_pages.max_blocks = 0;
  no_pages.block_tables = TestTensor(DType::kS32, {1, 0});
  ExpectOk(no_pages.Run());
  no_pages.ExpectResult();
  Batch no_page_size(shape, {{4, 9}});
  no_page_size.shape.page_size = 0;
  ExpectOk(no_page_size.Run());
  for (int64_t i = 0; i < no_page_size.out.size(); ++i) {
    EXPECT_EQ(no_page_size.out.Get(i), 0.0);
  }
  Shape no_heads = shape;
  no_heads.num_heads = 0;
  ExpectRight(Batch(no_heads, {{4, 9}}));
}

XLA_OPS_TEST(NanInOneTokenStaysInRowsThatSeeIt) {
  Shape shape;
  Batch batch(shape, {{6, 6}});
  // Token 3 is seen by rows 3, 4 and 5.
  batch.value_cache.Set(batch.TokenAt(0, 3), NAN);
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
  Shape shape;
  Batch batch(shape, {{3, 40}});
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
  together.ExpectResult();
}

XLA_OPS_TEST(SplitsNeedAWorkspaceAndChangeNothing) {
  Shape shape;
  Batch batch(shape, Mixed());
  batch.num_splits = 3;
  const int64_t bytes =
      AttentionWorkspaceBytes(batch.num_tokens, 4, 16, 3);
  batch.workspace = TestTensor(DType::kU8, {bytes});
  ExpectOk(batch.Run());
  batch.ExpectResult();
  batch.workspace = TestTensor(DType::kU8, {bytes - 1});
  ExpectInvalid(batch.Run(), "paged_attention: workspace must have at least " +
                                 std::to_string(bytes) + " elements, got " +
                                 std::to_string(bytes - 1));
}

XLA_OPS_TEST(DebugReportsMaskedBlocks) {
  Shape shape;
  Batch batch(shape, {{1, 9}});
  batch.block_tables.Set(1, 99);
  batch.debug = true;
  std::FILE* file = std::tmpfile();
  std::fflush(stderr);
  const int saved = dup(STDERR_FILENO);
  dup2(fileno(file), STDERR_FILENO);
  const CallStatus status = batch.Run();
  std::fflush(stderr);
  dup2(saved, STDERR_FILENO);
  close(saved);
  ExpectOk(status);
  std::rewind(file);
  char text[256] = {};
  EXPECT_TRUE(std::fread(text, 1, sizeof(text) - 1, file) > 0);
  std::fclose(file);
  EXPECT_EQ(std::string(text),
            "xla_ops: paged_attention: block_tables[0, 1] must be from 0 to "
            "4, got 99; masked\n");
}

// Alters a good batch and expects this error, and `out` untouched.
template <typename Change>
void ExpectError(const char* text, const Change& change) {
  Shape shape;
  shape.dtype = DType::kF16;
  Batch batch(shape, {{4, 9}, {3, 3}, {6, 20}});
  change(&batch);
  const std::vector<unsigned char> before = batch.out.bytes();
  ExpectInvalid(batch.Run(), std::string("paged_attention: ") + text);
  EXPECT_TRUE(batch.out.bytes() == before);
}

XLA_OPS_TEST(QueryAndCacheErrors) {
  ExpectError("query must be float32, float16 or bfloat16, got int32",
              [](Batch* b) { b->query = TestTensor(DType::kS32, {1}); });
  ExpectError(
      "query must have shape [num_tokens, num_heads, head_dim], got [4, 8]",
      [](Batch* b) { b->query = TestTensor(DType::kF16, {4, 8}); });
  for (const int64_t head_dim : {0, 12, 264}) {
    ExpectError(("query must have a head_dim that is a multiple of 8 up to "
                 "256, got " +
                 std::to_string(head_dim))
                    .c_str(),
                [&](Batch* b) {
                  b->query = TestTensor(DType::kF16, {4, 4, head_dim});
                });
  }
  ExpectError("key_cache must be float16, got float32", [](Batch* b) {
    b->key_cache = TestTensor(DType::kF32, b->key_cache.dims());
  });
  ExpectError("value_cache must be float16, got bfloat16", [](Batch* b) {
    b->value_cache = TestTensor(DType::kBF16, b->key_cache.dims());
  });
  for (const int64_t kv_heads : {-1, 0, 3, 8}) {
    ExpectError(("num_kv_heads must divide num_heads 4, got " +
                 std::to_string(kv_heads))
                    .c_str(),
                [&](Batch* b) { b->shape.num_kv_heads = kv_heads; });
  }
  ExpectError("key_cache must have at least 1408 elements, got 16",
              [](Batch* b) { b->key_cache = TestTensor(DType::kF16, {16}); });
  ExpectError("value_cache must have at least 1409 elements, got 1408",
              [](Batch* b) { b->value_offset = 1; });
  ExpectError("key_offset must be at least 0, got -1",
              [](Batch* b) { b->key_offset = -1; });
  ExpectError("num_blocks must be at least 0, got -1",
              [](Batch* b) { b->num_blocks = -1; });
  ExpectError("block_stride must be at least 0, got -1",
              [](Batch* b) { b->block_stride = -1; });
  ExpectError(
      "key_cache must hold its view (offset and strides), got 1408 elements",
      [](Batch* b) { b->block_stride = int64_t{1} << 61; });
}

XLA_OPS_TEST(TableErrors) {
  ExpectError("context_lens must be int32, got int64",
              [](Batch* b) { b->context_lens = TestTensor(DType::kS64, {3}); });
  ExpectError(
      "context_lens must have shape [max_num_seqs], got [3, 1]",
      [](Batch* b) { b->context_lens = TestTensor(DType::kS32, {3, 1}); });
  ExpectError(
      "block_tables must have shape [3, max_blocks], got [2, 6]",
      [](Batch* b) { b->block_tables = TestTensor(DType::kS32, {2, 6}); });
  ExpectError("block_tables must be int32, got float32", [](Batch* b) {
    b->block_tables = TestTensor(DType::kF32, {3, 6});
  });
  ExpectError("query_start_loc must have shape [4], got [3]", [](Batch* b) {
    b->query_start_loc = TestTensor(DType::kS32, {3});
  });
  ExpectError("num_seqs must have 1 element, got shape [2]",
              [](Batch* b) { b->num_seqs = TestTensor(DType::kS32, {2}); });
  ExpectError("num_seqs must be int32, got int64",
              [](Batch* b) { b->num_seqs = TestTensor(DType::kS64, {1}); });
}

XLA_OPS_TEST(ScalarAndResultErrors) {
  const float inf = std::numeric_limits<float>::infinity();
  ExpectError("scale must be finite, got nan",
              [](Batch* b) { b->scale = NAN; });
  ExpectError("scale must be finite, got inf",
              [&](Batch* b) { b->scale = inf; });
  ExpectError("sliding_window must be at least 0, got -1",
              [](Batch* b) { b->shape.sliding_window = -1; });
  ExpectError("soft_cap must be finite and at least 0, got -1",
              [](Batch* b) { b->shape.soft_cap = -1; });
  ExpectError("soft_cap must be finite and at least 0, got inf",
              [&](Batch* b) { b->shape.soft_cap = inf; });
  ExpectError("num_splits must be from 1 to 1024, got 0",
              [](Batch* b) { b->num_splits = 0; });
  ExpectError("num_splits must be from 1 to 1024, got 1025",
              [](Batch* b) { b->num_splits = 1025; });
  ExpectError("out must have shape [13, 4, 16], got [13, 64]",
              [](Batch* b) { b->out = TestTensor(DType::kF16, {13, 64}); });
  ExpectError("out must be float16, got float32",
              [](Batch* b) { b->out = TestTensor(DType::kF32, {13, 4, 16}); });
  ExpectError("workspace must be uint8, got float32",
              [](Batch* b) { b->workspace = TestTensor(DType::kF32, {0}); });
}

XLA_OPS_TEST(TableNamesTheTarget) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 1u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.paged_attention");
  EXPECT_EQ(std::string(handlers[0].platform), "Host");
  EXPECT_TRUE(handlers[0].bundle.execute == xla_ops_attention_cpu);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
