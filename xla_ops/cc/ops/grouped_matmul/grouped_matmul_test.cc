// xla_ops.grouped_matmul's CPU handler on hand-built frames: values against
// double arithmetic, offsets that are not what they should be, every error
// text, guard bytes, zero sizes, threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_grouped_matmul_cpu(
    XLA_FFI_CallFrame* call_frame);
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

CallStatus Run(const TestTensor& input, const TestTensor& weight,
               const TestTensor& offsets, TestTensor* out,
               TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input, &weight, &offsets});
  AddResults(&frame, {out});
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_grouped_matmul_cpu);
}

TestTensor Offsets(const std::vector<double>& values) {
  return TestTensor(DType::kS32, {static_cast<int64_t>(values.size())}, values);
}

// The definition in double, with the offsets that the contract makes of
// `offsets`. A dot product in fp32 is off by at most `depth` roundings.
void ExpectProduct(const TestTensor& input, const TestTensor& weight,
                   const TestTensor& offsets, const TestTensor& out) {
  const int64_t rows = input.dims()[0], depth = input.dims()[1];
  const int64_t groups = weight.dims()[0], columns = weight.dims()[1];
  const double rounding = out.dtype() == DType::kF32   ? std::exp2(-24)
                          : out.dtype() == DType::kF16 ? std::exp2(-11)
                                                       : std::exp2(-8);
  std::vector<int64_t> group_of(rows, -1);
  int64_t begin =
      std::clamp<int64_t>(static_cast<int64_t>(offsets.Get(0)), 0, rows);
  for (int64_t e = 0; e < groups; ++e) {
    const int64_t end = std::clamp<int64_t>(
        static_cast<int64_t>(offsets.Get(e + 1)), begin, rows);
    std::fill(group_of.begin() + begin, group_of.begin() + end, e);
    begin = end;
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      double exact = 0, magnitude = 0;
      if (group_of[m] >= 0) {
        for (int64_t k = 0; k < depth; ++k) {
          const double term =
              input.Get(m * depth + k) *
              weight.Get((group_of[m] * columns + n) * depth + k);
          exact += term;
          magnitude += std::abs(term);
        }
      }
      const double bound = std::abs(exact) * rounding * 1.01 +
                           magnitude * depth * std::exp2(-24);
      EXPECT_TRUE(std::abs(out.Get(m * columns + n) - exact) <= bound);
    }
  }
}

struct Case {
  int64_t rows, columns, depth;
  std::vector<double> offsets;
};

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (const Case& c : {
             Case{1, 1, 1, {0, 1}},
             Case{7, 5, 3, {0, 2, 2, 7}},
             Case{40, 33, 130, {0, 33, 40}},
             Case{67, 70, 257, {0, 0, 1, 66, 67, 67}},
             Case{5, 9, 8, {1, 3, 4}},  // rows 0 and 4 are of no group
         }) {
      const int64_t groups = static_cast<int64_t>(c.offsets.size()) - 1;
      TestTensor input(dtype, {c.rows, c.depth});
      TestTensor weight(dtype, {groups, c.columns, c.depth});
      TestTensor out(dtype, {c.rows, c.columns});
      const TestTensor offsets = Offsets(c.offsets);
      input.FillRandom(&random);
      weight.FillRandom(&random);
      ExpectOk(Run(input, weight, offsets, &out));
      ExpectProduct(input, weight, offsets, out);
      out.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(OffsetsAreNotTrusted) {
  std::mt19937 random(2);
  TestTensor input(DType::kBF16, {6, 8});
  TestTensor weight(DType::kBF16, {3, 4, 8});
  input.FillRandom(&random);
  weight.FillRandom(&random);
  for (const std::vector<double>& values :
       {std::vector<double>{-3, 2, 4, 6},
        {0, 4, 2, 6},
        {0, 2, 4, 9},
        {5, 1, 0, 3},
        {7, 8, 9, 10},
        {-2147483648.0, -1, 2147483647.0, 0}}) {
    TestTensor out(DType::kBF16, {6, 4});
    const TestTensor offsets = Offsets(values);
    ExpectOk(Run(input, weight, offsets, &out));
    ExpectProduct(input, weight, offsets, out);
    out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(NanStaysInItsRow) {
  TestTensor input(DType::kF32, {3, 2}, {1, 1, std::nan(""), 1, 2, 2});
  TestTensor weight(DType::kF32, {2, 1, 2}, {1, 2, 3, 4});
  TestTensor out(DType::kF32, {3, 1});
  ExpectOk(Run(input, weight, Offsets({0, 2, 3}), &out));
  EXPECT_EQ(out.Get(0), 3.0);
  EXPECT_TRUE(std::isnan(out.Get(1)));
  EXPECT_EQ(out.Get(2), 14.0);
}

XLA_OPS_TEST(ZeroSizes) {
  TestTensor out(DType::kF16, {0, 4});
  ExpectOk(Run(TestTensor(DType::kF16, {0, 8}),
               TestTensor(DType::kF16, {2, 4, 8}), Offsets({0, 0, 0}), &out));
  TestTensor no_groups(DType::kF16, {3, 4});
  ExpectOk(Run(TestTensor(DType::kF16, {3, 8}),
               TestTensor(DType::kF16, {0, 4, 8}), Offsets({0}), &no_groups));
  TestTensor no_depth(DType::kF16, {3, 4});
  ExpectOk(Run(TestTensor(DType::kF16, {3, 0}),
               TestTensor(DType::kF16, {1, 4, 0}), Offsets({0, 3}), &no_depth));
  TestTensor no_columns(DType::kF16, {3, 0});
  ExpectOk(Run(TestTensor(DType::kF16, {3, 8}),
               TestTensor(DType::kF16, {1, 0, 8}), Offsets({0, 3}),
               &no_columns));
  for (const TestTensor* zeros : {&no_groups, &no_depth}) {
    for (int64_t i = 0; i < zeros->size(); ++i) EXPECT_EQ(zeros->Get(i), 0.0);
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(3);
  TestTensor input(DType::kF16, {101, 160});
  TestTensor weight(DType::kF16, {4, 200, 160});
  TestTensor alone(DType::kF16, {101, 200});
  TestTensor together(DType::kF16, {101, 200});
  input.FillRandom(&random);
  weight.FillRandom(&random);
  const TestTensor offsets = Offsets({0, 50, 51, 51, 101});
  ExpectOk(Run(input, weight, offsets, &alone));
  TestThreads threads(4);
  ExpectOk(Run(input, weight, offsets, &together, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(Errors) {
  const TestTensor input(DType::kF32, {4, 64});
  const TestTensor weight(DType::kF32, {8, 16, 64});
  const TestTensor offsets(DType::kS32, {9});
  TestTensor out(DType::kF32, {4, 16});
  const auto expect = [&](const CallStatus& status, const std::string& text) {
    ExpectInvalid(status, "grouped_matmul: " + text);
  };
  expect(Run(TestTensor(DType::kS32, {4, 64}), weight, offsets, &out),
         "input must be float32, float16 or bfloat16, got int32");
  expect(Run(TestTensor(DType::kF32, {4}), weight, offsets, &out),
         "input must have shape [M, K], got [4]");
  expect(Run(input, TestTensor(DType::kF16, {8, 16, 64}), offsets, &out),
         "weight must be float32, got float16");
  expect(Run(input, TestTensor(DType::kF32, {8, 16, 32}), offsets, &out),
         "weight must have shape [E, N, 64], got [8, 16, 32]");
  expect(Run(input, weight, TestTensor(DType::kS64, {9}), &out),
         "group_offsets must be int32, got int64");
  expect(Run(input, weight, TestTensor(DType::kS32, {8}), &out),
         "group_offsets must have shape [9], got [8]");
  TestTensor other_dtype(DType::kF16, {4, 16});
  expect(Run(input, weight, offsets, &other_dtype),
         "out must be float32, got float16");
  TestTensor other_shape(DType::kF32, {4, 8});
  expect(Run(input, weight, offsets, &other_shape),
         "out must have shape [4, 16], got [4, 8]");
  // No error wrote anything.
  EXPECT_TRUE(out.bytes() == TestTensor(DType::kF32, {4, 16}).bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  std::set<std::string> targets;
  for (size_t i = 0; i < count; ++i) {
    EXPECT_EQ(std::string(handlers[i].platform), "Host");
    targets.insert(handlers[i].target);
  }
  const std::set<std::string> want = {"xla_ops.grouped_matmul",
                                      "xla_ops.grouped_matmul_backward_weight",
                                      "xla_ops.linear"};
  EXPECT_EQ(count, want.size());
  EXPECT_TRUE(targets == want);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
