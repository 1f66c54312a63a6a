// xla_ops.linear's CPU handler on hand-built frames, and its kernels for each
// set of instructions that this processor has: values against double
// arithmetic, rows alone, every error text, guard bytes, zero sizes, threads.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/grouped_matmul/linear_tile.h"

extern "C" XLA_FFI_Error* xla_ops_linear_cpu(XLA_FFI_CallFrame* call_frame);

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
               const TestTensor& bias, TestTensor* out,
               TaskRunner* threads = nullptr, int64_t plan = 0) {
  CallFrame frame;
  AddArgs(&frame, {&input, &weight, &bias});
  AddResults(&frame, {out});
  frame.AddAttr("plan", plan);
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_linear_cpu);
}

// Of element [m, n], in double, and how far an fp32 sum may be off before it
// is rounded: a rounding a term.
struct Exact {
  double value = 0;
  double bound = 0;
};

Exact Product(const TestTensor& input, const TestTensor& weight, int64_t m,
              int64_t n, double bias) {
  const int64_t depth = input.dims()[1];
  Exact exact = {bias, std::abs(bias)};
  for (int64_t k = 0; k < depth; ++k) {
    const double term = input.Get(m * depth + k) * weight.Get(n * depth + k);
    exact.value += term;
    exact.bound += std::abs(term);
  }
  exact.bound *= static_cast<double>(depth + 1) * std::exp2(-24);
  return exact;
}

void ExpectProduct(const TestTensor& input, const TestTensor& weight,
                   const TestTensor& bias, const TestTensor& out) {
  const int64_t rows = input.dims()[0], columns = weight.dims()[0];
  const double rounding = out.dtype() == DType::kF32   ? std::exp2(-24)
                          : out.dtype() == DType::kF16 ? std::exp2(-11)
                                                       : std::exp2(-8);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      const Exact exact =
          Product(input, weight, m, n, bias.size() > 0 ? bias.Get(n) : 0.0);
      const double bound =
          std::abs(exact.value) * rounding * 1.01 + exact.bound;
      EXPECT_TRUE(std::abs(out.Get(m * columns + n) - exact.value) <= bound);
    }
  }
}

XLA_OPS_TEST(Values) {
  struct Case {
    int64_t rows, columns, depth;
    bool bias;
  };
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (const Case& c :
         {Case{1, 1, 1, true}, Case{1, 50, 64, false}, Case{2, 24, 33, true},
          Case{7, 5, 3, false}, Case{13, 49, 130, true},
          Case{64, 25, 16, false}, Case{67, 70, 257, true}}) {
      TestTensor input(dtype, {c.rows, c.depth});
      TestTensor weight(dtype, {c.columns, c.depth});
      TestTensor bias(dtype, {c.bias ? c.columns : 0});
      TestTensor out(dtype, {c.rows, c.columns});
      input.FillRandom(&random);
      weight.FillRandom(&random);
      bias.FillRandom(&random);
      ExpectOk(Run(input, weight, bias, &out));
      ExpectProduct(input, weight, bias, out);
      out.ExpectGuardsIntact();
    }
  }
}

// Each kernel, with each number of rows that it has code for; a row's sums are
// the same bits whatever the others.
XLA_OPS_TEST(Kernels) {
  std::mt19937 random(2);
  for (const LinearTileKernel kernel :
       {MultiplyTileSse, MultiplyTileAvx2, MultiplyTileAvx512}) {
    if (!CanRun(kernel)) continue;
    for (const DType dtype : kDTypes) {
      for (int64_t rows = 1; rows <= 17; ++rows) {
        for (const int64_t columns : {int64_t{1}, int64_t{13}, int64_t{24}}) {
          const int64_t depth = 20 + 3 * rows;
          TestTensor input(DType::kF32, {rows, depth});
          TestTensor weight(dtype, {columns, depth});
          input.FillRandom(&random);
          weight.FillRandom(&random);
          std::vector<float> sums(rows * kLinearTileColumns, NAN);
          LinearTile tile = {};
          tile.dtype = dtype;
          tile.rows = rows;
          tile.columns = columns;
          tile.depth = depth;
          tile.input = static_cast<const float*>(input.data());
          tile.weight = weight.data();
          tile.sums = sums.data();
          kernel(tile);
          std::vector<float> alone(kLinearTileColumns);
          for (int64_t m = 0; m < rows; ++m) {
            tile.rows = 1;
            tile.input = static_cast<const float*>(input.data()) + m * depth;
            tile.sums = alone.data();
            kernel(tile);
            for (int64_t n = 0; n < columns; ++n) {
              const float sum = sums[m * kLinearTileColumns + n];
              const Exact exact = Product(input, weight, m, n, 0.0);
              EXPECT_TRUE(std::abs(sum - exact.value) <= exact.bound);
              EXPECT_EQ(sum, alone[n]);
            }
          }
        }
      }
    }
  }
}

XLA_OPS_TEST(TheBestKernelRuns) {
  EXPECT_TRUE(CanRun(BestLinearTileKernel()));
  EXPECT_TRUE(CanRun(MultiplyTileSse));
}

XLA_OPS_TEST(NanStaysInItsRowAndColumn) {
  TestTensor input(DType::kF32, {3, 2}, {1, 1, std::nan(""), 1, 2, 2});
  TestTensor weight(DType::kF32, {2, 2},
                    {1, 2, std::numeric_limits<double>::infinity(), 1});
  TestTensor out(DType::kF32, {3, 2});
  ExpectOk(Run(input, weight, TestTensor(DType::kF32, {0}), &out));
  EXPECT_EQ(out.Get(0), 3.0);
  EXPECT_TRUE(std::isinf(out.Get(1)));
  EXPECT_TRUE(std::isnan(out.Get(2)) && std::isnan(out.Get(3)));
  EXPECT_EQ(out.Get(4), 6.0);
}

XLA_OPS_TEST(ZeroSizes) {
  const TestTensor none(DType::kF16, {0});
  TestTensor no_rows(DType::kF16, {0, 4});
  ExpectOk(Run(TestTensor(DType::kF16, {0, 8}), TestTensor(DType::kF16, {4, 8}),
               none, &no_rows));
  TestTensor no_columns(DType::kF16, {3, 0});
  ExpectOk(Run(TestTensor(DType::kF16, {3, 8}), TestTensor(DType::kF16, {0, 8}),
               none, &no_columns));
  TestTensor no_depth(DType::kF16, {1, 2});
  const TestTensor bias(DType::kF16, {2}, {3, 4});
  ExpectOk(Run(TestTensor(DType::kF16, {1, 0}), TestTensor(DType::kF16, {2, 0}),
               bias, &no_depth));
  EXPECT_EQ(no_depth.Get(0), 3.0);
  EXPECT_EQ(no_depth.Get(1), 4.0);
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(3);
  TestTensor input(DType::kF16, {101, 160});
  TestTensor weight(DType::kF16, {700, 160});
  TestTensor bias(DType::kF16, {700});
  TestTensor alone(DType::kF16, {101, 700});
  TestTensor together(DType::kF16, {101, 700});
  input.FillRandom(&random);
  weight.FillRandom(&random);
  bias.FillRandom(&random);
  ExpectOk(Run(input, weight, bias, &alone));
  TestThreads threads(4);
  ExpectOk(Run(input, weight, bias, &together, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(Errors) {
  const TestTensor input(DType::kF32, {4, 64});
  const TestTensor weight(DType::kF32, {16, 64});
  const TestTensor bias(DType::kF32, {16});
  TestTensor out(DType::kF32, {4, 16});
  const auto expect = [&](const CallStatus& status, const std::string& text) {
    ExpectInvalid(status, "linear: " + text);
  };
  expect(Run(TestTensor(DType::kS32, {4, 64}), weight, bias, &out),
         "input must be float32, float16 or bfloat16, got int32");
  expect(Run(TestTensor(DType::kF32, {4}), weight, bias, &out),
         "input must have shape [M, K], got [4]");
  expect(Run(input, TestTensor(DType::kF16, {16, 64}), bias, &out),
         "weight must be float32, got float16");
  expect(Run(input, TestTensor(DType::kF32, {16, 32}), bias, &out),
         "weight must have shape [N, 64], got [16, 32]");
  expect(Run(input, weight, TestTensor(DType::kF16, {16}), &out),
         "bias must be float32, got float16");
  expect(Run(input, weight, TestTensor(DType::kF32, {8}), &out),
         "bias must have shape [16], got [8]");
  TestTensor other_dtype(DType::kF16, {4, 16});
  expect(Run(input, weight, bias, &other_dtype),
         "out must be float32, got float16");
  TestTensor other_shape(DType::kF32, {4, 8});
  expect(Run(input, weight, bias, &other_shape),
         "out must have shape [4, 16], got [4, 8]");
  expect(Run(input, weight, bias, &out, nullptr, 1),
         "plan must be 0 or a plan of linear_plan.h, got 1");
  // No error wrote anything.
  EXPECT_TRUE(out.bytes() == TestTensor(DType::kF32, {4, 16}).bytes());
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
