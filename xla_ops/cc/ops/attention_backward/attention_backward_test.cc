// xla_ops.flash_attn_varlen_backward and xla_ops.paged_attention_backward on
// the CPU, against derivatives in double: layouts, every feature alone and in
// random mixtures, what is asked for, empty and wild batches, threads.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_testing.h"

namespace xla_ops::testing {
namespace {

constexpr Layout kLayouts[] = {Layout::kNhd, Layout::kHnd, Layout::kStacked,
                               Layout::kContiguous, Layout::kPacked};

Shape Of(Layout layout, DType dtype = DType::kF32) {
  Shape shape;
  shape.layout = layout;
  shape.dtype = dtype;
  return shape;
}

TestTensor Random(std::vector<int64_t> dims, double low, double high,
                  std::mt19937* random) {
  TestTensor tensor(DType::kF32, std::move(dims));
  std::uniform_real_distribution<double> uniform(low, high);
  for (int64_t i = 0; i < tensor.size(); ++i) tensor.Set(i, uniform(*random));
  return tensor;
}

XLA_OPS_TEST(LayoutsAndTypes) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Layout layout : kLayouts) {
      BackwardBatch b(Of(layout, dtype), Mixed(), 3, 2);
      b.UseSinks();
      ExpectRight(b);
    }
  }
}

XLA_OPS_TEST(HeadsAndHeadDims) {
  for (const int64_t head_dim : {8, 24, 40, 64, 256}) {
    for (const auto& [heads, kv_heads] :
         std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {3, 3}, {6, 2}, {5, 1}}) {
      Shape shape = Of(Layout::kContiguous);
      shape.num_heads = heads;
      shape.num_kv_heads = kv_heads;
      shape.head_dim = head_dim;
      ExpectRight(BackwardBatch(shape, {{5, 9}, {17, 40}}));
    }
  }
}

// Rows that no sequence owns are NaN in key and value, and zero in dk and dv.
XLA_OPS_TEST(LeftPaddingAndUsedLengths) {
  for (const int64_t leftpad : {0, 3}) {
    for (const int64_t slack : {0, 5}) {
      Shape shape = Of(Layout::kContiguous);
      shape.leftpad = leftpad;
      shape.slack = slack;
      ExpectRight(BackwardBatch(shape, Mixed(), 3, 2));
    }
  }
}

XLA_OPS_TEST(Windows) {
  for (const Layout layout : {Layout::kNhd, Layout::kContiguous}) {
    for (const int64_t left : {-1, 0, 3, 33}) {
      for (const int64_t right : {-1, 0, 2, 40}) {
        BackwardBatch b(Of(layout), Mixed());
        b.batch.window_left = left;
        b.batch.window_right = right;
        ExpectRight(b);
      }
    }
  }
}

XLA_OPS_TEST(Features) {
  std::mt19937 random(3);
  for (const Layout layout : {Layout::kNhd, Layout::kContiguous}) {
    BackwardBatch capped(Of(layout), Mixed());
    capped.batch.soft_cap = 1.5f;
    ExpectRight(capped);
    for (const bool of_seq : {false, true}) {
      BackwardBatch sloped(Of(layout), Mixed());
      const int64_t heads = sloped.batch.shape.num_heads;
      sloped.batch.alibi_slopes =
          of_seq ? Random({sloped.batch.max_num_seqs, heads}, 0, 0.5, &random)
                 : Random({heads}, 0, 0.5, &random);
      ExpectRight(sloped);
    }
    BackwardBatch graded(Of(layout), Mixed(), 2);
    graded.UseGradOfLse();
    ExpectRight(graded);
    graded.UseSinks();
    ExpectRight(graded);
  }
}

XLA_OPS_TEST(QueriesOver8Bits) {
  std::mt19937 random(4);
  for (const char* name : {"fp8", "fp8_e5m2"}) {
    for (const Layout layout : kLayouts) {
      for (const bool one : {false, true}) {
        Shape shape = Of(layout);
        shape.kv_cache_dtype = name;
        BackwardBatch b(shape, Mixed());
        const std::vector<int64_t> dims =
            one ? std::vector<int64_t>{1}
                : std::vector<int64_t>{b.batch.max_num_seqs,
                                       shape.num_kv_heads};
        b.batch.k_scale = Random(dims, 0.5, 1.5, &random);
        b.batch.v_scale = Random(dims, 0.5, 1.5, &random);
        b.UseSinks();
        ExpectRight(b);
      }
    }
  }
}

XLA_OPS_TEST(BlocksThatDoNotExist) {
  for (const double block : {-1.0, 1e6}) {
    BackwardBatch b(Of(Layout::kNhd), {{3, 20}});
    b.batch.block_table.Set(1, block);
    ExpectRight(b);
  }
}

XLA_OPS_TEST(RandomMixtures) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](int64_t low, int64_t high) {
      return std::uniform_int_distribution<int64_t>(low, high)(random);
    };
    Shape shape = Of(kLayouts[seed % 5]);
    shape.dtype = seed % 3 == 0 ? DType::kBF16 : DType::kF32;
    shape.num_kv_heads = pick(1, 3);
    shape.num_heads = shape.num_kv_heads * pick(1, 3);
    shape.head_dim = 8 * pick(1, 6);
    shape.page_size = pick(1, 7);
    if (!shape.paged()) {
      shape.leftpad = pick(0, 2);
      shape.slack = pick(0, 2);
    }
    std::vector<Seq> seqs(pick(1, 5));
    for (Seq& seq : seqs) seq = {pick(0, 40), pick(0, 90)};
    BackwardBatch b(shape, seqs, pick(0, 3), pick(0, 2), seed);
    b.batch.window_left = pick(-1, 40);
    b.batch.window_right = pick(-1, 10);
    if (pick(0, 1) == 1) b.batch.soft_cap = 2.5f;
    if (pick(0, 1) == 1) b.UseSinks();
    if (pick(0, 1) == 1) b.UseGradOfLse();
    if (pick(0, 1) == 1) {
      b.batch.alibi_slopes = Random({shape.num_heads}, 0, 0.3, &random);
    }
    ExpectRight(b);
  }
}

XLA_OPS_TEST(OnlyWhatIsWanted) {
  for (int bits = 0; bits < 8; ++bits) {
    BackwardBatch b(Of(Layout::kContiguous), Mixed());
    b.UseSinks();
    b.wants_dq = (bits & 1) != 0;
    b.wants_dkv = (bits & 2) != 0;
    b.wants_dsinks = (bits & 4) != 0;
    ExpectRight(b);
  }
}

// Rows that see nothing add nothing, whatever lse's gradient is there.
XLA_OPS_TEST(RowsThatSeeNothing) {
  BackwardBatch b(Of(Layout::kContiguous), {{9, 4}}, 2);
  b.UseSinks();
  b.UseGradOfLse();
  b.Forward();
  for (int64_t i = 0; i < b.grad_lse.size(); ++i) {
    if (std::isinf(b.batch.lse.Get(i))) b.grad_lse.Set(i, NAN);
  }
  ExpectOk(b.Run());
  b.ExpectResult();
}

XLA_OPS_TEST(EmptyBatches) {
  for (const std::vector<Seq>& seqs :
       {std::vector<Seq>{}, std::vector<Seq>{{0, 5}}, std::vector<Seq>{{3, 0}},
        std::vector<Seq>{{0, 0}, {0, 0}}}) {
    for (const int64_t padding : {0, 3}) {
      BackwardBatch b(Of(Layout::kContiguous), seqs, padding);
      b.UseSinks();
      ExpectRight(b);
    }
  }
}

// Any integers: nothing is written or read out of bounds.
XLA_OPS_TEST(WildIntegers) {
  for (const Layout layout : {Layout::kNhd, Layout::kContiguous}) {
    for (const double value :
         {static_cast<double>(std::numeric_limits<int32_t>::min()), -1.0, 7.0,
          static_cast<double>(std::numeric_limits<int32_t>::max())}) {
      for (TestTensor Batch::* table :
           {&Batch::cu_seqlens_q, &Batch::cu_seqlens_k, &Batch::seqused_k,
            &Batch::block_table, &Batch::leftpad_k, &Batch::num_seqs}) {
        Shape shape = Of(layout);
        if (!shape.paged()) shape.leftpad = shape.slack = 2;
        BackwardBatch b(shape, Mixed(), 3, 2);
        b.Forward();
        (b.batch.*table).Fill(value);
        ExpectOk(b.Run());
        for (const TestTensor* result : {&b.dq, &b.dk, &b.dv}) {
          result->ExpectGuardsIntact();
        }
      }
    }
  }
}

// The same bits whatever the number of threads, and in every run.
XLA_OPS_TEST(SameBitsOnManyThreads) {
  Shape shape = Of(Layout::kContiguous, DType::kBF16);
  shape.head_dim = 64;
  BackwardBatch alone(shape, {{300, 300}, {70, 200}});
  alone.UseSinks();
  alone.Forward();
  BackwardBatch together = alone;
  ExpectOk(alone.Run());
  alone.ExpectResult();
  for (int run = 0; run < 3; ++run) {
    TestThreads threads(4);
    ExpectOk(together.Run(&threads));
    EXPECT_TRUE(together.dq.bytes() == alone.dq.bytes());
    EXPECT_TRUE(together.dk.bytes() == alone.dk.bytes());
    EXPECT_TRUE(together.dv.bytes() == alone.dv.bytes());
    EXPECT_TRUE(together.dsinks.bytes() == alone.dsinks.bytes());
  }
}

}  // namespace
}  // namespace xla_ops::testing

XLA_OPS_TEST_MAIN()
