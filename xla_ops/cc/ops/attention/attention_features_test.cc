// The features of xla_ops.flash_attn_varlen and xla_ops.paged_attention, each
// alone and in random mixtures, against attention in double: contiguous keys,
// left padding, windows, soft caps, ALiBi, sinks, fp8 keys and values.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_testing.h"

namespace xla_ops::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kLowest = std::numeric_limits<int32_t>::min();
constexpr double kHighest = std::numeric_limits<int32_t>::max();
constexpr Layout kLayouts[] = {Layout::kNhd, Layout::kHnd, Layout::kStacked,
                               Layout::kContiguous, Layout::kPacked};

Shape Contiguous() {
  Shape shape;
  shape.layout = Layout::kContiguous;
  return shape;
}

// f32 [dims...] of values in [low, high).
TestTensor Random(std::vector<int64_t> dims, double low, double high,
                  std::mt19937* random) {
  TestTensor tensor(DType::kF32, std::move(dims));
  std::uniform_real_distribution<double> uniform(low, high);
  for (int64_t i = 0; i < tensor.size(); ++i) tensor.Set(i, uniform(*random));
  return tensor;
}

XLA_OPS_TEST(ContiguousKeys) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Layout layout : {Layout::kContiguous, Layout::kPacked}) {
      for (const int64_t leftpad : {0, 3}) {
        for (const int64_t slack : {0, 5}) {
          Shape shape;
          shape.dtype = dtype;
          shape.layout = layout;
          shape.leftpad = leftpad;
          shape.slack = slack;
          ExpectRight(Batch(shape, Mixed(), 3, 2));
        }
      }
    }
  }
}

// The same tokens in pages and in rows, through either target: the same
// bits, for the kernel walks the same tiles.
XLA_OPS_TEST(PagedEqualsContiguous) {
  Shape shape;
  Batch paged(shape, Mixed(), 2, 1);
  Batch rows(Contiguous(), Mixed(), 2, 1);
  rows.query = paged.query;
  for (int64_t s = 0, row = 0; s < 7; ++s) {
    for (int64_t j = 0; j < paged.seqused_k.Get(s); ++j, ++row) {
      for (int64_t i = 0; i < shape.num_kv_heads * shape.head_dim; ++i) {
        const int64_t from = paged.TokenAt(s, j) + i;
        rows.key.Set(row * rows.page_stride + i, paged.key.Get(from));
        rows.value.Set(row * rows.page_stride + i, paged.value.Get(from));
      }
    }
  }
  ExpectOk(rows.Run());
  for (const auto handler :
       {xla_ops_paged_attention_cpu, xla_ops_flash_attn_varlen_cpu}) {
    paged.out.Fill(NAN);
    ExpectOk(paged.Run(handler));
    paged.ExpectResult();
    EXPECT_TRUE(paged.out.bytes() == rows.out.bytes());
    EXPECT_TRUE(paged.lse.bytes() == rows.lse.bytes());
  }
}

XLA_OPS_TEST(AbsentNumSeqsIsAllOfThem) {
  for (const Layout layout : kLayouts) {
    Shape shape;
    shape.layout = layout;
    Batch batch(shape, Mixed(), 3);
    batch.num_seqs = TestTensor(DType::kS32, {0});
    ExpectRight(batch);
  }
}

XLA_OPS_TEST(WildContiguousTablesAreClamped) {
  Shape shape = Contiguous();
  const std::vector<Seq> seqs = {{4, 9}, {3, 3}, {6, 20}};
  for (const std::vector<double>& starts :
       {std::vector<double>{-5, 3, 2, 10},
        {2, 2, 40, 30},
        {kHighest, kLowest, 5, kHighest},
        {kLowest, kLowest, kLowest, kLowest},
        {32, 10, 5, 0},
        {0, kHighest, 3, 4}}) {
    Batch batch(shape, seqs, 2);
    for (int i = 0; i < 4; ++i) batch.cu_seqlens_k.Set(i, starts[i]);
    ExpectRight(batch);
  }
  for (const double number : {kLowest, -1.0, 0.0, 2.0, 32.0, 33.0, kHighest}) {
    // Of a sequence in the middle: its length may reach into the next ones,
    // whose rows are real, and no further than the buffer.
    Batch used(shape, seqs, 2);
    used.seqused_k = TestTensor(DType::kS32, {3}, {9, number, 20});
    ExpectRight(used);
    Batch padded(shape, seqs, 2);
    padded.leftpad_k = TestTensor(DType::kS32, {3}, {0, number, 1});
    ExpectRight(padded);
  }
}

XLA_OPS_TEST(EmptyContiguousOperands) {
  Batch none(Contiguous(), {}, 5);  // no sequence, no KV row
  ExpectOk(none.Run());
  none.ExpectResult();
  EXPECT_EQ(none.lse.Get(0), kInf);
  ExpectRight(Batch(Contiguous(), {{3, 0}, {2, 0}}));
  ExpectRight(Batch(Contiguous(), {{0, 4}}));
}

XLA_OPS_TEST(WindowsToBothSides) {
  const int64_t huge = std::numeric_limits<int64_t>::max();
  for (const Layout layout : {Layout::kNhd, Layout::kContiguous}) {
    for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{5},
                               int64_t{31}, int64_t{1000}, huge}) {
      for (const int64_t right :
           {int64_t{-1}, int64_t{0}, int64_t{2}, int64_t{40}, huge}) {
        Shape shape;
        shape.layout = layout;
        Batch batch(shape, Mixed(), 1, 1);
        batch.window_left = left;
        batch.window_right = right;
        ExpectRight(batch);
      }
    }
  }
}

XLA_OPS_TEST(SoftCaps) {
  for (const float soft_cap : {0.5f, 30.0f}) {
    for (const int64_t left : {-1, 6}) {
      Batch batch(Shape(), Mixed(), 1, 1);
      batch.soft_cap = soft_cap;
      batch.window_left = left;
      ExpectRight(batch);
    }
  }
}

XLA_OPS_TEST(AlibiSlopes) {
  std::mt19937 random(2);
  for (const Layout layout : {Layout::kNhd, Layout::kContiguous}) {
    for (const int64_t right : {-1, 0, 3}) {
      Shape shape;
      shape.layout = layout;
      Batch batch(shape, Mixed(), 1, 1);
      batch.window_right = right;
      batch.alibi_slopes = Random({4}, 0, 1, &random);
      batch.alibi_slopes.Set(2, 0);
      ExpectRight(batch);
      batch.alibi_slopes = Random({8, 4}, -0.1, 1, &random);
      ExpectRight(batch);
    }
  }
  // One sequence and one head: two shapes of one element.
  Shape one;
  one.num_heads = one.num_kv_heads = 1;
  Batch batch(one, {{5, 9}});
  batch.alibi_slopes = TestTensor(DType::kF32, {1}, {0.3});
  ExpectRight(batch);
  batch.alibi_slopes = TestTensor(DType::kF32, {1, 1}, {0.3});
  ExpectRight(batch);
}

XLA_OPS_TEST(Sinks) {
  for (const Layout layout : {Layout::kNhd, Layout::kContiguous}) {
    Shape shape;
    shape.layout = layout;
    Batch batch(shape, Mixed(), 1, 1);
    batch.sinks = TestTensor(DType::kF32, {4}, {0.0, 1.5, -3.0, 4.0});
    ExpectRight(batch);
    // Far above and below every logit; -inf is no sink.
    batch.sinks = TestTensor(DType::kF32, {4}, {200.0, -200.0, -kInf, 90.0});
    ExpectRight(batch);
  }
}

// out * denominator is the same with and without a sink, whose weight is
// exp(sink) in the denominator.
XLA_OPS_TEST(SinkOnlyAddsToTheDenominator) {
  Batch without(Shape(), {{3, 20}});
  Batch with = without;
  with.sinks = TestTensor(DType::kF32, {4}, {0.5, 1.5, -2.0, 3.0});
  ExpectOk(without.Run());
  ExpectOk(with.Run());
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t h = 0; h < 4; ++h) {
      const double sum = std::exp(without.lse.Get(h * 3 + row));
      const double wider = sum + std::exp(with.sinks.Get(h));
      EXPECT_TRUE(std::abs(std::exp(with.lse.Get(h * 3 + row)) / wider - 1) <
                  1e-5);
      for (int64_t d = 0; d < 16; ++d) {
        const int64_t i = (row * 4 + h) * 16 + d;
        EXPECT_TRUE(std::abs(with.out.Get(i) -
                             without.out.Get(i) * sum / wider) < 1e-5);
      }
    }
  }
}

XLA_OPS_TEST(Fp8KeysAndValues) {
  std::mt19937 random(3);
  for (const char* kv_cache_dtype : {"fp8", "fp8_e4m3", "fp8_e5m2"}) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const Layout layout : kLayouts) {
        Shape shape;
        shape.kv_cache_dtype = kv_cache_dtype;
        shape.dtype = dtype;
        shape.layout = layout;
        Batch batch(shape, Mixed(), 1, 1);
        ExpectRight(batch);  // no scale: 1
        batch.k_scale = TestTensor(DType::kF32, {1}, {0.7});
        ExpectRight(batch);
        batch.v_scale = TestTensor(DType::kF32, {1}, {1.3});
        ExpectRight(batch);
        batch.k_scale = Random({8, 2}, 0.5, 1.5, &random);
        batch.v_scale = Random({8, 2}, 0.5, 1.5, &random);
        ExpectRight(batch);
      }
    }
  }
}

XLA_OPS_TEST(BytesHoldFp8) {
  for (const char* kv_cache_dtype : {"fp8_e4m3", "fp8_e5m2"}) {
    Shape shape;
    shape.kv_cache_dtype = kv_cache_dtype;
    Batch typed(shape, Mixed());
    Batch bytes = typed;
    bytes.key = TestTensor(DType::kU8, typed.key.dims());
    bytes.value = bytes.key;
    std::memcpy(bytes.key.data(), typed.key.data(), typed.key.size());
    std::memcpy(bytes.value.data(), typed.value.data(), typed.value.size());
    ExpectOk(typed.Run());
    ExpectOk(bytes.Run());
    EXPECT_TRUE(typed.out.bytes() == bytes.out.bytes());
    EXPECT_TRUE(typed.lse.bytes() == bytes.lse.bytes());
  }
}

// Rows whose logits are all -inf, and a NaN scale, on rows that see tokens
// and on rows that do not.
XLA_OPS_TEST(EmptyRowsAreZeroWhateverTheScales) {
  Shape shape;
  shape.kv_cache_dtype = "fp8";
  Batch batch(shape, {{5, 3}, {2, 0}}, 1);
  batch.v_scale = TestTensor(DType::kF32, {1}, {NAN});
  batch.sinks = TestTensor(DType::kF32, {4}, {1, 1, 1, 1});
  ExpectOk(batch.Run());
  // Rows 0 and 1 come before the first token; 5 and 6 have none; 7 is of no
  // sequence.
  for (const int64_t row : {0, 1, 5, 6, 7}) {
    for (int64_t i = 0; i < 64; ++i) {
      EXPECT_EQ(batch.out.Get(row * 64 + i), 0.0);
    }
    for (int64_t h = 0; h < 4; ++h) {
      EXPECT_EQ(batch.lse.Get(h * 8 + row), kInf);
    }
  }
  EXPECT_TRUE(std::isnan(batch.out.Get(2 * 64)));
  EXPECT_TRUE(std::isfinite(batch.lse.Get(2)));

  Batch hidden(Shape(), {{2, 6}});
  for (int64_t j = 0; j < 6; ++j) {
    for (int64_t d = 0; d < 2 * 16; ++d) {
      hidden.key.Set(hidden.TokenAt(0, j) + d, d % 16 == 0 ? -kInf : 1.0);
    }
  }
  hidden.query.Fill(1.0);
  ExpectOk(hidden.Run());
  hidden.ExpectResult();
  EXPECT_EQ(hidden.lse.Get(0), kInf);
}

// Everything at once, drawn at random.
XLA_OPS_TEST(RandomMixtures) {
  std::mt19937 random(4);
  const auto below = [&](int64_t n) {
    return std::uniform_int_distribution<int64_t>(0, n - 1)(random);
  };
  for (uint32_t round = 0; round < 300; ++round) {
    Shape shape;
    shape.dtype =
        std::vector<DType>{DType::kF32, DType::kF16, DType::kBF16}[below(3)];
    shape.kv_cache_dtype =
        std::vector<std::string>{"auto", "auto", "fp8", "fp8_e5m2"}[below(4)];
    shape.layout = kLayouts[below(5)];
    shape.num_kv_heads = 1 + below(3);
    shape.num_heads = shape.num_kv_heads * (1 + below(4));
    shape.head_dim = 8 * (1 + below(6));
    shape.page_size = 1 + below(20);
    if (!shape.paged()) {
      shape.leftpad = below(2) * below(6);
      shape.slack = below(2) * below(6);
    }
    std::vector<Seq> seqs(below(5));
    for (Seq& seq : seqs) seq = {below(2) ? 1 : below(40), below(70)};
    Batch batch(shape, seqs, below(3), below(3), round);
    batch.window_left = below(2) ? -1 : below(40);
    batch.window_right = below(3) ? 0 : below(2) ? -1 : below(20);
    batch.soft_cap = below(3) ? 0.0f : 5.0f;
    if (below(3) == 0) {
      batch.alibi_slopes =
          below(2)
              ? Random({shape.num_heads}, 0, 0.5, &random)
              : Random({batch.max_num_seqs, shape.num_heads}, 0, 0.5, &random);
    }
    if (below(3) == 0) {
      batch.sinks = Random({shape.num_heads}, -3, 3, &random);
    }
    if (shape.kv_cache_dtype != "auto") {
      batch.k_scale = Random({1}, 0.5, 1.5, &random);
      batch.v_scale =
          Random({batch.max_num_seqs, shape.num_kv_heads}, 0.5, 1.5, &random);
    }
    if (shape.paged() && batch.max_num_seqs > 0 && below(3) == 0) {
      batch.block_table.Set(below(batch.block_table.size()), -1);
    }
    ExpectOk(batch.Run(below(2) ? xla_ops_paged_attention_cpu
                                : xla_ops_flash_attn_varlen_cpu));
    batch.ExpectResult();
  }
}

}  // namespace
}  // namespace xla_ops::testing

XLA_OPS_TEST_MAIN()
