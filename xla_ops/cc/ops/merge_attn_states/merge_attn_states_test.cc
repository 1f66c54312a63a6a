// xla_ops.merge_attn_states's CPU handler on hand-built frames: values
// against double arithmetic, every error text, guard bytes, zero sizes,
// threads.

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

extern "C" XLA_FFI_Error* xla_ops_merge_attn_states_cpu(XLA_FFI_CallFrame*);
extern "C" XlaOpsHandlersFn xla_ops_handlers;

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

constexpr double kInf = std::numeric_limits<double>::infinity();

CallStatus Run(const TestTensor& prefix, const TestTensor& prefix_lse,
               const TestTensor& suffix, const TestTensor& suffix_lse,
               TestTensor* output, TestTensor* output_lse,
               TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&prefix, &prefix_lse, &suffix, &suffix_lse});
  AddResults(&frame, {output, output_lse});
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_merge_attn_states_cpu);
}

double Epsilon(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return std::ldexp(1.0, -11);
    case DType::kBF16:
      return std::ldexp(1.0, -8);
    default:
      return std::ldexp(1.0, -24);
  }
}

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int64_t head_dim : {1, 7, 8, 40, 128}) {
      const int64_t tokens = 5;
      const int64_t heads = 3;
      TestTensor prefix(dtype, {tokens, heads, head_dim});
      TestTensor suffix(dtype, {tokens, heads, head_dim});
      TestTensor prefix_lse(DType::kF32, {heads, tokens});
      TestTensor suffix_lse(DType::kF32, {heads, tokens});
      for (TestTensor* t : {&prefix, &suffix}) t->FillRandom(&random);
      for (TestTensor* t : {&prefix_lse, &suffix_lse})
        t->FillRandom(&random, 5);
      prefix_lse.Set(1, -kInf);
      suffix_lse.Set(2, kInf);
      TestTensor output(dtype, prefix.dims());
      TestTensor output_lse(DType::kF32, prefix_lse.dims());
      ExpectOk(
          Run(prefix, prefix_lse, suffix, suffix_lse, &output, &output_lse));
      for (int64_t i = 0; i < output.size(); ++i) {
        const int64_t row = i / head_dim;
        const int64_t at = row % heads * tokens + row / heads;
        const double wp = at == 1 ? 0 : std::exp(prefix_lse.Get(at));
        const double ws = at == 2 ? 0 : std::exp(suffix_lse.Get(at));
        const double p = prefix.Get(i) * wp / (wp + ws);
        const double s = suffix.Get(i) * ws / (wp + ws);
        const double tolerance =
            Epsilon(dtype) * std::abs(p + s) +
            std::ldexp(8, -24) * (std::abs(p) + std::abs(s)) +
            std::ldexp(1, -25);
        EXPECT_TRUE(std::abs(output.Get(i) - (p + s)) <= tolerance);
        EXPECT_TRUE(std::abs(output_lse.Get(at) - std::log(wp + ws)) <= 4e-6);
      }
      output.ExpectGuardsIntact();
      output_lse.ExpectGuardsIntact();
      // In the buffer of either operand.
      TestTensor lse = output_lse;
      TestTensor into_prefix = prefix;
      ExpectOk(
          Run(into_prefix, prefix_lse, suffix, suffix_lse, &into_prefix, &lse));
      EXPECT_TRUE(into_prefix.bytes() == output.bytes());
      ExpectOk(Run(prefix, prefix_lse, suffix, suffix_lse, &suffix, &lse));
      EXPECT_TRUE(suffix.bytes() == output.bytes());
    }
  }
}

XLA_OPS_TEST(SidesWithoutKeys) {
  const TestTensor poison(DType::kF32, {1, 1, 2});
  const TestTensor value(DType::kF32, {1, 1, 2}, {3, -4});
  TestTensor output(DType::kF32, {1, 1, 2});
  TestTensor lse(DType::kF32, {1, 1});
  for (const double empty : {-kInf, kInf}) {
    const TestTensor none(DType::kF32, {1, 1}, {empty});
    const TestTensor some(DType::kF32, {1, 1}, {2.5});
    ExpectOk(Run(poison, none, value, some, &output, &lse));
    EXPECT_TRUE(output.bytes() == value.bytes());
    EXPECT_EQ(lse.Get(0), 2.5);
    ExpectOk(Run(value, some, poison, none, &output, &lse));
    EXPECT_TRUE(output.bytes() == value.bytes());
    ExpectOk(Run(value, none, poison, none, &output, &lse));
    EXPECT_TRUE(output.bytes() == value.bytes());
    EXPECT_EQ(lse.Get(0), -kInf);
    // NaN in either lse shows, beside an empty side too.
    const TestTensor nan(DType::kF32, {1, 1});
    ExpectOk(Run(value, nan, value, none, &output, &lse));
    EXPECT_TRUE(std::isnan(output.Get(0)) && std::isnan(lse.Get(0)));
    ExpectOk(Run(value, none, value, nan, &output, &lse));
    EXPECT_TRUE(std::isnan(output.Get(0)) && std::isnan(lse.Get(0)));
  }
}

XLA_OPS_TEST(EmptyOperandsAreSuccess) {
  TestTensor output(DType::kF16, {0, 2, 8});
  TestTensor lse(DType::kF32, {2, 0});
  ExpectOk(Run(output, lse, output, lse, &output, &lse));
  // With a head_dim of zero there is still an lse.
  TestTensor no_dim(DType::kF16, {1, 1, 0});
  const TestTensor zero(DType::kF32, {1, 1}, {0});
  TestTensor merged(DType::kF32, {1, 1});
  ExpectOk(Run(no_dim, zero, no_dim, zero, &no_dim, &merged));
  EXPECT_TRUE(std::abs(merged.Get(0) - std::log(2.0)) < 1e-6);
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(2);
  TestTensor prefix(DType::kBF16, {301, 4, 64});
  TestTensor suffix(DType::kBF16, {301, 4, 64});
  TestTensor prefix_lse(DType::kF32, {4, 301});
  TestTensor suffix_lse(DType::kF32, {4, 301});
  for (TestTensor* t : {&prefix, &suffix, &prefix_lse, &suffix_lse}) {
    t->FillRandom(&random);
  }
  TestTensor alone(DType::kBF16, {301, 4, 64});
  TestTensor together(DType::kBF16, {301, 4, 64});
  TestTensor alone_lse(DType::kF32, {4, 301});
  TestTensor together_lse(DType::kF32, {4, 301});
  ExpectOk(Run(prefix, prefix_lse, suffix, suffix_lse, &alone, &alone_lse));
  TestThreads threads(4);
  ExpectOk(Run(prefix, prefix_lse, suffix, suffix_lse, &together, &together_lse,
               &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
  EXPECT_TRUE(alone_lse.bytes() == together_lse.bytes());
}

XLA_OPS_TEST(Errors) {
  const TestTensor out16(DType::kF16, {4, 2, 8});
  const TestTensor out32(DType::kF32, {4, 2, 8});
  const TestTensor lse(DType::kF32, {2, 4});
  const TestTensor turned(DType::kF32, {4, 2});
  const TestTensor half(DType::kF16, {2, 4});
  TestTensor output(DType::kF16, {4, 2, 8});
  TestTensor output_lse(DType::kF32, {2, 4});
  const auto expect = [&](const TestTensor& p, const TestTensor& pl,
                          const TestTensor& s, const TestTensor& sl,
                          const std::string& text) {
    ExpectInvalid(Run(p, pl, s, sl, &output, &output_lse),
                  "merge_attn_states: " + text);
  };
  expect(TestTensor(DType::kS32, {4, 2, 8}), lse, out16, lse,
         "prefix_output must be float32, float16 or bfloat16, got int32");
  expect(TestTensor(DType::kF16, {4}), lse, out16, lse,
         "prefix_output must have shape [num_tokens, num_heads, head_dim], "
         "got [4]");
  expect(out16, half, out16, lse, "prefix_lse must be float32, got float16");
  expect(out16, turned, out16, lse,
         "prefix_lse must have shape [2, 4], got [4, 2]");
  expect(out16, lse, out32, lse, "suffix_output must be float16, got float32");
  expect(out16, lse, TestTensor(DType::kF16, {4, 2, 7}), lse,
         "suffix_output must have shape [4, 2, 8], got [4, 2, 7]");
  expect(out16, lse, out16, half, "suffix_lse must be float32, got float16");
  expect(out16, lse, out16, turned,
         "suffix_lse must have shape [2, 4], got [4, 2]");
  expect(out32, lse, out32, lse, "output must be float32, got float16");
  TestTensor wrong_lse(DType::kF32, {4, 2});
  ExpectInvalid(Run(out16, lse, out16, lse, &output, &wrong_lse),
                "merge_attn_states: output_lse must have shape [2, 4], got "
                "[4, 2]");
  EXPECT_TRUE(output.bytes() == out16.bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  std::set<std::string> targets;
  for (size_t i = 0; i < count; ++i) targets.insert(handlers[i].target);
  const std::set<std::string> wanted = {"xla_ops.merge_attn_states",
                                        "xla_ops.merge_attn_states_backward"};
  EXPECT_TRUE(targets == wanted);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
