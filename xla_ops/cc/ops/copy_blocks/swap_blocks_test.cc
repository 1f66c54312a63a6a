// The CPU handler of swap_blocks on hand-built frames: pairs in their order,
// layouts, copies, reports, every error text, threads.

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"

extern "C" XLA_FFI_Error* xla_ops_swap_blocks_cpu(XLA_FFI_CallFrame*);

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

struct Layout {
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t offset;

  int64_t At(int64_t block, int64_t page, int64_t head) const {
    return offset + block * block_stride + page * page_stride +
           head * head_stride;
  }
};

struct Attrs {
  int64_t num_src_blocks;
  int64_t num_dst_blocks;
  int64_t page_size;
  int64_t num_kv_heads;
  int64_t head_dim;
  Layout src;
  Layout dst;
};

// Dense [7, 3, 2, 5] to dense [4, 3, 2, 5].
constexpr Attrs kDense = {7, 4, 3, 2, 5, {30, 10, 5, 0}, {30, 10, 5, 0}};
// The same blocks with gaps, and with pages and heads exchanged.
constexpr Attrs kApart = {7, 4, 3, 2, 5, {40, 12, 6, 3}, {35, 5, 16, 2}};

CallStatus Run(const TestTensor& src, const TestTensor& dst,
               const TestTensor& mapping, TestTensor* result, const Attrs& a,
               TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&dst, &src, &mapping});
  AddResults(&frame, {result});
  frame.AddAttr("num_src_blocks", a.num_src_blocks)
      .AddAttr("num_dst_blocks", a.num_dst_blocks)
      .AddAttr("page_size", a.page_size)
      .AddAttr("num_kv_heads", a.num_kv_heads)
      .AddAttr("head_dim", a.head_dim)
      .AddAttr("src_block_stride", a.src.block_stride)
      .AddAttr("src_page_stride", a.src.page_stride)
      .AddAttr("src_head_stride", a.src.head_stride)
      .AddAttr("src_offset", a.src.offset)
      .AddAttr("dst_block_stride", a.dst.block_stride)
      .AddAttr("dst_page_stride", a.dst.page_stride)
      .AddAttr("dst_head_stride", a.dst.head_stride)
      .AddAttr("dst_offset", a.dst.offset)
      .AddAttr("debug", false)
      .SetTaskRunner(threads);
  return frame.Call(xla_ops_swap_blocks_cpu);
}

TestTensor Mapping(const std::vector<double>& numbers) {
  return TestTensor(DType::kS64, {static_cast<int64_t>(numbers.size()) / 2, 2},
                    numbers);
}

// The definition: pair after pair, element after element.
void Model(const TestTensor& src, const TestTensor& mapping, const Attrs& a,
           TestTensor* dst) {
  for (int64_t p = 0; p < mapping.dims()[0]; ++p) {
    const auto from = static_cast<int64_t>(mapping.Get(2 * p));
    const auto to = static_cast<int64_t>(mapping.Get(2 * p + 1));
    if (from < 0 || from >= a.num_src_blocks || to < 0 ||
        to >= a.num_dst_blocks) {
      continue;
    }
    for (int64_t page = 0; page < a.page_size; ++page) {
      for (int64_t head = 0; head < a.num_kv_heads; ++head) {
        for (int64_t d = 0; d < a.head_dim; ++d) {
          dst->Set(a.dst.At(to, page, head) + d,
                   src.Get(a.src.At(from, page, head) + d));
        }
      }
    }
  }
}

XLA_OPS_TEST(CopiesPairAfterPair) {
  std::mt19937 random(1);
  for (const DType dtype :
       {DType::kF32, DType::kF16, DType::kBF16, DType::kU8}) {
    for (const Attrs& attrs : {kDense, kApart}) {
      TestTensor src(dtype, {300});
      TestTensor dst(dtype, {150});
      for (int64_t i = 0; i < 300; ++i) src.Set(i, random() % 100);
      for (int64_t i = 0; i < 150; ++i) dst.Set(i, random() % 100);
      // A block twice, a target twice, one to its own number, padding, ids out
      // of range.
      const TestTensor mapping = Mapping(
          {6, 0, 6, 1, 5, 1, 2, 2, -1, 3, 3, -1, 7, 3, 0, 4, 1e15, 1e15});
      TestTensor want = dst;
      Model(src, mapping, attrs, &want);
      TestTensor result(dtype, {150});
      const std::vector<unsigned char> before = dst.bytes();
      ExpectOk(Run(src, dst, mapping, &result, attrs));
      EXPECT_TRUE(result.bytes() == want.bytes());
      EXPECT_TRUE(dst.bytes() == before);
      ExpectOk(Run(src, dst, mapping, &dst, attrs));
      EXPECT_TRUE(dst.bytes() == want.bytes());
    }
  }
}

XLA_OPS_TEST(NothingToCopy) {
  const TestTensor src(DType::kF16, {210});
  TestTensor dst(DType::kF16, {120});
  const std::vector<unsigned char> before = dst.bytes();
  ExpectOk(Run(src, dst, TestTensor(DType::kS64, {0, 2}), &dst, kDense));
  for (const auto& change : std::vector<std::function<void(Attrs*)>>{
           [](Attrs* a) { a->num_src_blocks = 0; },
           [](Attrs* a) { a->num_dst_blocks = 0; },
           [](Attrs* a) { a->page_size = 0; },
           [](Attrs* a) { a->head_dim = 0; }}) {
    Attrs attrs = kDense;
    change(&attrs);
    ExpectOk(Run(src, dst, Mapping({0, 1}), &dst, attrs));
  }
  EXPECT_TRUE(dst.bytes() == before);
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(2);
  const Attrs attrs = {
      9, 9, 1, 1, 100003, {100003, 0, 0, 0}, {100003, 0, 0, 0}};
  TestTensor src(DType::kU8, {9 * 100003});
  TestTensor dst(DType::kU8, {9 * 100003});
  for (int64_t i = 0; i < src.size(); ++i) src.Set(i, random() % 256);
  const TestTensor mapping = Mapping({0, 8, 1, 8, 2, 7, 3, 3});
  TestTensor alone(DType::kU8, dst.dims());
  TestTensor together(DType::kU8, dst.dims());
  ExpectOk(Run(src, dst, mapping, &alone, attrs));
  TestThreads threads(4);
  ExpectOk(Run(src, dst, mapping, &together, attrs, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(Errors) {
  const TestTensor src(DType::kF16, {210});
  TestTensor dst(DType::kF16, {120});
  const TestTensor mapping = Mapping({0, 1});
  const auto expect = [&](const TestTensor& s, const TestTensor& m,
                          const std::function<void(Attrs*)>& change,
                          const std::string& text) {
    Attrs attrs = kDense;
    change(&attrs);
    ExpectInvalid(Run(s, dst, m, &dst, attrs), "swap_blocks: " + text);
  };
  const auto nothing = [](Attrs*) {};
  TestTensor ints(DType::kS32, {120});
  ExpectInvalid(Run(src, ints, mapping, &ints, kDense),
                "swap_blocks: dst must be float32, float16, bfloat16, "
                "float8_e4m3fn, float8_e5m2, int8 or uint8, got int32");
  expect(TestTensor(DType::kF32, {210}), mapping, nothing,
         "src must be float16, got float32");
  expect(src, TestTensor(DType::kS32, {1, 2}), nothing,
         "block_mapping must be int64, got int32");
  expect(src, TestTensor(DType::kS64, {4}), nothing,
         "block_mapping must have shape [num_pairs, 2], got [4]");
  const std::pair<const char*, int64_t Attrs::*> numbers[] = {
      {"num_src_blocks", &Attrs::num_src_blocks},
      {"num_dst_blocks", &Attrs::num_dst_blocks},
      {"page_size", &Attrs::page_size},
      {"num_kv_heads", &Attrs::num_kv_heads},
      {"head_dim", &Attrs::head_dim}};
  for (const auto& [name, member] : numbers) {
    expect(
        src, mapping, [member = member](Attrs* a) { a->*member = -1; },
        std::string(name) + " must be at least 0, got -1");
  }
  expect(
      src, mapping, [](Attrs* a) { a->src.head_stride = -1; },
      "src_head_stride must be at least 0, got -1");
  expect(
      src, mapping, [](Attrs* a) { a->dst.block_stride = -1; },
      "dst_block_stride must be at least 0, got -1");
  expect(
      src, mapping, [](Attrs* a) { a->src.offset = -1; },
      "src_offset must be at least 0, got -1");
  expect(
      src, mapping, [](Attrs* a) { a->num_src_blocks = 8; },
      "src must have at least 240 elements, got 210");
  expect(
      src, mapping, [](Attrs* a) { a->dst.offset = 1; },
      "dst must have at least 121 elements, got 120");
  TestTensor other(DType::kF16, {60, 2});
  ExpectInvalid(Run(src, dst, mapping, &other, kDense),
                "swap_blocks: dst result must have shape [120], got [60, 2]");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
