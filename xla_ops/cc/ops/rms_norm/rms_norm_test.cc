// xla_ops.rms_norm's CPU handler on hand-built frames: values against double
// arithmetic, every error text, guard bytes, zero sizes, threads.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_rms_norm_cpu(XLA_FFI_CallFrame* call_frame);
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
               TestTensor* out, float eps, TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input, &weight});
  AddResults(&frame, {out});
  frame.AddAttr("eps", eps).SetTaskRunner(threads);
  return frame.Call(xla_ops_rms_norm_cpu);
}

// `value` rounded to `dtype`.
double Round(DType dtype, double value) {
  return TestTensor(dtype, {1}, {value}).Get(0);
}

// Spacing of the type's numbers, relative to them.
double Epsilon(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return std::ldexp(1.0, -10);
    case DType::kBF16:
      return std::ldexp(1.0, -7);
    default:
      return std::ldexp(1.0, -23);
  }
}

// The definition, with its two roundings and nothing else rounded. An fp32
// sum that differs in its last bits can move the first rounding by one
// step, so results may differ by 1.5 steps of the type; for fp32 the sum's
// own error, below 16 steps for these sizes, comes on top.
void ExpectRmsNorm(const TestTensor& input, const TestTensor& weight,
                   const TestTensor& out, float eps) {
  const DType dtype = input.dtype();
  const int64_t hidden = weight.size();
  const double steps = dtype == DType::kF32 ? 16 : 1.5;
  for (int64_t row = 0; row < input.size() / hidden; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < hidden; ++i) {
      sum += std::pow(input.Get(row * hidden + i), 2);
    }
    const double scale = 1 / std::sqrt(sum / hidden + double{eps});
    for (int64_t i = 0; i < hidden; ++i) {
      const double normed = Round(dtype, input.Get(row * hidden + i) * scale);
      const double want = normed * weight.Get(i);
      const double got = out.Get(row * hidden + i);
      // Half's subnormal numbers are 2^-24 apart, whatever their size.
      const double tolerance =
          steps * Epsilon(dtype) * std::abs(want) + std::ldexp(2.0, -24);
      EXPECT_TRUE(std::abs(got - want) <= tolerance);
    }
  }
}

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (const int64_t hidden :
         {1, 2, 7, 8, 15, 16, 17, 63, 64, 100, 257, 1024, 4099}) {
      for (const int64_t rows : {1, 3}) {
        TestTensor input(dtype, {rows, hidden});
        TestTensor weight(dtype, {hidden});
        TestTensor out(dtype, {rows, hidden});
        input.FillRandom(&random, 3.0);
        weight.FillRandom(&random);
        ExpectOk(Run(input, weight, &out, 1e-6f));
        ExpectRmsNorm(input, weight, out, 1e-6f);
        out.ExpectGuardsIntact();
      }
    }
  }
}

// The normalised value is rounded before the weight: where one rounding of
// the product would give another number, `out` has that of two.
XLA_OPS_TEST(RoundsBeforeTheWeight) {
  int differ = 0;
  std::mt19937 random(2);
  TestTensor input(DType::kBF16, {64, 32});
  TestTensor weight(DType::kBF16, {32});
  TestTensor out(DType::kBF16, {64, 32});
  input.FillRandom(&random);
  weight.FillRandom(&random);
  ExpectOk(Run(input, weight, &out, 1e-6f));
  for (int64_t row = 0; row < 64; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < 32; ++i) {
      sum += std::pow(input.Get(row * 32 + i), 2);
    }
    const double scale = 1 / std::sqrt(sum / 32 + 1e-6);
    for (int64_t i = 0; i < 32; ++i) {
      const double x = input.Get(row * 32 + i) * scale;
      const double twice =
          Round(DType::kBF16, Round(DType::kBF16, x) * weight.Get(i));
      const double once = Round(DType::kBF16, x * weight.Get(i));
      differ += twice != once;
      // Exact but for the rare product that lies near a tie.
      EXPECT_TRUE(std::abs(out.Get(row * 32 + i) - twice) <=
                  std::abs(twice) * std::ldexp(1.0, -7));
      if (twice != once) EXPECT_EQ(out.Get(row * 32 + i), twice);
    }
  }
  EXPECT_TRUE(differ > 100);  // the two definitions can be told apart
}

XLA_OPS_TEST(AnyRank) {
  std::mt19937 random(3);
  TestTensor weight(DType::kF32, {8});
  weight.FillRandom(&random);
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{8}, {2, 8}, {2, 3, 8}, {2, 1, 3, 8}}) {
    TestTensor input(DType::kF32, dims);
    TestTensor out(DType::kF32, dims);
    input.FillRandom(&random);
    ExpectOk(Run(input, weight, &out, 1e-5f));
    ExpectRmsNorm(input, weight, out, 1e-5f);
  }
}

XLA_OPS_TEST(EmptyInputIsSuccess) {
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{0, 8}, {2, 0, 8}, {3, 0}}) {
    TestTensor input(DType::kF16, dims);
    TestTensor weight(DType::kF16, {dims.back()});
    TestTensor out(DType::kF16, dims);
    ExpectOk(Run(input, weight, &out, 1e-6f));
    out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(SpecialValuesStayInTheirRow) {
  const double inf = std::numeric_limits<double>::infinity();
  TestTensor input(DType::kF32, {4, 2}, {std::nan(""), 1, inf, 1, 0, 0, 3, 4});
  TestTensor weight(DType::kF32, {2}, {1, 1});
  TestTensor out(DType::kF32, {4, 2});
  ExpectOk(Run(input, weight, &out, 1e-6f));
  EXPECT_TRUE(std::isnan(out.Get(0)) && std::isnan(out.Get(1)));
  EXPECT_TRUE(std::isnan(out.Get(2)));  // inf * 0
  EXPECT_EQ(out.Get(3), 0.0);
  EXPECT_EQ(out.Get(4), 0.0);  // eps keeps a row of zeros zero
  EXPECT_TRUE(std::abs(out.Get(7) - 4 / std::sqrt(12.5)) < 1e-6);
}

XLA_OPS_TEST(OutMayBeInput) {
  std::mt19937 random(4);
  TestTensor input(DType::kBF16, {5, 40});
  TestTensor weight(DType::kBF16, {40});
  TestTensor out(DType::kBF16, {5, 40});
  input.FillRandom(&random);
  weight.FillRandom(&random);
  ExpectOk(Run(input, weight, &out, 1e-6f));
  ExpectOk(Run(input, weight, &input, 1e-6f));
  EXPECT_TRUE(input.bytes() == out.bytes());
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(5);
  TestTensor input(DType::kF16, {301, 1024});
  TestTensor weight(DType::kF16, {1024});
  TestTensor alone(DType::kF16, {301, 1024});
  TestTensor together(DType::kF16, {301, 1024});
  input.FillRandom(&random);
  weight.FillRandom(&random);
  ExpectOk(Run(input, weight, &alone, 1e-6f));
  TestThreads threads(4);
  ExpectOk(Run(input, weight, &together, 1e-6f, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(Errors) {
  const TestTensor input(DType::kF16, {4, 64});
  const TestTensor weight(DType::kF16, {64});
  TestTensor out(DType::kF16, {4, 64});
  ExpectInvalid(
      Run(TestTensor(DType::kS32, {4, 64}), weight, &out, 1e-6f),
      "rms_norm: input must be float32, float16 or bfloat16, got int32");
  ExpectInvalid(Run(TestTensor(DType::kF16, {}), weight, &out, 1e-6f),
                "rms_norm: input must have rank 1 or more, got shape []");
  ExpectInvalid(Run(input, TestTensor(DType::kF32, {64}), &out, 1e-6f),
                "rms_norm: weight must be float16, got float32");
  ExpectInvalid(Run(input, TestTensor(DType::kF16, {32}), &out, 1e-6f),
                "rms_norm: weight must have shape [64], got [32]");
  ExpectInvalid(Run(input, TestTensor(DType::kF16, {1, 64}), &out, 1e-6f),
                "rms_norm: weight must have shape [64], got [1, 64]");
  TestTensor other_dtype(DType::kBF16, {4, 64});
  ExpectInvalid(Run(input, weight, &other_dtype, 1e-6f),
                "rms_norm: out must be float16, got bfloat16");
  TestTensor other_shape(DType::kF16, {4, 32});
  ExpectInvalid(Run(input, weight, &other_shape, 1e-6f),
                "rms_norm: out must have shape [4, 64], got [4, 32]");
  const float inf = std::numeric_limits<float>::infinity();
  for (const auto& [eps, text] :
       std::vector<std::pair<float, std::string>>{{0.0f, "0"},
                                                  {-1e-6f, "-1e-06"},
                                                  {inf, "inf"},
                                                  {std::nanf(""), "nan"}}) {
    ExpectInvalid(Run(input, weight, &out, eps),
                  "rms_norm: eps must be positive and finite, got " + text);
  }
  // No error wrote anything.
  EXPECT_TRUE(out.bytes() == TestTensor(DType::kF16, {4, 64}).bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  std::set<std::string> targets;
  for (size_t i = 0; i < count; ++i) {
    targets.insert(handlers[i].target);
    EXPECT_EQ(std::string(handlers[i].platform), "Host");
    if (handlers[i].target == std::string("xla_ops.rms_norm")) {
      EXPECT_TRUE(handlers[i].bundle.execute == xla_ops_rms_norm_cpu);
    }
  }
  const std::set<std::string> wanted = {"xla_ops.rms_norm",
                                        "xla_ops.rms_norm_backward",
                                        "xla_ops.rms_norm_backward_input"};
  EXPECT_TRUE(targets == wanted);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
