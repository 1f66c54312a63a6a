// xla_ops.rms_norm_backward's CPU handlers on hand-built frames: values against
// double arithmetic, every error text, guard bytes, zero sizes, threads.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_rms_norm_backward_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_rms_norm_backward_input_cpu(
    XLA_FFI_CallFrame*);

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

const TestTensor& Absent() {
  static const auto* tensor = new TestTensor(DType::kF32, {0});
  return *tensor;
}

// `parts`: null for the target without them.
CallStatus Run(const TestTensor& grad, const TestTensor& input,
               const TestTensor& weight, const TestTensor& added,
               TestTensor* dx, TestTensor* parts, float eps = 1e-5f,
               TaskRunner* threads = nullptr, TestTensor* scratch = nullptr) {
  CallFrame frame;
  TestTensor none(DType::kF32, {0, weight.size()});
  AddArgs(&frame, {&grad, &input, &weight, &added});
  if (parts == nullptr) {
    AddResults(&frame, {dx});
  } else {
    AddResults(&frame, {dx, parts, scratch == nullptr ? &none : scratch});
  }
  frame.AddAttr("eps", eps).SetTaskRunner(threads);
  return frame.Call(parts == nullptr ? xla_ops_rms_norm_backward_input_cpu
                                     : xla_ops_rms_norm_backward_cpu);
}

// Half the distance between neighbours at 1.
double Rounding(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return std::ldexp(1.0, -11);
    case DType::kBF16:
      return std::ldexp(1.0, -8);
    default:
      return std::ldexp(1.0, -24);
  }
}

// The derivative of sum(g * w * x * s), with no rounding. fp32 sums are off by
// some units of the largest summand's last place.
void ExpectGradient(const TestTensor& grad, const TestTensor& input,
                    const TestTensor& weight, const TestTensor* added,
                    const TestTensor& dx, const TestTensor* parts,
                    double eps = 1e-5f) {
  const int64_t hidden = weight.size();
  const int64_t rows = input.size() / hidden;
  std::vector<double> want_weight(hidden, 0.0);
  std::vector<double> largest(hidden, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    double products = 0;
    for (int64_t i = 0; i < hidden; ++i) {
      const double x = input.Get(row * hidden + i);
      squares += x * x;
      products += x * grad.Get(row * hidden + i) * weight.Get(i);
    }
    const double s = 1 / std::sqrt(squares / hidden + eps);
    for (int64_t i = 0; i < hidden; ++i) {
      const double x = input.Get(row * hidden + i);
      const double g = grad.Get(row * hidden + i);
      const double a = s * g * weight.Get(i);
      const double b = s * s * s * x * products / hidden;
      const double c = added ? added->Get(row * hidden + i) : 0;
      const double want = a - b + c;
      const double error = std::abs(dx.Get(row * hidden + i) - want);
      EXPECT_TRUE(error <= Rounding(dx.dtype()) * std::abs(want) +
                               std::ldexp(1.0, -19) *
                                   (std::abs(a) + std::abs(b) + std::abs(c) +
                                    std::abs(s * weight.Get(i))) +
                               std::ldexp(1.0, -24));
      want_weight[i] += g * x * s;
      largest[i] += std::abs(g * x * s);
    }
  }
  if (parts == nullptr) return;
  for (int64_t i = 0; i < hidden; ++i) {
    double got = 0;
    for (int64_t p = 0; p < parts->size() / hidden; ++p) {
      got += parts->Get(p * hidden + i);
    }
    EXPECT_TRUE(std::abs(got - want_weight[i]) <=
                std::ldexp(1.0, -20) * largest[i]);
  }
}

XLA_OPS_TEST(MatchesTheDerivative) {
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (const int64_t hidden : {1, 2, 7, 16, 17, 100, 1024, 4099}) {
      for (const int64_t rows : {1, 5}) {
        for (const int64_t num_parts : {0, 1, 2, 3, 7}) {
          TestTensor grad(dtype, {rows, hidden});
          TestTensor input(dtype, {rows, hidden});
          TestTensor weight(dtype, {hidden});
          TestTensor added(dtype, {rows, hidden});
          TestTensor dx(dtype, {rows, hidden});
          TestTensor parts(DType::kF32, {num_parts, hidden});
          for (TestTensor* t : {&grad, &input, &weight, &added}) {
            t->FillRandom(&random, 2.0);
          }
          TestTensor* out = num_parts == 0 ? nullptr : &parts;
          ExpectOk(Run(grad, input, weight, Absent(), &dx, out));
          ExpectGradient(grad, input, weight, nullptr, dx, out);
          ExpectOk(Run(grad, input, weight, added, &dx, out));
          ExpectGradient(grad, input, weight, &added, dx, out);
          dx.ExpectGuardsIntact();
          parts.ExpectGuardsIntact();
        }
      }
    }
  }
}

XLA_OPS_TEST(AnyRank) {
  std::mt19937 random(3);
  TestTensor weight(DType::kF32, {8});
  weight.FillRandom(&random);
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{8}, {2, 8}, {2, 3, 8}}) {
    TestTensor grad(DType::kF32, dims);
    TestTensor input(DType::kF32, dims);
    TestTensor dx(DType::kF32, dims);
    TestTensor parts(DType::kF32, dims);
    grad.FillRandom(&random);
    input.FillRandom(&random);
    ExpectOk(Run(grad, input, weight, Absent(), &dx, &parts));
    ExpectGradient(grad, input, weight, nullptr, dx, &parts);
  }
}

XLA_OPS_TEST(NoRowsGiveZeros) {
  const TestTensor none(DType::kF16, {0, 8});
  const TestTensor weight(DType::kF16, {8});
  TestTensor dx(DType::kF16, {0, 8});
  TestTensor parts(DType::kF32, {2, 8});
  ExpectOk(Run(none, none, weight, Absent(), &dx, &parts));
  for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(parts.Get(i), 0.0);
  TestTensor no_parts(DType::kF32, {0, 8});
  ExpectOk(Run(none, none, weight, none, &dx, &no_parts));
  ExpectOk(Run(none, none, weight, none, &dx, nullptr));
  const TestTensor thin(DType::kF16, {3, 0});
  TestTensor thin_dx(DType::kF16, {3, 0});
  TestTensor thin_parts(DType::kF32, {1, 0});
  ExpectOk(Run(thin, thin, TestTensor(DType::kF16, {0}), Absent(), &thin_dx,
               &thin_parts));
}

XLA_OPS_TEST(LargeNumbersDoNotOverflow) {
  // Their squares do not fit in fp16, and their cubes not in fp32.
  const TestTensor grad(DType::kBF16, {1, 2}, {1e13, -1e13});
  const TestTensor input(DType::kBF16, {1, 2}, {1e14, 2e14});
  const TestTensor weight(DType::kBF16, {2}, {1, 1});
  TestTensor dx(DType::kBF16, {1, 2});
  ExpectOk(Run(grad, input, weight, Absent(), &dx, nullptr));
  ExpectGradient(grad, input, weight, nullptr, dx, nullptr);
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(5);
  TestTensor grad(DType::kF16, {301, 1024});
  TestTensor input(DType::kF16, {301, 1024});
  TestTensor weight(DType::kF16, {1024});
  grad.FillRandom(&random);
  input.FillRandom(&random);
  weight.FillRandom(&random);
  TestTensor alone(DType::kF16, {301, 1024});
  TestTensor together(DType::kF16, {301, 1024});
  TestTensor alone_parts(DType::kF32, {100, 1024});
  TestTensor together_parts(DType::kF32, {100, 1024});
  ExpectOk(Run(grad, input, weight, Absent(), &alone, &alone_parts));
  TestThreads threads(4);
  ExpectOk(Run(grad, input, weight, Absent(), &together, &together_parts, 1e-5f,
               &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
  EXPECT_TRUE(alone_parts.bytes() == together_parts.bytes());
}

XLA_OPS_TEST(Errors) {
  constexpr DType kF16 = DType::kF16;
  constexpr DType kF32 = DType::kF32;
  const TestTensor x(kF16, {4, 64});
  const TestTensor narrow(kF16, {4, 32});
  const TestTensor wide(kF32, {4, 64});
  const TestTensor weight(kF16, {64});
  TestTensor dx(kF16, {4, 64});
  TestTensor parts(kF32, {2, 64});
  const auto expect = [](const CallStatus& status, const char* text) {
    ExpectInvalid(status, std::string("rms_norm_backward: ") + text);
  };
  expect(
      Run(x, TestTensor(DType::kS32, {4, 64}), weight, Absent(), &dx, &parts),
      "input must be float32, float16 or bfloat16, got int32");
  expect(Run(x, TestTensor(kF16, {}), weight, Absent(), &dx, &parts),
         "input must have rank 1 or more, got shape []");
  expect(Run(wide, x, weight, Absent(), &dx, &parts),
         "grad must be float16, got float32");
  expect(Run(narrow, x, weight, Absent(), &dx, &parts),
         "grad must have shape [4, 64], got [4, 32]");
  expect(Run(x, x, TestTensor(kF32, {64}), Absent(), &dx, &parts),
         "weight must be float16, got float32");
  expect(Run(x, x, TestTensor(kF16, {32}), Absent(), &dx, &parts),
         "weight must have shape [64], got [32]");
  expect(Run(x, x, weight, wide, &dx, &parts),
         "added must be float16, got float32");
  expect(Run(x, x, weight, narrow, &dx, &parts),
         "added must have shape [4, 64], got [4, 32]");
  TestTensor wide_dx(kF32, {4, 64});
  expect(Run(x, x, weight, x, &wide_dx, nullptr),
         "dx must be float16, got float32");
  TestTensor narrow_dx(kF16, {4, 32});
  expect(Run(x, x, weight, x, &narrow_dx, nullptr),
         "dx must have shape [4, 64], got [4, 32]");
  TestTensor half_parts(kF16, {2, 64});
  expect(Run(x, x, weight, x, &dx, &half_parts),
         "parts must be float32, got float16");
  TestTensor narrow_parts(kF32, {4, 32});
  expect(Run(x, x, weight, x, &dx, &narrow_parts),
         "parts must have shape [..., 64], got [4, 32]");
  TestTensor no_parts(kF32, {0, 64});
  expect(Run(x, x, weight, x, &dx, &no_parts),
         "parts must have 1 row or more, got shape [0, 64]");
  expect(Run(x, x, weight, x, &dx, &parts, 1e-5f, /*threads=*/nullptr,
             &half_parts),
         "scratch must be float32, got float16");
  expect(Run(x, x, weight, x, &dx, &parts, 1e-5f, /*threads=*/nullptr,
             &narrow_parts),
         "scratch must have shape [..., 64], got [4, 32]");
  expect(Run(x, x, weight, x, &dx, &parts, 0.0f),
         "eps must be positive and finite, got 0");
  // No error wrote anything.
  EXPECT_TRUE(dx.bytes() == TestTensor(kF16, {4, 64}).bytes());
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
