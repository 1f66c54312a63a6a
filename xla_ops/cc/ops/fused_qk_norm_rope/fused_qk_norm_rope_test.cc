// The CPU handler of fused_qk_norm_rope on hand-built frames: values against
// double arithmetic in both orders, what stays, copies, every error text,
// threads.

#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope.h"

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope/fused_qk_norm_rope_checks.h"

extern "C" XLA_FFI_Error* xla_ops_fused_qk_norm_rope_cpu(XLA_FFI_CallFrame*);
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

struct Call {
  int64_t q, k, v, dim;
  float eps = 1e-5f;
  bool is_neox = true;
  TestTensor qkv, q_weight, k_weight, cache, positions;

  Call(DType dtype, int64_t tokens, int64_t q, int64_t k, int64_t v,
       int64_t dim, DType cache_dtype)
      : q(q),
        k(k),
        v(v),
        dim(dim),
        qkv(dtype, {tokens, (q + k + v) * dim}),
        q_weight(dtype, {dim}),
        k_weight(dtype, {dim}),
        cache(cache_dtype, {11, dim}),
        positions(DType::kS64, {tokens}) {
    std::mt19937 random(1);
    for (TestTensor* t : {&qkv, &q_weight, &k_weight, &cache}) {
      t->FillRandom(&random);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      positions.Set(t, static_cast<double>(t * 5 % 13 - 1));
    }
  }
  explicit Call(DType dtype) : Call(dtype, 4, 4, 2, 2, 8, dtype) {}

  CallStatus Run(TestTensor* result, TaskRunner* threads = nullptr) {
    CallFrame frame;
    AddArgs(&frame, {&qkv, &q_weight, &k_weight, &cache, &positions});
    AddResults(&frame, {result});
    frame.AddAttr("num_heads_q", q)
        .AddAttr("num_heads_k", k)
        .AddAttr("num_heads_v", v)
        .AddAttr("head_dim", dim)
        .AddAttr("eps", eps)
        .AddAttr("is_neox", is_neox);
    frame.SetTaskRunner(threads);
    return frame.Call(xla_ops_fused_qk_norm_rope_cpu);
  }

  // The definition in double; no rounding.
  std::vector<double> Exact() const {
    std::vector<double> out(qkv.size());
    for (int64_t i = 0; i < qkv.size(); ++i) out[i] = qkv.Get(i);
    const int64_t tokens = qkv.dims()[0];
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < q + k; ++h) {
        double* x = &out[(t * (q + k + v) + h) * dim];
        double sum = 0;
        for (int64_t d = 0; d < dim; ++d) sum += x[d] * x[d];
        const double scale = 1 / std::sqrt(sum / dim + eps);
        for (int64_t d = 0; d < dim; ++d) {
          x[d] *= scale * (h < q ? q_weight : k_weight).Get(d);
        }
        const auto position = static_cast<int64_t>(positions.Get(t));
        if (position < 0 || position >= cache.dims()[0]) continue;
        for (int64_t i = 0; i < dim / 2; ++i) {
          const double c = cache.Get(position * dim + i);
          const double s = cache.Get(position * dim + dim / 2 + i);
          double* a = x + (is_neox ? i : 2 * i);
          double* b = is_neox ? a + dim / 2 : a + 1;
          const double rotated = *a * c - *b * s;
          *b = *b * c + *a * s;
          *a = rotated;
        }
      }
    }
    return out;
  }
};

double Epsilon(DType dtype) {
  return dtype == DType::kF32   ? std::ldexp(1.0, -23)
         : dtype == DType::kF16 ? std::ldexp(1.0, -10)
                                : std::ldexp(1.0, -7);
}

XLA_OPS_TEST(MatchesTheDefinition) {
  for (const DType dtype : kDTypes) {
    for (const DType cache_dtype : {dtype, DType::kF32}) {
      for (const int64_t dim : {2, 6, 64, 80, 128}) {
        for (const bool is_neox : {false, true}) {
          Call call(dtype, 7, 3, 2, 1, dim, cache_dtype);
          call.is_neox = is_neox;
          TestTensor out(dtype, call.qkv.dims());
          const std::vector<unsigned char> before = call.qkv.bytes();
          ExpectOk(call.Run(&out));
          const std::vector<double> want = call.Exact();
          for (int64_t i = 0; i < out.size(); ++i) {
            // Half a step of the type, and fp32's of the parts of a difference.
            const double tolerance = 0.5 * Epsilon(dtype) * std::abs(want[i]) +
                                     std::ldexp(64.0, -24);
            EXPECT_TRUE(std::abs(out.Get(i) - want[i]) <= tolerance);
          }
          EXPECT_TRUE(call.qkv.bytes() == before);
          out.ExpectGuardsIntact();
          // The same in place.
          ExpectOk(call.Run(&call.qkv));
          EXPECT_TRUE(call.qkv.bytes() == out.bytes());
        }
      }
    }
  }
}

XLA_OPS_TEST(ValuesStay) {
  Call call(DType::kBF16, 5, 1, 1, 3, 16, DType::kBF16);
  TestTensor out(DType::kBF16, call.qkv.dims());
  ExpectOk(call.Run(&out));
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t i = 2 * 16; i < 5 * 16; ++i) {
      EXPECT_EQ(out.Get(t * 80 + i), call.qkv.Get(t * 80 + i));
    }
  }
}

XLA_OPS_TEST(Int32Positions) {
  Call call(DType::kF16);
  TestTensor want(DType::kF16, call.qkv.dims());
  TestTensor out(DType::kF16, call.qkv.dims());
  ExpectOk(call.Run(&want));
  TestTensor narrow(DType::kS32, call.positions.dims());
  for (int64_t i = 0; i < narrow.size(); ++i) {
    narrow.Set(i, call.positions.Get(i));
  }
  call.positions = narrow;
  ExpectOk(call.Run(&out));
  EXPECT_TRUE(out.bytes() == want.bytes());
}

XLA_OPS_TEST(NothingToDo) {
  Call no_tokens(DType::kF16, 0, 4, 2, 2, 8, DType::kF16);
  ExpectOk(no_tokens.Run(&no_tokens.qkv));
  Call only_values(DType::kF16, 3, 0, 0, 2, 8, DType::kF16);
  const std::vector<unsigned char> before = only_values.qkv.bytes();
  ExpectOk(only_values.Run(&only_values.qkv));
  EXPECT_TRUE(only_values.qkv.bytes() == before);
  Call no_heads(DType::kF16, 3, 0, 0, 0, 8, DType::kF16);
  ExpectOk(no_heads.Run(&no_heads.qkv));
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Call call(DType::kBF16, 301, 8, 2, 2, 64, DType::kF32);
  TestTensor alone(DType::kBF16, call.qkv.dims());
  TestTensor together(DType::kBF16, call.qkv.dims());
  ExpectOk(call.Run(&alone));
  TestThreads threads(4);
  ExpectOk(call.Run(&together, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

void ExpectError(const std::function<void(Call*)>& change,
                 const std::string& text) {
  Call call(DType::kF16);
  change(&call);
  ExpectInvalid(call.Run(&call.qkv), "fused_qk_norm_rope: " + text);
}

XLA_OPS_TEST(Errors) {
  const auto f16 = [](std::vector<int64_t> dims) {
    return TestTensor(DType::kF16, dims);
  };
  const auto f32 = [](std::vector<int64_t> dims) {
    return TestTensor(DType::kF32, dims);
  };
  ExpectError([](Call* c) { c->qkv = TestTensor(DType::kS32, {4, 64}); },
              "qkv must be float32, float16 or bfloat16, got int32");
  ExpectError([](Call* c) { c->q = -1; },
              "num_heads_q must be at least 0, got -1");
  ExpectError([](Call* c) { c->k = -1; },
              "num_heads_k must be at least 0, got -1");
  ExpectError([](Call* c) { c->v = -1; },
              "num_heads_v must be at least 0, got -1");
  for (const int64_t dim : {-2, 0, 7}) {
    ExpectError(
        [dim](Call* c) { c->dim = dim; },
        "head_dim must be even and at least 2, got " + std::to_string(dim));
  }
  ExpectError([&](Call* c) { c->qkv = f16({4, 32}); },
              "qkv must have shape [num_tokens, 64], got [4, 32]");
  ExpectError([&](Call* c) { c->qkv = f16({64}); },
              "qkv must have shape [num_tokens, 64], got [64]");
  ExpectError([](Call* c) { c->q = INT64_MAX; },
              "qkv must have shape [num_tokens, 9223372036854775807], got "
              "[4, 64]");
  ExpectError([](Call* c) { c->eps = 0; },
              "eps must be positive and finite, got 0");
  ExpectError([&](Call* c) { c->q_weight = f32({8}); },
              "q_weight must be float16, got float32");
  ExpectError([&](Call* c) { c->q_weight = f16({4}); },
              "q_weight must have shape [8], got [4]");
  ExpectError([&](Call* c) { c->k_weight = f32({8}); },
              "k_weight must be float16, got float32");
  ExpectError([&](Call* c) { c->k_weight = f16({1, 8}); },
              "k_weight must have shape [8], got [1, 8]");
  ExpectError([](Call* c) { c->cache = TestTensor(DType::kBF16, {11, 8}); },
              "cos_sin_cache must be float16 or float32, got bfloat16");
  ExpectError([&](Call* c) { c->cache = f16({11, 4}); },
              "cos_sin_cache must have shape [max_position, 8], got [11, 4]");
  ExpectError([&](Call* c) { c->positions = f32({4}); },
              "position_ids must be int64 or int32, got float32");
  ExpectError([](Call* c) { c->positions = TestTensor(DType::kS64, {3}); },
              "position_ids must have shape [4], got [3]");
  Call wide(DType::kF32);
  wide.cache = f16({11, 8});
  ExpectInvalid(wide.Run(&wide.qkv),
                "fused_qk_norm_rope: cos_sin_cache must be float32, got "
                "float16");
  Call call(DType::kF16);
  TestTensor other = f16({4, 32});
  ExpectInvalid(call.Run(&other),
                "fused_qk_norm_rope: qkv result must have shape [4, 64], got "
                "[4, 32]");
}

// Checked by the CUDA handler alone, so on parameters as it would bind them.
XLA_OPS_TEST(CudaLimits) {
  FusedQkNormRopeParams params = {};
  params.num_tokens = params.num_heads_v = 1;
  params.head_dim = int64_t{1} << 30;
  EXPECT_TRUE(CheckCudaLimits(params).success());
  params.num_heads_q = 1;
  EXPECT_EQ(CheckCudaLimits(params).message(),
            "fused_qk_norm_rope: qkv must have at most 1073741824 elements a "
            "token, got 2147483648");
  params.num_tokens = 0;
  EXPECT_TRUE(CheckCudaLimits(params).success());
}

XLA_OPS_TEST(TableNamesTheTarget) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 1u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.fused_qk_norm_rope");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
