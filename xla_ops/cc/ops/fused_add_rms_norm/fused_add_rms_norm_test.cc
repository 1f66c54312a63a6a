// xla_ops.fused_add_rms_norm's CPU handler on hand-built frames: values
// against double arithmetic, in place, every error text, guard bytes, zero
// sizes, threads.

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_fused_add_rms_norm_cpu(
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

constexpr float kEps = 1e-6f;

CallStatus Run(const TestTensor& input, const TestTensor& residual,
               const TestTensor& weight, TestTensor* out, TestTensor* sum,
               float eps = kEps, TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input, &residual, &weight});
  AddResults(&frame, {out, sum});
  frame.AddAttr("eps", eps).SetTaskRunner(threads);
  return frame.Call(xla_ops_fused_add_rms_norm_cpu);
}

struct Case {
  Case(DType dtype, int64_t rows, int64_t hidden, int seed)
      : input(dtype, {rows, hidden}),
        residual(dtype, {rows, hidden}),
        weight(dtype, {hidden}),
        out(dtype, {rows, hidden}),
        sum(dtype, {rows, hidden}) {
    std::mt19937 random(seed);
    input.FillRandom(&random, 3.0);
    residual.FillRandom(&random, 3.0);
    weight.FillRandom(&random);
  }
  TestTensor input, residual, weight, out, sum;
};

// Two roundings may each be moved by one step by the last bits of the sum.
double Tolerance(DType dtype, double want) {
  const int bits = dtype == DType::kF32 ? 19 : dtype == DType::kF16 ? 10 : 7;
  return 1.5 * std::ldexp(std::abs(want), -bits) + std::ldexp(2.0, -24);
}

XLA_OPS_TEST(MatchesTheDefinition) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int64_t hidden : {1, 2, 7, 15, 16, 17, 100, 257, 4099}) {
      Case c(dtype, 3, hidden, 1);
      ExpectOk(Run(c.input, c.residual, c.weight, &c.out, &c.sum));
      for (int64_t row = 0; row < 3; ++row) {
        double squares = 0;
        for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
          // Of a type that rounds to fp32 first, so as the kernel does.
          const float sum = static_cast<float>(c.input.Get(i)) +
                            static_cast<float>(c.residual.Get(i));
          EXPECT_EQ(c.sum.Get(i), TestTensor(dtype, {1}, {sum}).Get(0));
          squares += c.sum.Get(i) * c.sum.Get(i);
        }
        const double scale = 1 / std::sqrt(squares / hidden + kEps);
        for (int64_t i = 0; i < hidden; ++i) {
          const double normed = c.sum.Get(row * hidden + i) * scale;
          const double want =
              TestTensor(dtype, {1}, {normed}).Get(0) * c.weight.Get(i);
          const double got = c.out.Get(row * hidden + i);
          EXPECT_TRUE(std::abs(got - want) <= Tolerance(dtype, want));
        }
      }
      c.out.ExpectGuardsIntact();
      c.sum.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(ResultsMayBeTheArguments) {
  Case c(DType::kBF16, 5, 40, 2);
  ExpectOk(Run(c.input, c.residual, c.weight, &c.out, &c.sum));
  ExpectOk(Run(c.input, c.residual, c.weight, &c.input, &c.residual));
  EXPECT_TRUE(c.input.bytes() == c.out.bytes());
  EXPECT_TRUE(c.residual.bytes() == c.sum.bytes());
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Case alone(DType::kF16, 301, 1024, 3);
  Case together(DType::kF16, 301, 1024, 3);
  ExpectOk(
      Run(alone.input, alone.residual, alone.weight, &alone.out, &alone.sum));
  TestThreads threads(4);
  ExpectOk(Run(together.input, together.residual, together.weight,
               &together.out, &together.sum, kEps, &threads));
  EXPECT_TRUE(alone.out.bytes() == together.out.bytes());
  EXPECT_TRUE(alone.sum.bytes() == together.sum.bytes());
}

XLA_OPS_TEST(EmptyInputIsSuccess) {
  for (const auto& [rows, hidden] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 8}, {3, 0}}) {
    Case c(DType::kF16, rows, hidden, 4);
    ExpectOk(Run(c.input, c.residual, c.weight, &c.out, &c.sum));
    c.out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(Errors) {
  Case c(DType::kF16, 4, 64, 5);
  const auto expect = [&](const CallStatus& status, const char* text) {
    ExpectInvalid(status, std::string("fused_add_rms_norm: ") + text);
  };
  expect(Run(TestTensor(DType::kS32, {4, 64}), c.residual, c.weight, &c.out,
             &c.sum),
         "input must be float32, float16 or bfloat16, got int32");
  expect(Run(TestTensor(DType::kF16, {}), c.residual, c.weight, &c.out, &c.sum),
         "input must have rank 1 or more, got shape []");
  expect(
      Run(c.input, TestTensor(DType::kF32, {4, 64}), c.weight, &c.out, &c.sum),
      "residual must be float16, got float32");
  expect(
      Run(c.input, TestTensor(DType::kF16, {4, 32}), c.weight, &c.out, &c.sum),
      "residual must have shape [4, 64], got [4, 32]");
  expect(
      Run(c.input, c.residual, TestTensor(DType::kBF16, {64}), &c.out, &c.sum),
      "weight must be float16, got bfloat16");
  expect(
      Run(c.input, c.residual, TestTensor(DType::kF16, {32}), &c.out, &c.sum),
      "weight must have shape [64], got [32]");
  TestTensor other(DType::kF32, {4, 64});
  TestTensor narrow(DType::kF16, {4, 32});
  expect(Run(c.input, c.residual, c.weight, &other, &c.sum),
         "out must be float16, got float32");
  expect(Run(c.input, c.residual, c.weight, &narrow, &c.sum),
         "out must have shape [4, 64], got [4, 32]");
  expect(Run(c.input, c.residual, c.weight, &c.out, &other),
         "residual_out must be float16, got float32");
  expect(Run(c.input, c.residual, c.weight, &c.out, &narrow),
         "residual_out must have shape [4, 64], got [4, 32]");
  expect(Run(c.input, c.residual, c.weight, &c.out, &c.sum, 0.0f),
         "eps must be positive and finite, got 0");
  expect(Run(c.input, c.residual, c.weight, &c.out, &c.sum, std::nanf("")),
         "eps must be positive and finite, got nan");
  EXPECT_TRUE(c.out.bytes() == TestTensor(DType::kF16, {4, 64}).bytes());
}

XLA_OPS_TEST(TableNamesTheTarget) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 1u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.fused_add_rms_norm");
  EXPECT_EQ(std::string(handlers[0].platform), "Host");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
