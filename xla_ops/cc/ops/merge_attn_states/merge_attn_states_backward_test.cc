// xla_ops.merge_attn_states_backward's CPU handler on hand-built frames: values
// against double arithmetic, empty sides, every error text, guard bytes, zero
// sizes, threads.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_merge_attn_states_backward_cpu(
    XLA_FFI_CallFrame*);

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

constexpr DType kF32 = DType::kF32;
constexpr DType kF16 = DType::kF16;
constexpr DType kDTypes[] = {kF32, kF16, DType::kBF16};
constexpr double kInf = std::numeric_limits<double>::infinity();

// A call's operands and results.
struct Call {
  Call(DType dtype, int64_t tokens, int64_t heads, int64_t dim)
      : grad(dtype, {tokens, heads, dim}),
        grad_lse(kF32, {heads, tokens}),
        prefix(dtype, {tokens, heads, dim}),
        prefix_lse(kF32, {heads, tokens}),
        suffix(dtype, {tokens, heads, dim}),
        suffix_lse(kF32, {heads, tokens}),
        dprefix(dtype, {tokens, heads, dim}),
        dprefix_lse(kF32, {heads, tokens}),
        dsuffix(dtype, {tokens, heads, dim}),
        dsuffix_lse(kF32, {heads, tokens}) {
    std::mt19937 random(1);
    for (TestTensor* t :
         {&grad, &grad_lse, &prefix, &prefix_lse, &suffix, &suffix_lse}) {
      t->FillRandom(&random, 2.0);
    }
  }

  CallStatus Run(TaskRunner* threads = nullptr) {
    CallFrame frame;
    AddArgs(&frame,
            {&grad, &grad_lse, &prefix, &prefix_lse, &suffix, &suffix_lse});
    AddResults(&frame, {&dprefix, &dprefix_lse, &dsuffix, &dsuffix_lse});
    frame.SetTaskRunner(threads);
    return frame.Call(xla_ops_merge_attn_states_backward_cpu);
  }

  TestTensor grad, grad_lse, prefix, prefix_lse, suffix, suffix_lse;
  TestTensor dprefix, dprefix_lse, dsuffix, dsuffix_lse;
};

double Rounding(DType dtype) {
  return std::ldexp(1.0, dtype == kF32 ? -24 : dtype == kF16 ? -11 : -8);
}

void ExpectNear(double got, double want, double bound) {
  EXPECT_TRUE(std::abs(got - want) <= bound);
}

// Where no side is empty.
void ExpectGradient(const Call& call) {
  const int64_t tokens = call.grad.dims()[0];
  const int64_t heads = call.grad.dims()[1];
  const int64_t dim = call.grad.dims()[2];
  const double rounding = Rounding(call.grad.dtype());
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = head * tokens + token;
      const double wp =
          1 / (1 + std::exp(call.suffix_lse.Get(at) - call.prefix_lse.Get(at)));
      const double ws = 1 - wp;
      double sum = 0;
      double size = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t i = (token * heads + head) * dim + d;
        const double g = call.grad.Get(i);
        const double part = g * (call.prefix.Get(i) - call.suffix.Get(i));
        sum += part;
        size += std::abs(part);
        const double bound = (rounding + 1e-6) * std::abs(g) + 1e-7;
        ExpectNear(call.dprefix.Get(i), wp * g, bound);
        ExpectNear(call.dsuffix.Get(i), ws * g, bound);
      }
      const bool has_lse = call.grad_lse.size() > 0;
      const double lse = has_lse ? call.grad_lse.Get(at) : 0;
      const double bound = 1e-6 * (size + std::abs(lse)) + 1e-7;
      ExpectNear(call.dprefix_lse.Get(at), wp * ws * sum + wp * lse, bound);
      ExpectNear(call.dsuffix_lse.Get(at), ws * lse - wp * ws * sum, bound);
    }
  }
}

XLA_OPS_TEST(MatchesTheDerivative) {
  for (const DType dtype : kDTypes) {
    for (const std::vector<int64_t>& dims :
         {std::vector<int64_t>{1, 1, 1}, {3, 2, 7}, {5, 3, 64}, {2, 1, 300}}) {
      for (const bool has_lse : {true, false}) {
        Call call(dtype, dims[0], dims[1], dims[2]);
        if (!has_lse) call.grad_lse = TestTensor(kF32, {0});
        ExpectOk(call.Run());
        ExpectGradient(call);
        for (const TestTensor* t : {&call.dprefix, &call.dprefix_lse,
                                    &call.dsuffix, &call.dsuffix_lse}) {
          t->ExpectGuardsIntact();
        }
      }
    }
  }
}

XLA_OPS_TEST(EmptySidesGetNothing) {
  for (const double empty : {-kInf, kInf}) {
    Call call(kF32, 1, 1, 4);
    call.suffix_lse.Set(0, empty);
    call.suffix.Fill(std::nan(""));
    ExpectOk(call.Run());
    for (int64_t i = 0; i < 4; ++i) {
      EXPECT_EQ(call.dprefix.Get(i), call.grad.Get(i));
      EXPECT_EQ(call.dsuffix.Get(i), 0.0);
    }
    EXPECT_EQ(call.dprefix_lse.Get(0), call.grad_lse.Get(0));
    EXPECT_EQ(call.dsuffix_lse.Get(0), 0.0);

    call.prefix_lse.Set(0, -empty);
    ExpectOk(call.Run());
    for (int64_t i = 0; i < 4; ++i) {
      EXPECT_EQ(call.dprefix.Get(i), call.grad.Get(i));
      EXPECT_EQ(call.dsuffix.Get(i), 0.0);
    }
    EXPECT_EQ(call.dprefix_lse.Get(0), 0.0);
    EXPECT_EQ(call.dsuffix_lse.Get(0), 0.0);
  }
}

XLA_OPS_TEST(ZeroSizes) {
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{0, 2, 8}, {3, 0, 8}, {3, 2, 0}}) {
    Call call(kF16, dims[0], dims[1], dims[2]);
    ExpectOk(call.Run());
    ExpectGradient(call);
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Call alone(kF16, 301, 8, 64);
  Call together(kF16, 301, 8, 64);
  ExpectOk(alone.Run());
  TestThreads threads(4);
  ExpectOk(together.Run(&threads));
  EXPECT_TRUE(alone.dprefix.bytes() == together.dprefix.bytes());
  EXPECT_TRUE(alone.dsuffix.bytes() == together.dsuffix.bytes());
  EXPECT_TRUE(alone.dprefix_lse.bytes() == together.dprefix_lse.bytes());
  EXPECT_TRUE(alone.dsuffix_lse.bytes() == together.dsuffix_lse.bytes());
}

// Calls with one tensor replaced.
void ExpectError(TestTensor Call::* member, TestTensor tensor,
                 const std::string& text) {
  Call call(kF16, 4, 2, 8);
  call.*member = std::move(tensor);
  ExpectInvalid(call.Run(), "merge_attn_states_backward: " + text);
}

XLA_OPS_TEST(Errors) {
  ExpectError(&Call::prefix, TestTensor(DType::kS32, {4, 2, 8}),
              "prefix_output must be float32, float16 or bfloat16, got int32");
  ExpectError(&Call::prefix, TestTensor(kF16, {4, 8}),
              "prefix_output must have shape [num_tokens, num_heads, head_dim],"
              " got [4, 8]");
  const struct {
    TestTensor Call::* member;
    const char* name;
  } outputs[] = {{&Call::grad, "grad_output"},
                 {&Call::suffix, "suffix_output"},
                 {&Call::dprefix, "dprefix_output"},
                 {&Call::dsuffix, "dsuffix_output"}};
  for (const auto& [member, name] : outputs) {
    ExpectError(member, TestTensor(kF32, {4, 2, 8}),
                std::string(name) + " must be float16, got float32");
    ExpectError(
        member, TestTensor(kF16, {4, 2, 16}),
        std::string(name) + " must have shape [4, 2, 8], got [4, 2, 16]");
  }
  const struct {
    TestTensor Call::* member;
    const char* name;
  } lses[] = {{&Call::grad_lse, "grad_lse"},
              {&Call::prefix_lse, "prefix_lse"},
              {&Call::suffix_lse, "suffix_lse"},
              {&Call::dprefix_lse, "dprefix_lse"},
              {&Call::dsuffix_lse, "dsuffix_lse"}};
  for (const auto& [member, name] : lses) {
    ExpectError(member, TestTensor(kF16, {2, 4}),
                std::string(name) + " must be float32, got float16");
    ExpectError(member, TestTensor(kF32, {4, 2}),
                std::string(name) + " must have shape [2, 4], got [4, 2]");
  }
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
