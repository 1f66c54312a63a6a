// The CPU handlers of fp8_quant on hand-built frames: codes against double
// arithmetic, scales, special values, every error text, guard bytes, zero
// sizes, threads.

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
#include "xla_ops/cc/core/quant.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_static_scaled_fp8_quant_cpu(
    XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* xla_ops_dynamic_scaled_fp8_quant_cpu(
    XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* xla_ops_dynamic_per_token_scaled_fp8_quant_cpu(
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

constexpr DType kF8 = DType::kF8E4M3FN;

CallStatus Static(const TestTensor& input, const TestTensor& scale,
                  TestTensor* out, TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input, &scale});
  AddResults(&frame, {out});
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_static_scaled_fp8_quant_cpu);
}

CallStatus Dynamic(const TestTensor& input, TestTensor* out, TestTensor* scale,
                   TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input});
  AddResults(&frame, {out, scale});
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_dynamic_scaled_fp8_quant_cpu);
}

CallStatus PerToken(const TestTensor& input,
                    const std::vector<const TestTensor*>& scale_ub,
                    TestTensor* out, TestTensor* scale,
                    TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input});
  for (const TestTensor* t : scale_ub) AddArgs(&frame, {t});
  AddResults(&frame, {out, scale});
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_dynamic_per_token_scaled_fp8_quant_cpu);
}

// That `code` is an fp8 number nearest to `x`; the quotient's own rounding
// may move a tie.
void ExpectNearest(double x, double code) {
  x = std::clamp(x, -448.0, 448.0);
  const double step = std::ldexp(std::max(std::abs(x), std::ldexp(1, -6)), -4);
  EXPECT_TRUE(std::abs(code - x) <= step * (1 + 1e-5));
}

double AbsMaxOf(const TestTensor& x, int64_t begin, int64_t end) {
  double max = 0;
  for (int64_t i = begin; i < end; ++i) max = std::max(max, std::abs(x.Get(i)));
  return max;
}

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int64_t hidden : {1, 7, 16, 33, 100, 257, 4099}) {
      TestTensor input(dtype, {3, hidden});
      input.FillRandom(&random, 3.0);
      const TestTensor given(DType::kF32, {}, {0.0125});
      TestTensor out(kF8, {3, hidden});
      ExpectOk(Static(input, given, &out));
      for (int64_t i = 0; i < input.size(); ++i) {
        ExpectNearest(input.Get(i) / given.Get(0), out.Get(i));
      }
      out.ExpectGuardsIntact();

      TestTensor one(DType::kF32, {1});
      ExpectOk(Dynamic(input, &out, &one));
      EXPECT_EQ(one.Get(0),
                static_cast<float>(AbsMaxOf(input, 0, input.size()) / 448));
      for (int64_t i = 0; i < input.size(); ++i) {
        ExpectNearest(input.Get(i) / one.Get(0), out.Get(i));
      }
      one.ExpectGuardsIntact();

      const TestTensor bound(DType::kF32, {1}, {2.5});
      for (const bool bounded : {false, true}) {
        TestTensor scales(DType::kF32, {3, 1});
        std::vector<const TestTensor*> scale_ub;
        if (bounded) scale_ub.push_back(&bound);
        ExpectOk(PerToken(input, scale_ub, &out, &scales));
        for (int64_t row = 0; row < 3; ++row) {
          double max = AbsMaxOf(input, row * hidden, (row + 1) * hidden);
          if (bounded) max = std::min(max, 2.5);
          EXPECT_EQ(scales.Get(row), static_cast<float>(max / 448));
          for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) {
            ExpectNearest(input.Get(i) / scales.Get(row), out.Get(i));
          }
        }
        scales.ExpectGuardsIntact();
      }
    }
  }
}

XLA_OPS_TEST(SpecialValues) {
  const double inf = std::numeric_limits<double>::infinity();
  const TestTensor input(DType::kF32, {2, 4},
                         {std::nan(""), inf, -inf, 1, 0, 0, 0, 0});
  const TestTensor one(DType::kF32, {1}, {1});
  TestTensor out(kF8, {2, 4});
  ExpectOk(Static(input, one, &out));
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(out.Get(i), (std::vector<double>{448, 448, -448, 1})[i]);
  }
  TestTensor scales(DType::kF32, {2, 1});
  ExpectOk(PerToken(input, {}, &out, &scales));
  EXPECT_EQ(scales.Get(0), inf);
  EXPECT_EQ(out.Get(1), 448.0);  // inf / inf
  EXPECT_EQ(out.Get(3), 0.0);
  EXPECT_EQ(scales.Get(1), kMinFp8Scale);
  EXPECT_EQ(out.Get(4), 0.0);
  // Zeros only: no minimum, as in vLLM.
  const TestTensor zeros(DType::kF16, {3}, {0, 0, 0});
  TestTensor codes(kF8, {3});
  TestTensor scale(DType::kF32, {1});
  ExpectOk(Dynamic(zeros, &codes, &scale));
  EXPECT_EQ(scale.Get(0), 0.0);
  EXPECT_EQ(codes.Get(0), 448.0);
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(2);
  TestTensor input(DType::kBF16, {301, 1024});
  input.FillRandom(&random);
  TestTensor alone(kF8, {301, 1024});
  TestTensor together(kF8, {301, 1024});
  TestTensor scale(DType::kF32, {1});
  TestTensor other(DType::kF32, {1});
  TestThreads threads(4);
  ExpectOk(Dynamic(input, &alone, &scale));
  ExpectOk(Dynamic(input, &together, &other, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
  EXPECT_EQ(scale.Get(0), other.Get(0));
  TestTensor scales(DType::kF32, {301, 1});
  ExpectOk(PerToken(input, {}, &alone, &scales));
  ExpectOk(PerToken(input, {}, &together, &scales, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(NoElements) {
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{0, 8}, {3, 0}, {2, 0, 8}}) {
    const TestTensor input(DType::kF16, dims);
    TestTensor out(kF8, dims);
    TestTensor scale(DType::kF32, {1});
    ExpectOk(Static(input, TestTensor(DType::kF32, {1}, {1}), &out));
    ExpectOk(Dynamic(input, &out, &scale));
    EXPECT_EQ(scale.Get(0), 0.0);
    const int64_t tokens = dims[0] * (dims.size() == 3 ? dims[1] : 1);
    TestTensor scales(DType::kF32, {tokens, 1});
    ExpectOk(PerToken(input, {}, &out, &scales));
    for (int64_t t = 0; t < tokens; ++t) {
      EXPECT_EQ(scales.Get(t), kMinFp8Scale);
    }
    out.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(Errors) {
  const TestTensor input(DType::kF16, {2, 8});
  const TestTensor integers(DType::kS32, {2, 8});
  const TestTensor one(DType::kF32, {1}, {1});
  const TestTensor two(DType::kF32, {2}, {1, 1});
  const TestTensor half(DType::kF16, {1}, {1});
  TestTensor out(kF8, {2, 8});
  TestTensor flat(kF8, {16});
  TestTensor floats(DType::kF32, {2, 8});
  TestTensor scale(DType::kF32, {1});
  TestTensor scales(DType::kF32, {2, 1});

  const std::string fixed = "static_scaled_fp8_quant: ";
  ExpectInvalid(
      Static(integers, one, &out),
      fixed + "input must be float32, float16 or bfloat16, got int32");
  ExpectInvalid(Static(TestTensor(DType::kF16, {}), one, &out),
                fixed + "input must have rank 1 or more, got shape []");
  ExpectInvalid(Static(input, half, &out),
                fixed + "scale must be float32, got float16");
  ExpectInvalid(Static(input, two, &out),
                fixed + "scale must have 1 element, got shape [2]");
  ExpectInvalid(Static(input, one, &floats),
                fixed + "out must be float8_e4m3fn, got float32");
  ExpectInvalid(Static(input, one, &flat),
                fixed + "out must have shape [2, 8], got [16]");

  const std::string dynamic = "dynamic_scaled_fp8_quant: ";
  ExpectInvalid(Dynamic(input, &flat, &scale),
                dynamic + "out must have shape [2, 8], got [16]");
  ExpectInvalid(Dynamic(input, &out, &scales),
                dynamic + "scale result must have 1 element, got shape [2, 1]");

  const std::string token = "dynamic_per_token_scaled_fp8_quant: ";
  ExpectInvalid(PerToken(input, {&half}, &out, &scales),
                token + "scale_ub must be float32, got float16");
  ExpectInvalid(PerToken(input, {&two}, &out, &scales),
                token + "scale_ub must have 1 element, got shape [2]");
  ExpectInvalid(PerToken(input, {&one, &one}, &out, &scales),
                token + "scale_ub must be one operand at most, got 2");
  ExpectInvalid(PerToken(input, {}, &out, &scale),
                token + "scale result must have shape [2, 1], got [1]");
  ExpectInvalid(PerToken(input, {}, &floats, &scales),
                token + "out must be float8_e4m3fn, got float32");
  EXPECT_TRUE(out.bytes() == TestTensor(kF8, {2, 8}).bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  std::set<std::string> targets;
  for (size_t i = 0; i < count; ++i) targets.insert(handlers[i].target);
  const std::set<std::string> want = {
      "xla_ops.convert_fp8", "xla_ops.dynamic_per_token_scaled_fp8_quant",
      "xla_ops.dynamic_scaled_fp8_quant", "xla_ops.static_scaled_fp8_quant"};
  EXPECT_EQ(count, want.size());
  EXPECT_TRUE(targets == want);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
