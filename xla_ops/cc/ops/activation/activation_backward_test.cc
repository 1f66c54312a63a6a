// xla_ops.activation_backward's CPU handler on hand-built frames: values
// against differences in double arithmetic, every error text, guard bytes, zero
// sizes, threads.

#include "xla_ops/cc/ops/activation/activation_backward.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_activation_backward_cpu(XLA_FFI_CallFrame*);

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
constexpr float kThreshold = 0.5f, kAlpha = 1.702f, kLimit = 3.0f;
constexpr Activation kAll[] = {
    Activation::kSiluAndMul,    Activation::kMulAndSilu,
    Activation::kGeluAndMul,    Activation::kGeluTanhAndMul,
    Activation::kFatreluAndMul, Activation::kSwigluoaiAndMul,
    Activation::kGeluNew,       Activation::kGeluFast,
    Activation::kGeluQuick,
};

CallStatus Run(const std::string& activation, const TestTensor& grad,
               const TestTensor& input, TestTensor* dinput,
               TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&grad, &input});
  AddResults(&frame, {dinput});
  frame.AddAttr("activation", activation)
      .AddAttr("threshold", kThreshold)
      .AddAttr("alpha", kAlpha)
      .AddAttr("limit", kLimit)
      .SetTaskRunner(threads);
  return frame.Call(xla_ops_activation_backward_cpu);
}

// The forward in double, without roundings.
double Forward(Activation activation, double x, double y) {
  const auto swish = [](double v, double beta) {
    return v / (1 + std::exp(-beta * v));
  };
  const double kPi = std::acos(-1.0);
  const double tanh =
      std::tanh(std::sqrt(2 / kPi) * (x + 0.044715 * x * x * x));
  switch (activation) {
    case Activation::kSiluAndMul:
      return swish(x, 1) * y;
    case Activation::kMulAndSilu:
      return swish(y, 1) * x;
    case Activation::kGeluAndMul:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))) * y;
    case Activation::kGeluTanhAndMul:
      return 0.5 * x * (1 + tanh) * y;
    case Activation::kFatreluAndMul:
      return (x > kThreshold ? x : 0) * y;
    case Activation::kSwigluoaiAndMul:
      return (std::clamp<double>(y, -kLimit, kLimit) + 1) *
             swish(std::min<double>(x, kLimit), kAlpha);
    case Activation::kGeluQuick:
      return swish(x, 1.702f);
    default:
      return 0.5 * x * (1 + tanh);
  }
}

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

// Where element i of row t of grad has its x and y in the input.
int64_t IndexOf(Activation activation, int64_t size, int64_t at, bool second) {
  if (!IsGated(activation)) return at;
  if (activation == Activation::kSwigluoaiAndMul) return 2 * at + second;
  return at / size * 2 * size + at % size + second * size;
}

void ExpectGradient(Activation activation, const TestTensor& grad,
                    const TestTensor& input, const TestTensor& dinput) {
  const int64_t size = grad.dims().back();
  for (int64_t i = 0; i < grad.size(); ++i) {
    const int64_t at[] = {IndexOf(activation, size, i, false),
                          IndexOf(activation, size, i, true)};
    const double x = input.Get(at[0]);
    const double y = input.Get(at[1]);
    for (int which = 0; which < (IsGated(activation) ? 2 : 1); ++which) {
      constexpr double kStep = 1e-5;
      const double dx = which == 0 ? kStep : 0;
      const double dy = which == 0 ? 0 : kStep;
      const double slope = (Forward(activation, x + dx, y + dy) -
                            Forward(activation, x - dx, y - dy)) /
                           (2 * kStep);
      const double want = grad.Get(i) * slope;
      const double error = std::abs(dinput.Get(at[which]) - want);
      EXPECT_TRUE(error <= Rounding(grad.dtype()) * std::abs(want) +
                               1e-6 * std::abs(grad.Get(i)) *
                                   (1 + std::abs(x) + std::abs(y)) +
                               1e-7);
    }
  }
}

// Away from the corners of fatrelu and swigluoai, where there is no slope.
double AwayFromCorners(double value) {
  for (const double corner : {-3.0, 0.5, 3.0}) {
    if (std::abs(value - corner) < 0.02) return value + 0.06;
  }
  return value;
}

XLA_OPS_TEST(MatchesTheDerivative) {
  std::mt19937 random(1);
  for (const Activation activation : kAll) {
    const int64_t inputs = IsGated(activation) ? 2 : 1;
    for (const DType dtype : kDTypes) {
      for (const int64_t size : {1, 3, 8, 33}) {
        TestTensor grad(dtype, {2, 3, size});
        TestTensor input(dtype, {2, 3, inputs * size});
        TestTensor dinput(dtype, {2, 3, inputs * size});
        grad.FillRandom(&random);
        input.FillRandom(&random, 2.0);
        for (int64_t i = 0; i < input.size(); ++i) {
          input.Set(i, AwayFromCorners(input.Get(i)));
        }
        ExpectOk(Run(Name(activation), grad, input, &dinput));
        ExpectGradient(activation, grad, input, dinput);
        dinput.ExpectGuardsIntact();
      }
    }
  }
}

XLA_OPS_TEST(FarAwaySlopesAreZeroOrOne) {
  for (const Activation activation :
       {Activation::kGeluNew, Activation::kGeluFast, Activation::kGeluQuick}) {
    const TestTensor input(DType::kBF16, {4}, {-3e38, -200, 200, 3e38});
    const TestTensor grad(DType::kBF16, {4}, {1, 1, 1, 1});
    TestTensor dinput(DType::kBF16, {4});
    ExpectOk(Run(Name(activation), grad, input, &dinput));
    for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(dinput.Get(i), i < 2 ? 0. : 1.);
  }
}

XLA_OPS_TEST(CornersBelongToWhatIsBelow) {
  // x at the threshold is off; x and y at the limit still count.
  const TestTensor one(DType::kF32, {1}, {1});
  TestTensor dinput(DType::kF32, {2});
  ExpectOk(Run("fatrelu_and_mul", one,
               TestTensor(DType::kF32, {2}, {kThreshold, 2}), &dinput));
  EXPECT_EQ(dinput.Get(0), 0.0);
  EXPECT_EQ(dinput.Get(1), 0.0);
  ExpectOk(Run("swigluoai_and_mul", one,
               TestTensor(DType::kF32, {2}, {kLimit, -kLimit}), &dinput));
  EXPECT_TRUE(dinput.Get(0) < 0 && dinput.Get(1) > 0);
  ExpectOk(Run("swigluoai_and_mul", one,
               TestTensor(DType::kF32, {2}, {kLimit + 1, -kLimit - 1}),
               &dinput));
  EXPECT_EQ(dinput.Get(0), 0.0);
  EXPECT_EQ(dinput.Get(1), 0.0);
}

XLA_OPS_TEST(NanStaysNan) {
  const double nan = std::nan("");
  for (const Activation activation : kAll) {
    if (activation == Activation::kFatreluAndMul) continue;  // makes 0 of it
    const int64_t inputs = IsGated(activation) ? 2 : 1;
    const TestTensor grad(DType::kF32, {1}, {1});
    TestTensor input(DType::kF32, {inputs});
    TestTensor dinput(DType::kF32, {inputs});
    input.Fill(nan);
    dinput.Fill(0);
    ExpectOk(Run(Name(activation), grad, input, &dinput));
    for (int64_t i = 0; i < inputs; ++i) EXPECT_TRUE(std::isnan(dinput.Get(i)));
  }
}

XLA_OPS_TEST(EmptyInputIsSuccess) {
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{0, 8}, {2, 0, 8}, {3, 0}}) {
    std::vector<int64_t> half = dims;
    half.back() /= 2;
    TestTensor dinput(DType::kF16, dims);
    ExpectOk(Run("silu_and_mul", TestTensor(DType::kF16, half),
                 TestTensor(DType::kF16, dims), &dinput));
    dinput.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(5);
  TestTensor grad(DType::kF16, {301, 512});
  TestTensor input(DType::kF16, {301, 1024});
  TestTensor alone(DType::kF16, {301, 1024});
  TestTensor together(DType::kF16, {301, 1024});
  grad.FillRandom(&random);
  input.FillRandom(&random);
  ExpectOk(Run("gelu_tanh_and_mul", grad, input, &alone));
  TestThreads threads(4);
  ExpectOk(Run("gelu_tanh_and_mul", grad, input, &together, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(Errors) {
  constexpr DType kF16 = DType::kF16;
  const TestTensor input(kF16, {4, 64});
  const TestTensor grad(kF16, {4, 32});
  TestTensor dinput(kF16, {4, 64});
  const auto expect = [](const CallStatus& status, const char* text) {
    ExpectInvalid(status, std::string("activation_backward: ") + text);
  };
  for (const char* name : {"relu", "silu_and_mul_quant", ""}) {
    expect(
        Run(name, grad, input, &dinput),
        (std::string("activation must be an op with a gradient, got ") + name)
            .c_str());
  }
  const char* silu = "silu_and_mul";
  expect(Run(silu, grad, TestTensor(DType::kS32, {4, 64}), &dinput),
         "input must be float32, float16 or bfloat16, got int32");
  expect(Run(silu, grad, TestTensor(kF16, {}), &dinput),
         "input must have rank 1 or more, got shape []");
  expect(Run(silu, grad, TestTensor(kF16, {4, 7}), &dinput),
         "input must have an even last dimension, got 7");
  expect(Run(silu, TestTensor(DType::kF32, {4, 32}), input, &dinput),
         "grad must be float16, got float32");
  expect(Run(silu, input, input, &dinput),
         "grad must have shape [4, 32], got [4, 64]");
  expect(Run("gelu_new", grad, input, &dinput),
         "grad must have shape [4, 64], got [4, 32]");
  TestTensor other_dtype(DType::kF32, {4, 64});
  expect(Run(silu, grad, input, &other_dtype),
         "dinput must be float16, got float32");
  TestTensor other_shape(kF16, {4, 32});
  expect(Run(silu, grad, input, &other_shape),
         "dinput must have shape [4, 64], got [4, 32]");
  // No error wrote anything.
  EXPECT_TRUE(dinput.bytes() == TestTensor(kF16, {4, 64}).bytes());
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
