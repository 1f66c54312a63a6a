// The CPU handlers of int8_quant on hand-built frames: codes against double
// arithmetic, scales, zero points, special values, every error text, guard
// bytes, zero sizes, threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" {
XLA_FFI_Error* xla_ops_static_scaled_int8_quant_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_dynamic_scaled_int8_quant_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_dynamic_scaled_int8_azp_quant_cpu(XLA_FFI_CallFrame*);
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

CallStatus Call(XLA_FFI_Handler* handler,
                const std::vector<const TestTensor*>& args,
                const std::vector<TestTensor*>& results,
                TaskRunner* threads = nullptr) {
  CallFrame frame;
  for (const TestTensor* t : args) AddArgs(&frame, {t});
  for (TestTensor* t : results) AddResults(&frame, {t});
  frame.SetTaskRunner(threads);
  return frame.Call(handler);
}

struct Case {
  Case(DType dtype, int64_t rows, int64_t hidden, double offset = 0)
      : input(dtype, {rows, hidden}),
        scale(DType::kF32, {1}, {0.027}),
        out(DType::kS8, {rows, hidden}),
        scales(DType::kF32, {rows, 1}),
        azps(DType::kS32, {rows, 1}) {
    std::mt19937 random(1);
    input.FillRandom(&random, 3.0);
    for (int64_t i = 0; i < input.size(); ++i) {
      input.Set(i, input.Get(i) + offset);
    }
  }
  TestTensor input, scale, out, scales, azps;
};

// That `code` is an integer nearest to `want`, or the limit that it exceeds.
// fp32 rounding may move a tie.
void ExpectNearest(double want, double code) {
  EXPECT_TRUE(std::abs(code - std::clamp(want, -128.0, 127.0)) <= 0.5 + 1e-4);
}

XLA_OPS_TEST(MatchesTheDefinition) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int64_t hidden : {1, 7, 16, 33, 100, 257, 4099}) {
      Case c(dtype, 3, hidden, 5);
      ExpectOk(Call(xla_ops_static_scaled_int8_quant_cpu, {&c.input, &c.scale},
                    {&c.out}));
      for (int64_t i = 0; i < c.input.size(); ++i) {
        ExpectNearest(c.input.Get(i) / c.scale.Get(0), c.out.Get(i));
      }
      const TestTensor azp(DType::kS32, {}, {-150});
      ExpectOk(Call(xla_ops_static_scaled_int8_quant_cpu,
                    {&c.input, &c.scale, &azp}, {&c.out}));
      for (int64_t i = 0; i < c.input.size(); ++i) {
        ExpectNearest(c.input.Get(i) / c.scale.Get(0) - 150, c.out.Get(i));
      }
      ExpectOk(Call(xla_ops_dynamic_scaled_int8_quant_cpu, {&c.input},
                    {&c.out, &c.scales}));
      for (int64_t row = 0; row < 3; ++row) {
        double max = 0;
        for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
          max = std::max(max, std::abs(c.input.Get(i)));
        }
        EXPECT_EQ(c.scales.Get(row), static_cast<float>(max) / 127.0f);
        for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
          ExpectNearest(c.input.Get(i) / c.scales.Get(row), c.out.Get(i));
        }
      }
      c.out.ExpectGuardsIntact();
      if (hidden == 1) continue;
      ExpectOk(Call(xla_ops_dynamic_scaled_int8_azp_quant_cpu, {&c.input},
                    {&c.out, &c.scales, &c.azps}));
      for (int64_t row = 0; row < 3; ++row) {
        float max = c.input.Get(row * hidden);
        float min = max;
        for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
          max = std::max(max, static_cast<float>(c.input.Get(i)));
          min = std::min(min, static_cast<float>(c.input.Get(i)));
        }
        const double scale = (max - min) / 255.0f;
        EXPECT_EQ(c.scales.Get(row), scale);
        EXPECT_TRUE(std::abs(c.azps.Get(row) + 128 + min / scale) <=
                    0.5 + 1e-3);
        for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
          ExpectNearest(c.input.Get(i) / scale + c.azps.Get(row), c.out.Get(i));
        }
      }
      c.scales.ExpectGuardsIntact();
      c.azps.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(ConstantRowsAreSymmetric) {
  const TestTensor input(DType::kF32, {3, 2}, {0, 0, 3, 3, -0.25, -0.25});
  TestTensor out(DType::kS8, {3, 2});
  TestTensor scales(DType::kF32, {3, 1});
  TestTensor azps(DType::kS32, {3, 1});
  ExpectOk(Call(xla_ops_dynamic_scaled_int8_azp_quant_cpu, {&input},
                {&out, &scales, &azps}));
  const std::vector<double> codes = {0, 0, 127, 127, -127, -127};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(out.Get(i), codes[i]);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(azps.Get(i), 0.0);
  EXPECT_EQ(scales.Get(0), 0.0);
  EXPECT_EQ(scales.Get(1), 3.0f / 127.0f);
  EXPECT_EQ(scales.Get(2), 0.25f / 127.0f);
}

XLA_OPS_TEST(SpecialValues) {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::nan("");
  const TestTensor input(DType::kF32, {1, 6}, {nan, inf, -inf, 2.5, 3.5, -3e9});
  const TestTensor one(DType::kF32, {1}, {1});
  TestTensor out(DType::kS8, {1, 6});
  ExpectOk(Call(xla_ops_static_scaled_int8_quant_cpu, {&input, &one}, {&out}));
  std::vector<double> want = {0, 127, -128, 2, 4, -128};  // ties to even
  for (int i = 0; i < 6; ++i) EXPECT_EQ(out.Get(i), want[i]);
  // No overflow where the zero point is as large as it can be.
  const TestTensor azp(DType::kS32, {1}, {2147483647});
  ExpectOk(
      Call(xla_ops_static_scaled_int8_quant_cpu, {&input, &one, &azp}, {&out}));
  want = {127, 127, -1, 127, 127, -1};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(out.Get(i), want[i]);
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Case alone(DType::kF16, 301, 1024);
  Case together(DType::kF16, 301, 1024);
  TestThreads threads(4);
  ExpectOk(Call(xla_ops_dynamic_scaled_int8_azp_quant_cpu, {&alone.input},
                {&alone.out, &alone.scales, &alone.azps}));
  ExpectOk(Call(xla_ops_dynamic_scaled_int8_azp_quant_cpu, {&together.input},
                {&together.out, &together.scales, &together.azps}, &threads));
  EXPECT_TRUE(alone.out.bytes() == together.out.bytes());
  EXPECT_TRUE(alone.scales.bytes() == together.scales.bytes());
  EXPECT_TRUE(alone.azps.bytes() == together.azps.bytes());
}

XLA_OPS_TEST(NoElements) {
  for (const auto& [rows, hidden] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 8}, {3, 0}}) {
    Case c(DType::kBF16, rows, hidden);
    ExpectOk(Call(xla_ops_static_scaled_int8_quant_cpu, {&c.input, &c.scale},
                  {&c.out}));
    ExpectOk(Call(xla_ops_dynamic_scaled_int8_azp_quant_cpu, {&c.input},
                  {&c.out, &c.scales, &c.azps}));
    for (int64_t t = 0; t < rows; ++t) {
      EXPECT_EQ(c.scales.Get(t), 0.0);
      EXPECT_EQ(c.azps.Get(t), 0.0);
    }
    c.out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(Errors) {
  Case c(DType::kF16, 4, 64);
  const TestTensor integers(DType::kS32, {4, 64});
  const TestTensor scalar(DType::kF16, {});
  const TestTensor half(DType::kF16, {1}, {1});
  const TestTensor azp(DType::kS32, {1}, {0});
  const TestTensor wide_azp(DType::kS64, {1}, {0});
  TestTensor flat(DType::kS8, {256});
  TestTensor one(DType::kF32, {1});
  TestTensor one_azp(DType::kS32, {1});

  const auto fixed = [&](const std::vector<const TestTensor*>& args,
                         TestTensor* out, const char* text) {
    ExpectInvalid(Call(xla_ops_static_scaled_int8_quant_cpu, args, {out}),
                  std::string("static_scaled_int8_quant: ") + text);
  };
  fixed({&integers, &c.scale}, &c.out,
        "input must be float32, float16 or bfloat16, got int32");
  fixed({&scalar, &c.scale}, &c.out,
        "input must have rank 1 or more, got shape []");
  fixed({&c.input, &half}, &c.out, "scale must be float32, got float16");
  fixed({&c.input, &c.scales}, &c.out,
        "scale must have 1 element, got shape [4, 1]");
  fixed({&c.input, &c.scale, &wide_azp}, &c.out,
        "azp must be int32, got int64");
  fixed({&c.input, &c.scale, &c.azps}, &c.out,
        "azp must have 1 element, got shape [4, 1]");
  fixed({&c.input, &c.scale, &azp, &azp}, &c.out,
        "azp must be one operand at most, got 2");
  fixed({&c.input, &c.scale}, &one, "out must be int8, got float32");
  fixed({&c.input, &c.scale}, &flat, "out must have shape [4, 64], got [256]");

  const auto dynamic = [&](const std::vector<TestTensor*>& results,
                           const char* text) {
    ExpectInvalid(
        Call(xla_ops_dynamic_scaled_int8_azp_quant_cpu, {&c.input}, results),
        std::string("dynamic_scaled_int8_quant: ") + text);
  };
  dynamic({&one, &c.scales, &c.azps}, "out must be int8, got float32");
  dynamic({&c.out, &c.azps, &c.azps},
          "scale result must be float32, got int32");
  dynamic({&c.out, &one, &c.azps},
          "scale result must have shape [4, 1], got [1]");
  dynamic({&c.out, &c.scales, &one}, "azp result must be int32, got float32");
  dynamic({&c.out, &c.scales, &one_azp},
          "azp result must have shape [4, 1], got [1]");
  EXPECT_TRUE(c.out.bytes() == TestTensor(DType::kS8, {4, 64}).bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 3u);
  EXPECT_EQ(std::string(handlers[0].target),
            "xla_ops.static_scaled_int8_quant");
  EXPECT_EQ(std::string(handlers[1].target),
            "xla_ops.dynamic_scaled_int8_quant");
  EXPECT_EQ(std::string(handlers[2].target),
            "xla_ops.dynamic_scaled_int8_azp_quant");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
