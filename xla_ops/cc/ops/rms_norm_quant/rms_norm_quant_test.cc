// The CPU handlers of rms_norm_quant on hand-built frames: against the
// definition in double arithmetic, in place, every error text, guard bytes,
// zero sizes, threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/quant.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" {
XLA_FFI_Error* xla_ops_rms_norm_static_fp8_quant_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_fused_add_rms_norm_static_fp8_quant_cpu(
    XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_rms_norm_dynamic_per_token_quant_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_fused_add_rms_norm_dynamic_per_token_quant_cpu(
    XLA_FFI_CallFrame*);
XlaOpsHandlersFn xla_ops_handlers;
}

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

constexpr DType kF8 = DType::kF8E4M3FN;

CallStatus Call(XLA_FFI_Handler* handler,
                const std::vector<const TestTensor*>& args,
                const std::vector<TestTensor*>& results, float eps = 1e-6f,
                TaskRunner* threads = nullptr) {
  CallFrame frame;
  for (const TestTensor* t : args) AddArgs(&frame, {t});
  for (TestTensor* t : results) AddResults(&frame, {t});
  frame.AddAttr("eps", eps).SetTaskRunner(threads);
  return frame.Call(handler);
}

struct Case {
  Case(DType dtype, int64_t rows, int64_t hidden, DType quant = kF8)
      : input(dtype, {rows, hidden}),
        residual(dtype, {rows, hidden}),
        weight(dtype, {hidden}),
        scale(DType::kF32, {1}, {0.0125}),
        out(quant, {rows, hidden}),
        scales(DType::kF32, {rows, 1}),
        sum(dtype, {rows, hidden}) {
    std::mt19937 random(1);
    input.FillRandom(&random, 3.0);
    residual.FillRandom(&random, 3.0);
    weight.FillRandom(&random);
  }
  TestTensor input, residual, weight, scale, out, scales, sum;
};

double Round(DType dtype, double value) {
  return TestTensor(dtype, {1}, {value}).Get(0);
}

// y of the contract, for row `row` of the values that `x` gives.
template <typename X>
std::vector<double> Normalized(const Case& c, int64_t row, const X& x) {
  const int64_t hidden = c.weight.size();
  double squares = 0;
  for (int64_t i = 0; i < hidden; ++i) squares += std::pow(x(row, i), 2);
  const double s = 1 / std::sqrt(squares / hidden + 1e-6f);
  std::vector<double> y(hidden);
  for (int64_t i = 0; i < hidden; ++i) {
    const double normed = Round(c.input.dtype(), x(row, i) * s);
    y[i] = Round(c.input.dtype(), normed * c.weight.Get(i));
  }
  return y;
}

// That the codes of a row are y / scale, give or take a code's half step and
// what the last bits of the sum of squares move in y.
void ExpectCodes(const Case& c, int64_t row, const std::vector<double>& y,
                 double scale) {
  const double y_steps = c.input.dtype() == DType::kF32 ? 0x1p-18 : 0x1.8p-7;
  for (size_t i = 0; i < y.size(); ++i) {
    const double code = c.out.Get(row * y.size() + i);
    double want = y[i] / scale;
    double step = 0.5;
    if (c.out.dtype() == kF8) {
      want = std::clamp(want, -448.0, 448.0);
      step = std::ldexp(std::max(std::abs(want), 0x1p-6), -4);
    }
    EXPECT_TRUE(std::abs(code - want) <=
                step * 1.001 + std::abs(want) * y_steps);
  }
}

XLA_OPS_TEST(MatchesTheDefinition) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int64_t hidden : {1, 7, 16, 33, 100, 257, 4099}) {
      for (const DType quant : {kF8, DType::kS8}) {
        Case c(dtype, 3, hidden, quant);
        const auto x = [&](int64_t row, int64_t i) {
          return c.input.Get(row * hidden + i);
        };
        // In fp32, as the kernel adds.
        const auto sum = [&](int64_t row, int64_t i) -> double {
          return static_cast<float>(c.input.Get(row * hidden + i)) +
                 static_cast<float>(c.residual.Get(row * hidden + i));
        };
        const auto rounded = [&](int64_t row, int64_t i) {
          return Round(dtype, sum(row, i));
        };
        const auto expect_dynamic = [&](const auto& value) {
          for (int64_t row = 0; row < 3; ++row) {
            const std::vector<double> y = Normalized(c, row, value);
            double max = 0;
            for (const double v : y) max = std::max(max, std::abs(v));
            const double want = max / (quant == kF8 ? 448 : 127);
            EXPECT_TRUE(std::abs(c.scales.Get(row) - want) <=
                        want * (dtype == DType::kF32 ? 0x1p-18 : 0x1.8p-7));
            ExpectCodes(c, row, y, c.scales.Get(row));
          }
        };
        ExpectOk(Call(xla_ops_rms_norm_dynamic_per_token_quant_cpu,
                      {&c.input, &c.weight}, {&c.out, &c.scales}));
        expect_dynamic(x);
        ExpectOk(Call(xla_ops_fused_add_rms_norm_dynamic_per_token_quant_cpu,
                      {&c.input, &c.residual, &c.weight},
                      {&c.out, &c.scales, &c.sum}));
        expect_dynamic(sum);
        for (int64_t i = 0; i < c.sum.size(); ++i) {
          EXPECT_EQ(c.sum.Get(i), rounded(0, i));
        }
        c.scales.ExpectGuardsIntact();
        c.out.ExpectGuardsIntact();
        c.sum.ExpectGuardsIntact();
        if (quant != kF8) continue;
        ExpectOk(Call(xla_ops_rms_norm_static_fp8_quant_cpu,
                      {&c.input, &c.weight, &c.scale}, {&c.out}));
        for (int64_t row = 0; row < 3; ++row) {
          ExpectCodes(c, row, Normalized(c, row, x), c.scale.Get(0));
        }
        ExpectOk(Call(xla_ops_fused_add_rms_norm_static_fp8_quant_cpu,
                      {&c.input, &c.residual, &c.weight, &c.scale},
                      {&c.out, &c.sum}));
        for (int64_t row = 0; row < 3; ++row) {
          ExpectCodes(c, row, Normalized(c, row, rounded), c.scale.Get(0));
        }
      }
    }
  }
}

XLA_OPS_TEST(ScaleBoundLimitsTheScale) {
  Case c(DType::kF32, 3, 64);
  const TestTensor bound(DType::kF32, {}, {0.5});
  ExpectOk(Call(xla_ops_rms_norm_dynamic_per_token_quant_cpu,
                {&c.input, &c.weight, &bound}, {&c.out, &c.scales}));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(c.scales.Get(i), 0.5f / 448.0f);
}

XLA_OPS_TEST(ResidualMayBeUpdatedInPlace) {
  Case c(DType::kBF16, 5, 40);
  Case other(DType::kBF16, 5, 40);
  ExpectOk(Call(xla_ops_fused_add_rms_norm_dynamic_per_token_quant_cpu,
                {&c.input, &c.residual, &c.weight},
                {&c.out, &c.scales, &c.sum}));
  ExpectOk(Call(xla_ops_fused_add_rms_norm_dynamic_per_token_quant_cpu,
                {&other.input, &other.residual, &other.weight},
                {&other.out, &other.scales, &other.residual}));
  EXPECT_TRUE(c.out.bytes() == other.out.bytes());
  EXPECT_TRUE(c.sum.bytes() == other.residual.bytes());
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Case alone(DType::kF16, 301, 512);
  Case together(DType::kF16, 301, 512);
  TestThreads threads(4);
  ExpectOk(Call(xla_ops_rms_norm_dynamic_per_token_quant_cpu,
                {&alone.input, &alone.weight}, {&alone.out, &alone.scales}));
  ExpectOk(Call(xla_ops_rms_norm_dynamic_per_token_quant_cpu,
                {&together.input, &together.weight},
                {&together.out, &together.scales}, 1e-6f, &threads));
  EXPECT_TRUE(alone.out.bytes() == together.out.bytes());
  EXPECT_TRUE(alone.scales.bytes() == together.scales.bytes());
}

XLA_OPS_TEST(NoElements) {
  for (const auto& [rows, hidden] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 8}, {3, 0}}) {
    Case c(DType::kF16, rows, hidden, DType::kS8);
    ExpectOk(Call(xla_ops_rms_norm_dynamic_per_token_quant_cpu,
                  {&c.input, &c.weight}, {&c.out, &c.scales}));
    for (int64_t t = 0; t < rows; ++t) {
      EXPECT_EQ(c.scales.Get(t), kMinInt8Scale);
    }
    c.out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(Errors) {
  Case c(DType::kF16, 4, 64);
  Case int8(DType::kF16, 4, 64, DType::kS8);
  const TestTensor integers(DType::kS32, {4, 64});
  const TestTensor scalar(DType::kF16, {});
  const TestTensor floats(DType::kF32, {4, 64});
  const TestTensor narrow(DType::kF16, {4, 32});
  const TestTensor short_weight(DType::kF16, {32});
  const TestTensor half(DType::kF16, {1}, {1});
  TestTensor flat(kF8, {256});
  TestTensor one(DType::kF32, {1});

  const auto fixed = [&](const std::vector<const TestTensor*>& args,
                         TestTensor* out, float eps, const char* text) {
    ExpectInvalid(Call(xla_ops_rms_norm_static_fp8_quant_cpu, args, {out}, eps),
                  std::string("rms_norm_static_fp8_quant: ") + text);
  };
  fixed({&integers, &c.weight, &c.scale}, &c.out, 1,
        "input must be float32, float16 or bfloat16, got int32");
  fixed({&scalar, &c.weight, &c.scale}, &c.out, 1,
        "input must have rank 1 or more, got shape []");
  fixed({&c.input, &floats, &c.scale}, &c.out, 1,
        "weight must be float16, got float32");
  fixed({&c.input, &short_weight, &c.scale}, &c.out, 1,
        "weight must have shape [64], got [32]");
  fixed({&c.input, &c.weight, &half}, &c.out, 1,
        "scale must be float32, got float16");
  fixed({&c.input, &c.weight, &c.scales}, &c.out, 1,
        "scale must have 1 element, got shape [4, 1]");
  fixed({&c.input, &c.weight, &c.scale}, &int8.out, 1,
        "out must be float8_e4m3fn, got int8");
  fixed({&c.input, &c.weight, &c.scale}, &flat, 1,
        "out must have shape [4, 64], got [256]");
  fixed({&c.input, &c.weight, &c.scale}, &c.out, 0,
        "eps must be positive and finite, got 0");

  const std::string fused = "fused_add_rms_norm_static_fp8_quant: ";
  const auto fused_handler = xla_ops_fused_add_rms_norm_static_fp8_quant_cpu;
  ExpectInvalid(Call(fused_handler, {&c.input, &floats, &c.weight, &c.scale},
                     {&c.out, &c.sum}),
                fused + "residual must be float16, got float32");
  ExpectInvalid(Call(fused_handler, {&c.input, &narrow, &c.weight, &c.scale},
                     {&c.out, &c.sum}),
                fused + "residual must have shape [4, 64], got [4, 32]");
  ExpectInvalid(
      Call(fused_handler, {&c.input, &c.residual, &c.weight, &c.scale},
           {&c.out, &c.scales}),
      fused + "residual_out must be float16, got float32");

  const auto dynamic = [&](const std::vector<const TestTensor*>& args,
                           const std::vector<TestTensor*>& results,
                           const char* text) {
    ExpectInvalid(
        Call(xla_ops_rms_norm_dynamic_per_token_quant_cpu, args, results),
        std::string("rms_norm_dynamic_per_token_quant: ") + text);
  };
  dynamic({&c.input, &c.weight}, {&c.sum, &c.scales},
          "out must be float8_e4m3fn or int8, got float16");
  dynamic({&c.input, &c.weight}, {&c.out, &one},
          "scale result must have shape [4, 1], got [1]");
  dynamic({&c.input, &c.weight, &half}, {&c.out, &c.scales},
          "scale_ub must be float32, got float16");
  dynamic({&c.input, &c.weight, &c.scale, &c.scale}, {&c.out, &c.scales},
          "scale_ub must be one operand at most, got 2");
  dynamic({&c.input, &c.weight, &c.scale}, {&int8.out, &c.scales},
          "scale_ub must be left out for int8, got a tensor");
  EXPECT_TRUE(c.out.bytes() == TestTensor(kF8, {4, 64}).bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 4u);
  for (size_t i = 0; i < count; ++i) {
    EXPECT_EQ(std::string(handlers[i].platform), "Host");
  }
  EXPECT_EQ(std::string(handlers[3].target),
            "xla_ops.fused_add_rms_norm_dynamic_per_token_quant");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
