// The CPU handlers of the activations on hand-built frames: values
// against double arithmetic, every error text, guard bytes, zero sizes,
// threads.

#include "xla_ops/cc/ops/activation/activation.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_silu_and_mul_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_mul_and_silu_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_gelu_and_mul_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_gelu_tanh_and_mul_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_silu_and_mul_quant_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_fatrelu_and_mul_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_swigluoai_and_mul_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_gelu_new_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_gelu_fast_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_gelu_quick_cpu(XLA_FFI_CallFrame*);
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
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Plain {
  Activation activation;
  XLA_FFI_Handler* handler;
};
constexpr Plain kPlain[] = {
    {Activation::kSiluAndMul, xla_ops_silu_and_mul_cpu},
    {Activation::kMulAndSilu, xla_ops_mul_and_silu_cpu},
    {Activation::kGeluAndMul, xla_ops_gelu_and_mul_cpu},
    {Activation::kGeluTanhAndMul, xla_ops_gelu_tanh_and_mul_cpu},
};

CallStatus Run(XLA_FFI_Handler* handler, const TestTensor& input,
               TestTensor* out, TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input});
  AddResults(&frame, {out});
  frame.SetTaskRunner(threads);
  return frame.Call(handler);
}

CallStatus RunQuant(const TestTensor& input, const TestTensor& scale,
                    TestTensor* out) {
  CallFrame frame;
  AddArgs(&frame, {&input, &scale});
  AddResults(&frame, {out});
  return frame.Call(xla_ops_silu_and_mul_quant_cpu);
}

constexpr Plain kAlone[] = {
    {Activation::kGeluNew, xla_ops_gelu_new_cpu},
    {Activation::kGeluFast, xla_ops_gelu_fast_cpu},
    {Activation::kGeluQuick, xla_ops_gelu_quick_cpu},
};

CallStatus RunFatrelu(const TestTensor& input, float threshold,
                      TestTensor* out) {
  CallFrame frame;
  AddArgs(&frame, {&input});
  AddResults(&frame, {out});
  frame.AddAttr("threshold", threshold);
  return frame.Call(xla_ops_fatrelu_and_mul_cpu);
}

CallStatus RunSwigluoai(const TestTensor& input, float alpha, float limit,
                        TestTensor* out) {
  CallFrame frame;
  AddArgs(&frame, {&input});
  AddResults(&frame, {out});
  frame.AddAttr("alpha", alpha).AddAttr("limit", limit);
  return frame.Call(xla_ops_swigluoai_and_mul_cpu);
}

// `value` rounded to `dtype`.
double Round(DType dtype, double value) {
  return TestTensor(dtype, {1}, {value}).Get(0);
}

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

// The definition in double, with its first rounding and not its second.
double Exact(Activation activation, DType dtype, double x, double y) {
  if (activation == Activation::kMulAndSilu) std::swap(x, y);
  double activated;
  if (activation == Activation::kGeluAndMul) {
    activated = 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  } else if (activation == Activation::kGeluTanhAndMul) {
    const double pi = std::acos(-1.0);
    activated = 0.5 * x *
                (1 + std::tanh(std::sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
  } else {
    activated = x / (1 + std::exp(-x));
  }
  return Round(dtype, activated) * y;
}

// 1.5 steps of the type: fp32's error in the activation can move the first
// rounding by one. 1 + erf and 1 + tanh cancel where x is negative, as they
// do in vLLM; that error is a few fp32 steps of x, not of the result.
void ExpectActivation(Activation activation, const TestTensor& input,
                      const TestTensor& out) {
  const DType dtype = input.dtype();
  const double steps = dtype == DType::kF32 ? 6 : 1.5;
  const int64_t size = input.dims().back() / 2;
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t at = i / size * 2 * size + i % size;
    const double x = input.Get(at);
    const double y = input.Get(at + size);
    const double want = Exact(activation, dtype, x, y);
    const double tolerance = steps * Epsilon(dtype) * std::abs(want) +
                             std::ldexp(4.0, -24) * std::abs(x * y) +
                             std::ldexp(2.0, -24);
    EXPECT_TRUE(std::abs(out.Get(i) - want) <= tolerance);
  }
}

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const Plain& op : kPlain) {
    for (const DType dtype : kDTypes) {
      for (const int64_t size : {1, 3, 7, 8, 16, 33, 257}) {
        for (const int64_t rows : {1, 3}) {
          TestTensor input(dtype, {rows, 2 * size});
          TestTensor out(dtype, {rows, size});
          input.FillRandom(&random, 3.0);
          ExpectOk(Run(op.handler, input, &out));
          ExpectActivation(op.activation, input, out);
          out.ExpectGuardsIntact();
        }
      }
    }
  }
}

// The activation is rounded before the product: where one rounding would
// give another number, `out` has that of two.
XLA_OPS_TEST(RoundsBeforeTheProduct) {
  std::mt19937 random(2);
  TestTensor input(DType::kBF16, {64, 64});
  TestTensor out(DType::kBF16, {64, 32});
  input.FillRandom(&random);
  ExpectOk(Run(xla_ops_silu_and_mul_cpu, input, &out));
  int differ = 0;
  for (int64_t i = 0; i < out.size(); ++i) {
    const double x = input.Get(i / 32 * 64 + i % 32);
    const double y = input.Get(i / 32 * 64 + 32 + i % 32);
    const double once = Round(DType::kBF16, x / (1 + std::exp(-x)) * y);
    const double twice =
        Round(DType::kBF16, Exact(Activation::kSiluAndMul, DType::kBF16, x, y));
    differ += twice != once;
    EXPECT_EQ(out.Get(i), twice);
  }
  EXPECT_TRUE(differ > 100);  // the two definitions can be told apart
}

XLA_OPS_TEST(QuantisesTheRoundedProduct) {
  std::mt19937 random(3);
  for (const DType dtype : kDTypes) {
    TestTensor input(dtype, {5, 66});
    TestTensor gated(dtype, {5, 33});
    TestTensor out(DType::kF8E4M3FN, {5, 33});
    const TestTensor scale(DType::kF32, {1}, {0.037});
    input.FillRandom(&random, 3.0);
    ExpectOk(Run(xla_ops_silu_and_mul_cpu, input, &gated));
    ExpectOk(RunQuant(input, scale, &out));
    const float inverse = 1.0f / static_cast<float>(scale.Get(0));
    for (int64_t i = 0; i < out.size(); ++i) {
      const float scaled = static_cast<float>(gated.Get(i)) * inverse;
      EXPECT_EQ(out.Get(i), Round(DType::kF8E4M3FN, scaled));
    }
    out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(SpecialValues) {
  TestTensor input(DType::kF32, {1, 8},
                   {NAN, kInf, -kInf, -200, /**/ 1, 2, 1, 1});
  TestTensor out(DType::kF32, {1, 4});
  ExpectOk(Run(xla_ops_silu_and_mul_cpu, input, &out));
  EXPECT_TRUE(std::isnan(out.Get(0)));
  EXPECT_EQ(out.Get(1), kInf);
  EXPECT_TRUE(std::isnan(out.Get(2)));  // -inf / inf, as in vLLM
  EXPECT_EQ(out.Get(3), 0.0);
  TestTensor quantised(DType::kF8E4M3FN, {1, 4});
  const TestTensor one(DType::kF32, {}, {1});
  ExpectOk(RunQuant(input, one, &quantised));
  EXPECT_EQ(quantised.Get(0), 448.0);  // NaN too, as in vLLM
  EXPECT_EQ(quantised.Get(1), 448.0);
  EXPECT_EQ(quantised.Get(2), 448.0);
  EXPECT_EQ(quantised.Get(3), 0.0);
  const TestTensor minus(DType::kF32, {1}, {-1});
  ExpectOk(RunQuant(input, minus, &quantised));
  EXPECT_EQ(quantised.Get(1), -448.0);
}

// With every rounding of the definition but the last.
double ExactAlone(Activation activation, DType dtype, double x) {
  const double c = 0.79788456f;
  const double k = 0.044715f;
  const auto round = [dtype](double value) { return Round(dtype, value); };
  double inner;
  if (activation == Activation::kGeluQuick) {
    return x / (1 + std::exp(-1.702 * x));
  } else if (activation == Activation::kGeluNew) {
    inner = c * round(x + round(k * round(round(x * x) * x)));
  } else {
    inner = round(c * x) * round(1 + round(round(k * x) * x));
  }
  return round(0.5 * x) * round(1 + round(std::tanh(round(inner))));
}

XLA_OPS_TEST(WithoutAGate) {
  std::mt19937 random(7);
  for (const Plain& op : kAlone) {
    for (const DType dtype : kDTypes) {
      for (const int64_t size : {1, 7, 33, 257}) {
        TestTensor input(dtype, {3, size});
        TestTensor out(dtype, {3, size});
        input.FillRandom(&random, 3.0);
        ExpectOk(Run(op.handler, input, &out));
        for (int64_t i = 0; i < out.size(); ++i) {
          const double x = input.Get(i);
          const double want = ExactAlone(op.activation, dtype, x);
          // A last bit of fp32's tanh may move T(1 + tanh) by one step.
          const double tolerance = Epsilon(dtype) * std::abs(want) +
                                   std::ldexp(4.0, -24) * std::abs(x);
          EXPECT_TRUE(std::abs(out.Get(i) - want) <= tolerance);
        }
        out.ExpectGuardsIntact();
      }
    }
  }
}

// Its result may lie in the input's buffer.
XLA_OPS_TEST(WithoutAGateInPlace) {
  std::mt19937 random(8);
  for (const Plain& op : kAlone) {
    TestTensor input(DType::kBF16, {5, 40});
    TestTensor out(DType::kBF16, {5, 40});
    input.FillRandom(&random, 3.0);
    ExpectOk(Run(op.handler, input, &out));
    ExpectOk(Run(op.handler, input, &input));
    EXPECT_TRUE(input.bytes() == out.bytes());
  }
}

XLA_OPS_TEST(FatreluKeepsWhatIsAboveTheThreshold) {
  const TestTensor input(DType::kBF16, {1, 12},
                         {0.5, 0.50390625, 3, -4, NAN, kInf,  //
                          2, 2, 1.0078125, 7, 5, -1});
  TestTensor out(DType::kBF16, {1, 6});
  ExpectOk(RunFatrelu(input, 0.5f, &out));
  const double want[] = {0, 1.0078125, Round(DType::kBF16, 3 * 1.0078125),
                         0, 0,         -kInf};
  for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(out.Get(i), want[i]);
  out.ExpectGuardsIntact();
}

XLA_OPS_TEST(SwigluoaiMatchesTheDefinition) {
  std::mt19937 random(9);
  for (const DType dtype : kDTypes) {
    for (const int64_t size : {1, 3, 8, 33, 257}) {
      TestTensor input(dtype, {3, 2 * size});
      TestTensor out(dtype, {3, size});
      input.FillRandom(&random, 6.0);
      ExpectOk(RunSwigluoai(input, 1.702f, 7.0f, &out));
      for (int64_t i = 0; i < out.size(); ++i) {
        const double gate = std::min(input.Get(2 * i), 7.0);
        const double up = std::clamp(input.Get(2 * i + 1), -7.0, 7.0);
        const double want =
            (up + 1) * gate / (1 + std::exp(-double{1.702f} * gate));
        const double tolerance =
            (0.5 * Epsilon(dtype) + std::ldexp(16.0, -24)) * std::abs(want) +
            std::ldexp(1.0, -24);
        EXPECT_TRUE(std::abs(out.Get(i) - want) <= tolerance);
      }
      out.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(SwigluoaiSpecialValues) {
  const TestTensor input(DType::kF32, {5, 2},
                         {NAN, 1, 1, NAN, kInf, -kInf, -kInf, 1, -200, 3});
  TestTensor out(DType::kF32, {5, 1});
  ExpectOk(RunSwigluoai(input, 1.702f, 7.0f, &out));
  EXPECT_TRUE(std::isnan(out.Get(0)));
  EXPECT_TRUE(std::isnan(out.Get(1)));
  EXPECT_TRUE(std::abs(out.Get(2) + 42) < 1e-3);  // (-7 + 1) * 7
  EXPECT_TRUE(std::isnan(out.Get(3)));            // -inf * 0, as in vLLM
  EXPECT_EQ(out.Get(4), 0.0);
  const float no_limit = std::numeric_limits<float>::infinity();
  ExpectOk(RunSwigluoai(input, 1.702f, no_limit, &out));
  EXPECT_EQ(out.Get(2), -kInf);
}

XLA_OPS_TEST(EmptyInputIsSuccess) {
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{0, 8}, {2, 0, 8}, {3, 0}}) {
    std::vector<int64_t> half = dims;
    half.back() /= 2;
    TestTensor input(DType::kF16, dims);
    TestTensor out(DType::kF16, half);
    ExpectOk(Run(xla_ops_gelu_and_mul_cpu, input, &out));
    out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(5);
  TestTensor input(DType::kF16, {301, 512});
  TestTensor alone(DType::kF16, {301, 256});
  TestTensor together(DType::kF16, {301, 256});
  input.FillRandom(&random);
  ExpectOk(Run(xla_ops_gelu_tanh_and_mul_cpu, input, &alone));
  TestThreads threads(4);
  ExpectOk(Run(xla_ops_gelu_tanh_and_mul_cpu, input, &together, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(Errors) {
  for (const Plain& op : kPlain) {
    const std::string name = Name(op.activation);
    TestTensor out(DType::kF16, {4, 32});
    ExpectInvalid(
        Run(op.handler, TestTensor(DType::kS32, {4, 64}), &out),
        name + ": input must be float32, float16 or bfloat16, got int32");
    ExpectInvalid(Run(op.handler, TestTensor(DType::kF16, {}), &out),
                  name + ": input must have rank 1 or more, got shape []");
    ExpectInvalid(Run(op.handler, TestTensor(DType::kF16, {4, 7}), &out),
                  name + ": input must have an even last dimension, got 7");
    ExpectInvalid(Run(op.handler, TestTensor(DType::kBF16, {4, 64}), &out),
                  name + ": out must be bfloat16, got float16");
    ExpectInvalid(Run(op.handler, TestTensor(DType::kF16, {4, 62}), &out),
                  name + ": out must have shape [4, 31], got [4, 32]");
    EXPECT_TRUE(out.bytes() == TestTensor(DType::kF16, {4, 32}).bytes());
  }
  for (const Plain& op : kAlone) {
    const std::string name = Name(op.activation);
    TestTensor out(DType::kF16, {4, 7});
    ExpectInvalid(
        Run(op.handler, TestTensor(DType::kS32, {4, 7}), &out),
        name + ": input must be float32, float16 or bfloat16, got int32");
    ExpectInvalid(Run(op.handler, TestTensor(DType::kF16, {}), &out),
                  name + ": input must have rank 1 or more, got shape []");
    ExpectInvalid(Run(op.handler, TestTensor(DType::kBF16, {4, 7}), &out),
                  name + ": out must be bfloat16, got float16");
    ExpectInvalid(Run(op.handler, TestTensor(DType::kF16, {4, 8}), &out),
                  name + ": out must have shape [4, 8], got [4, 7]");
  }
  const TestTensor input(DType::kF16, {4, 64});
  TestTensor gated(DType::kF16, {4, 32});
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  ExpectInvalid(RunFatrelu(TestTensor(DType::kF16, {7}), 0, &gated),
                "fatrelu_and_mul: input must have an even last dimension, "
                "got 7");
  ExpectInvalid(RunFatrelu(input, inf, &gated),
                "fatrelu_and_mul: threshold must be finite, got inf");
  ExpectInvalid(RunSwigluoai(TestTensor(DType::kF16, {7}), 1, 1, &gated),
                "swigluoai_and_mul: input must have an even last dimension, "
                "got 7");
  ExpectInvalid(RunSwigluoai(input, nan, 1, &gated),
                "swigluoai_and_mul: alpha must be finite, got nan");
  ExpectInvalid(RunSwigluoai(input, 1, -1, &gated),
                "swigluoai_and_mul: limit must be at least 0, got -1");
  ExpectInvalid(RunSwigluoai(input, 1, nan, &gated),
                "swigluoai_and_mul: limit must be at least 0, got nan");
  const TestTensor one(DType::kF32, {1}, {1});
  TestTensor out(DType::kF8E4M3FN, {4, 32});
  TestTensor plain(DType::kF16, {4, 32});
  ExpectInvalid(RunQuant(input, TestTensor(DType::kF16, {1}), &out),
                "silu_and_mul_quant: scale must be float32, got float16");
  ExpectInvalid(RunQuant(input, TestTensor(DType::kF32, {2}), &out),
                "silu_and_mul_quant: scale must have 1 element, got shape [2]");
  ExpectInvalid(RunQuant(input, one, &plain),
                "silu_and_mul_quant: out must be float8_e4m3fn, got float16");
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  std::set<std::string> targets;
  for (size_t i = 0; i < count; ++i) {
    targets.insert(handlers[i].target);
    EXPECT_EQ(std::string(handlers[i].platform), "Host");
    EXPECT_TRUE(handlers[i].bundle.execute != nullptr);
  }
  std::set<std::string> wanted = {"xla_ops.activation_backward"};
  for (int i = 0; i <= static_cast<int>(Activation::kGeluQuick); ++i) {
    wanted.insert(std::string("xla_ops.") + Name(static_cast<Activation>(i)));
  }
  EXPECT_TRUE(targets == wanted);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
