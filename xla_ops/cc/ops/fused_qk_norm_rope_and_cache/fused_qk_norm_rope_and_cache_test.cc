// The CPU handlers of fused_qk_norm_rope_and_cache on hand-built frames: values
// against double arithmetic with weights and against rounded steps without, in
// both orders; caches of every layout and type against a slow model; unaliased
// caches, every error text, threads, debug reports.

#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache.h"

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/fused_qk_norm_rope_and_cache/fused_qk_norm_rope_and_cache_checks.h"

extern "C" {
XLA_FFI_Error* xla_ops_fused_qk_norm_rope_and_cache_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_fused_qk_norm_rope_and_cache_stacked_cpu(
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

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
constexpr int64_t kBlocks = 4;
constexpr int64_t kPage = 3;
constexpr int64_t kPositions = 11;

// Seven tokens: a slot, padding, out of range at either end and the extremes.
const std::vector<double>& Slots() {
  static const auto* slots =
      new std::vector<double>{5, -1, 0, 12, -9.2e18, 9.2e18, 11};
  return *slots;
}

struct Call {
  int64_t heads, kv_heads, dim;
  float eps = 1e-5f;
  bool is_neox = true;
  std::string kv_cache_dtype = "auto";
  int64_t num_blocks = kBlocks;
  int64_t page_size = kPage;
  int64_t block_stride, page_stride, head_stride;
  int64_t key_offset = 0;
  int64_t value_offset = 0;
  bool debug = false;
  TestTensor qkv, query, q_weight, k_weight, table, positions;
  TestTensor key_cache, value_cache, slots;
  TestTensor k_scale{DType::kF32, {1}, {0.5}};
  TestTensor v_scale{DType::kF32, {1}, {3}};

  Call(DType dtype, int64_t tokens, int64_t heads, int64_t kv_heads,
       int64_t dim, DType table_dtype, DType cache_dtype)
      : heads(heads),
        kv_heads(kv_heads),
        dim(dim),
        block_stride(kPage * kv_heads * dim),
        page_stride(kv_heads * dim),
        head_stride(dim),
        qkv(dtype, {tokens, (heads + 2 * kv_heads) * dim}),
        query(dtype, {tokens, heads, dim}),
        q_weight(dtype, {dim}),
        k_weight(dtype, {dim}),
        table(table_dtype, {kPositions, dim}),
        positions(DType::kS64, {tokens}),
        key_cache(cache_dtype, {kBlocks * kPage * kv_heads * dim}),
        value_cache(cache_dtype, {kBlocks * kPage * kv_heads, dim}),
        slots(DType::kS64, {tokens}) {
    std::mt19937 random(1);
    for (TestTensor* t : {&qkv, &query, &q_weight, &k_weight, &table,
                          &key_cache, &value_cache}) {
      t->FillRandom(&random);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      positions.Set(t, static_cast<double>(t * 5 % 13 - 1));
      slots.Set(t, t < 7 ? Slots()[t] : t % 7 == 0 ? 1 : -1);
    }
  }
  explicit Call(DType dtype) : Call(dtype, 7, 4, 2, 8, dtype, dtype) {}

  void Hnd() {
    page_stride = dim;
    head_stride = kPage * dim;
  }
  void RemoveWeights() { q_weight = k_weight = TestTensor(qkv.dtype(), {0}); }

  void AddAttrs(CallFrame* frame) const {
    frame->AddAttr("num_heads", heads)
        .AddAttr("num_kv_heads", kv_heads)
        .AddAttr("head_dim", dim)
        .AddAttr("eps", eps)
        .AddAttr("is_neox", is_neox)
        .AddAttr("kv_cache_dtype", kv_cache_dtype)
        .AddAttr("num_blocks", num_blocks)
        .AddAttr("page_size", page_size)
        .AddAttr("block_stride", block_stride)
        .AddAttr("page_stride", page_stride)
        .AddAttr("head_stride", head_stride)
        .AddAttr("key_offset", key_offset)
        .AddAttr("value_offset", value_offset)
        .AddAttr("debug", debug);
  }

  CallStatus Run(TestTensor* query_result, TestTensor* key_result,
                 TestTensor* value_result, TaskRunner* threads = nullptr) {
    CallFrame frame;
    AddArgs(&frame, {&qkv, &table, &positions, &slots, &q_weight, &k_weight,
                     &k_scale, &v_scale, &value_cache, &key_cache});
    AddResults(&frame, {query_result, key_result, value_result});
    AddAttrs(&frame);
    frame.SetTaskRunner(threads);
    return frame.Call(xla_ops_fused_qk_norm_rope_and_cache_cpu);
  }
  CallStatus Run(TaskRunner* threads = nullptr) {
    return Run(&query, &key_cache, &value_cache, threads);
  }
  CallStatus RunStacked(TestTensor* kv_cache) {
    CallFrame frame;
    AddArgs(&frame, {&qkv, &table, &positions, &slots, &q_weight, &k_weight,
                     &k_scale, &v_scale, kv_cache});
    AddResults(&frame, {&query, kv_cache});
    AddAttrs(&frame);
    return frame.Call(xla_ops_fused_qk_norm_rope_and_cache_stacked_cpu);
  }

  // Rows like those of qkv, in double: f(x, weight, position) works on each
  // head of queries and keys; a negative position does not rotate.
  template <typename F>
  std::vector<double> ForEachHead(F&& f) const {
    std::vector<double> out(qkv.size());
    for (int64_t i = 0; i < qkv.size(); ++i) out[i] = qkv.Get(i);
    for (int64_t t = 0; t < qkv.dims()[0]; ++t) {
      const auto position = static_cast<int64_t>(positions.Get(t));
      const bool rotate = position >= 0 && position < kPositions;
      for (int64_t h = 0; h < heads + kv_heads; ++h) {
        f(&out[(t * (heads + 2 * kv_heads) + h) * dim],
          h < heads ? q_weight : k_weight, rotate ? position : -1);
      }
    }
    return out;
  }

  // Elements a and b of pair i.
  std::pair<int64_t, int64_t> Pair(int64_t i) const {
    return is_neox ? std::pair(i, i + dim / 2) : std::pair(2 * i, 2 * i + 1);
  }

  // The definition with weights, in double; no rounding.
  std::vector<double> Exact() const {
    return ForEachHead(
        [&](double* x, const TestTensor& weight, int64_t position) {
          double sum = 0;
          for (int64_t d = 0; d < dim; ++d) sum += x[d] * x[d];
          const double scale = 1 / std::sqrt(sum / dim + eps);
          for (int64_t d = 0; d < dim; ++d) x[d] *= scale * weight.Get(d);
          for (int64_t i = 0; position >= 0 && i < dim / 2; ++i) {
            const double c = table.Get(position * dim + i);
            const double s = table.Get(position * dim + dim / 2 + i);
            const auto [a, b] = Pair(i);
            const double rotated = x[a] * c - x[b] * s;
            x[b] = x[b] * c + x[a] * s;
            x[a] = rotated;
          }
        });
  }

  // The definition without: every step rounded, to the bit.
  std::vector<double> Stepwise() const {
    TestTensor one(qkv.dtype(), {1});
    const auto round = [&](double value) {
      one.Set(0, value);
      return one.Get(0);
    };
    return ForEachHead([&](double* x, const TestTensor&, int64_t position) {
      for (int64_t i = 0; position >= 0 && i < dim / 2; ++i) {
        const double c = round(table.Get(position * dim + i));
        const double s = round(table.Get(position * dim + dim / 2 + i));
        const auto [a, b] = Pair(i);
        const double rotated = round(round(x[a] * c) - round(x[b] * s));
        x[b] = round(round(x[b] * c) + round(x[a] * s));
        x[a] = rotated;
      }
    });
  }

  // The same as the handler has them, of qkv's type: each token has a slot of
  // its own in caches of that type.
  TestTensor Rows() const {
    Call all = *this;
    const int64_t tokens = qkv.dims()[0], width = kv_heads * dim;
    all.kv_cache_dtype = "auto";
    all.num_blocks = tokens;
    all.page_size = 1;
    all.block_stride = width;
    all.head_stride = dim;
    all.key_offset = all.value_offset = 0;
    all.key_cache = all.value_cache = TestTensor(qkv.dtype(), {tokens * width});
    all.slots = TestTensor(DType::kS64, {tokens});
    for (int64_t t = 0; t < tokens; ++t) all.slots.Set(t, t);
    ExpectOk(all.Run());
    TestTensor rows(qkv.dtype(), qkv.dims());
    int64_t i = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      for (const auto& [part, columns] : {std::pair(&all.query, heads * dim),
                                          std::pair(&all.key_cache, width),
                                          std::pair(&all.value_cache, width)}) {
        for (int64_t d = 0; d < columns; ++d) {
          rows.Set(i++, part->Get(t * columns + d));
        }
      }
    }
    return rows;
  }

  // Writes head part `first` on of the rows of `from`, like qkv, into `cache`.
  void Model(const TestTensor& from, int64_t first, int64_t offset, float scale,
             TestTensor* cache) const {
    for (int64_t t = 0; t < slots.size(); ++t) {
      const double slot = slots.Get(t);
      if (slot < 0 || slot >= static_cast<double>(kBlocks * kPage)) continue;
      const int64_t at = static_cast<int64_t>(slot);
      for (int64_t i = 0; i < kv_heads * dim; ++i) {
        const double x =
            from.Get((t * (heads + 2 * kv_heads) + first) * dim + i);
        const bool same = cache->dtype() == from.dtype();
        cache->Set(offset + at / kPage * block_stride +
                       at % kPage * page_stride + i / dim * head_stride +
                       i % dim,
                   same ? x : static_cast<float>(x) / scale);
      }
    }
  }
};

double Epsilon(DType dtype) {
  return dtype == DType::kF32   ? std::ldexp(1.0, -23)
         : dtype == DType::kF16 ? std::ldexp(1.0, -10)
                                : std::ldexp(1.0, -7);
}

void ExpectSame(const TestTensor& got, const TestTensor& want) {
  got.ExpectGuardsIntact();
  EXPECT_TRUE(got.bytes() == want.bytes());
}

// Runs the call and holds its queries and caches to those of `rows`, and qkv to
// what it was.
void RunAndExpect(Call* call, const TestTensor& rows) {
  TestTensor keys = call->key_cache;
  TestTensor values = call->value_cache;
  const TestTensor qkv = call->qkv;
  ExpectOk(call->Run());
  ExpectSame(call->qkv, qkv);
  call->query.ExpectGuardsIntact();
  const int64_t row = rows.dims()[1], queries = call->heads * call->dim;
  for (int64_t i = 0; i < call->query.size(); ++i) {
    EXPECT_EQ(call->query.Get(i), rows.Get(i / queries * row + i % queries));
  }
  call->Model(rows, call->heads, 0, 0.5f, &keys);
  call->Model(rows, call->heads + call->kv_heads, 0, 3, &values);
  ExpectSame(call->key_cache, keys);
  ExpectSame(call->value_cache, values);
}

XLA_OPS_TEST(WithWeightsMatchesTheDefinition) {
  for (const DType dtype : kDTypes) {
    for (const DType table_dtype : {dtype, DType::kF32}) {
      for (const int64_t dim : {2, 6, 64, 80, 128}) {
        for (const bool is_neox : {false, true}) {
          Call call(dtype, 7, 3, 2, dim, table_dtype, dtype);
          call.is_neox = is_neox;
          if (is_neox) call.Hnd();
          const std::vector<double> want = call.Exact();
          const TestTensor rows = call.Rows();
          RunAndExpect(&call, rows);
          for (int64_t i = 0; i < rows.size(); ++i) {
            // Half a step of the type, and fp32's of the parts of a difference.
            const double tolerance = 0.5 * Epsilon(dtype) * std::abs(want[i]) +
                                     std::ldexp(64.0, -24);
            EXPECT_TRUE(std::abs(rows.Get(i) - want[i]) <= tolerance);
          }
        }
      }
    }
  }
}

XLA_OPS_TEST(WithoutWeightsRoundsEveryStep) {
  for (const DType dtype : kDTypes) {
    for (const DType table_dtype : {dtype, DType::kF32}) {
      for (const int64_t dim : {2, 6, 128}) {
        for (const bool is_neox : {false, true}) {
          Call call(dtype, 7, 3, 2, dim, table_dtype, dtype);
          call.is_neox = is_neox;
          call.RemoveWeights();
          const TestTensor rows(dtype, call.qkv.dims(), call.Stepwise());
          RunAndExpect(&call, rows);
        }
      }
    }
  }
}

XLA_OPS_TEST(ConvertsToFp8) {
  for (const DType dtype : kDTypes) {
    for (const auto& [name, cache_dtype] :
         {std::pair("fp8", DType::kF8E4M3FN),
          std::pair("fp8_e5m2", DType::kF8E5M2)}) {
      Call call(dtype, 7, 1, 2, 16, dtype, cache_dtype);
      call.kv_cache_dtype = name;
      RunAndExpect(&call, call.Rows());
    }
  }
}

XLA_OPS_TEST(AbsentScalesAreOne) {
  Call call(DType::kF16, 7, 1, 2, 16, DType::kF16, DType::kF8E4M3FN);
  call.kv_cache_dtype = "fp8";
  Call ones = call;
  call.k_scale = call.v_scale = TestTensor(DType::kF32, {0});
  ones.k_scale = ones.v_scale = TestTensor(DType::kF32, {1}, {1});
  ExpectOk(call.Run());
  ExpectOk(ones.Run());
  ExpectSame(call.key_cache, ones.key_cache);
  ExpectSame(call.value_cache, ones.value_cache);
}

XLA_OPS_TEST(StackedCachesAreOneBuffer) {
  Call call(DType::kBF16);
  const int64_t size = call.key_cache.size();
  // One element between the caches, and one before them.
  call.key_offset = 1;
  call.value_offset = size + 2;
  TestTensor kv(DType::kBF16, {2 * size + 2});
  kv.Fill(7);
  TestTensor want = kv;
  ExpectOk(call.RunStacked(&kv));
  const TestTensor rows = call.Rows();
  call.Model(rows, 4, call.key_offset, 1, &want);
  call.Model(rows, 6, call.value_offset, 1, &want);
  ExpectSame(kv, want);
}

XLA_OPS_TEST(UnaliasedCachesAreCopied) {
  Call call(DType::kF16);
  Call in_place = call;
  TestTensor keys(DType::kF16, call.key_cache.dims());
  TestTensor values(DType::kF16, call.value_cache.dims());
  ExpectOk(in_place.Run());
  const Call before = call;
  ExpectOk(call.Run(&call.query, &keys, &values));
  ExpectSame(call.query, in_place.query);
  ExpectSame(keys, in_place.key_cache);
  ExpectSame(values, in_place.value_cache);
  ExpectSame(call.key_cache, before.key_cache);
  ExpectSame(call.value_cache, before.value_cache);
}

XLA_OPS_TEST(TokensWithoutASlotAreRotated) {
  Call call(DType::kF16);
  Call all = call;
  call.slots = TestTensor(DType::kS64, {3}, {5, 6, 7});
  all.slots = TestTensor(DType::kS64, {7}, {5, 6, 7, -1, -1, -1, -1});
  ExpectOk(call.Run());
  ExpectOk(all.Run());
  ExpectSame(call.query, all.query);
  ExpectSame(call.key_cache, all.key_cache);
  ExpectSame(call.value_cache, all.value_cache);
}

XLA_OPS_TEST(LastTokenOfASlotWins) {
  Call call(DType::kF16, 300, 1, 2, 8, DType::kF16, DType::kF16);
  call.slots.Fill(5);
  TestThreads threads(4);
  ExpectOk(call.Run(&threads));
  const TestTensor rows = call.Rows();
  for (int64_t i = 0; i < 16; ++i) {
    EXPECT_EQ(call.key_cache.Get(5 * 16 + i), rows.Get(299 * 40 + 8 + i));
    EXPECT_EQ(call.value_cache.Get(5 * 16 + i), rows.Get(299 * 40 + 24 + i));
  }
}

XLA_OPS_TEST(Int32Positions) {
  Call call(DType::kF16);
  Call narrow = call;
  narrow.positions = TestTensor(DType::kS32, call.positions.dims());
  for (int64_t i = 0; i < narrow.positions.size(); ++i) {
    narrow.positions.Set(i, call.positions.Get(i));
  }
  ExpectOk(call.Run());
  ExpectOk(narrow.Run());
  ExpectSame(call.query, narrow.query);
  ExpectSame(call.key_cache, narrow.key_cache);
}

XLA_OPS_TEST(NothingToDo) {
  Call no_tokens(DType::kF16, 0, 4, 2, 8, DType::kF16, DType::kF16);
  const std::vector<unsigned char> before = no_tokens.key_cache.bytes();
  ExpectOk(no_tokens.Run());
  EXPECT_TRUE(no_tokens.key_cache.bytes() == before);
  Call no_kv_heads(DType::kF16, 3, 4, 0, 8, DType::kF16, DType::kF16);
  ExpectOk(no_kv_heads.Run());
  Call no_heads(DType::kF16, 3, 0, 0, 8, DType::kF16, DType::kF16);
  ExpectOk(no_heads.Run());
  // An empty cache, of no block or of no page, takes nothing; queries turn.
  Call full(DType::kF16);
  ExpectOk(full.Run());
  for (int64_t Call::* size : {&Call::num_blocks, &Call::page_size}) {
    Call empty(DType::kF16);
    empty.*size = 0;
    empty.key_cache = empty.value_cache = TestTensor(DType::kF16, {0});
    ExpectOk(empty.Run());
    ExpectSame(empty.query, full.query);
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Call alone(DType::kBF16, 301, 8, 2, 64, DType::kF32, DType::kBF16);
  Call together = alone;
  ExpectOk(alone.Run());
  TestThreads threads(4);
  ExpectOk(together.Run(&threads));
  ExpectSame(together.query, alone.query);
  ExpectSame(together.key_cache, alone.key_cache);
  ExpectSame(together.value_cache, alone.value_cache);
}

void ExpectError(const std::function<void(Call*)>& change,
                 const std::string& text) {
  Call call(DType::kF16);
  change(&call);
  ExpectInvalid(call.Run(), "fused_qk_norm_rope_and_cache: " + text);
}

TestTensor F16(std::vector<int64_t> dims) {
  return TestTensor(DType::kF16, std::move(dims));
}
TestTensor F32(std::vector<int64_t> dims) {
  return TestTensor(DType::kF32, std::move(dims));
}

XLA_OPS_TEST(ErrorsOfHeads) {
  ExpectError([](Call* c) { c->qkv = TestTensor(DType::kS32, {7, 64}); },
              "qkv must be float32, float16 or bfloat16, got int32");
  ExpectError([](Call* c) { c->heads = -1; },
              "num_heads must be at least 0, got -1");
  ExpectError([](Call* c) { c->kv_heads = -1; },
              "num_kv_heads must be at least 0, got -1");
  for (const int64_t dim : {-2, 0, 7}) {
    ExpectError(
        [dim](Call* c) { c->dim = dim; },
        "head_dim must be even and at least 2, got " + std::to_string(dim));
  }
  ExpectError([](Call* c) { c->qkv = F16({7, 32}); },
              "qkv must have shape [num_tokens, 64], got [7, 32]");
  ExpectError([](Call* c) { c->kv_heads = INT64_MAX; },
              "qkv must have shape [num_tokens, 9223372036854775807], got "
              "[7, 64]");
  ExpectError([](Call* c) { c->eps = 0; },
              "eps must be positive and finite, got 0");
  ExpectError([](Call* c) { c->q_weight = F16({0}); },
              "k_weight must be absent without q_weight, got shape [8]");
  ExpectError([](Call* c) { c->k_weight = F16({0}); },
              "k_weight must be given with q_weight, got None");
  ExpectError([](Call* c) { c->q_weight = F32({8}); },
              "q_weight must be float16, got float32");
  ExpectError([](Call* c) { c->q_weight = F16({4}); },
              "q_weight must have shape [8], got [4]");
  ExpectError([](Call* c) { c->k_weight = F32({8}); },
              "k_weight must be float16, got float32");
  ExpectError([](Call* c) { c->k_weight = F16({1, 8}); },
              "k_weight must have shape [8], got [1, 8]");
  ExpectError([](Call* c) { c->table = TestTensor(DType::kBF16, {11, 8}); },
              "cos_sin_cache must be float16 or float32, got bfloat16");
  ExpectError([](Call* c) { c->table = F16({11, 4}); },
              "cos_sin_cache must have shape [max_position, 8], got [11, 4]");
  ExpectError([](Call* c) { c->positions = F32({7}); },
              "position_ids must be int64 or int32, got float32");
  ExpectError([](Call* c) { c->positions = TestTensor(DType::kS64, {3}); },
              "position_ids must have shape [7], got [3]");
  Call wide(DType::kF32);
  wide.table = F16({11, 8});
  ExpectInvalid(wide.Run(),
                "fused_qk_norm_rope_and_cache: cos_sin_cache must be float32, "
                "got float16");
}

XLA_OPS_TEST(ErrorsOfCaches) {
  ExpectError([](Call* c) { c->slots = TestTensor(DType::kS32, {7}); },
              "slot_mapping must be int64, got int32");
  ExpectError([](Call* c) { c->slots = TestTensor(DType::kS64, {7, 1}); },
              "slot_mapping must have shape [num_tokens], got [7, 1]");
  ExpectError([](Call* c) { c->slots = TestTensor(DType::kS64, {8}); },
              "slot_mapping must have at most 7 elements, got 8");
  const std::pair<const char*, int64_t Call::*> kSizes[] = {
      {"num_blocks", &Call::num_blocks},
      {"page_size", &Call::page_size},
      {"block_stride", &Call::block_stride},
      {"page_stride", &Call::page_stride},
      {"head_stride", &Call::head_stride},
      {"key_offset", &Call::key_offset},
      {"value_offset", &Call::value_offset}};
  for (const auto& [name, size] : kSizes) {
    ExpectError([size = size](Call* c) { c->*size = -1; },
                std::string(name) + " must be at least 0, got -1");
  }
  ExpectError([](Call* c) { c->kv_cache_dtype = "int8"; },
              "kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got "
              "int8");
  ExpectError([](Call* c) { c->kv_cache_dtype = "fp8"; },
              "key_cache must be float8_e4m3fn or uint8, got float16");
  ExpectError([](Call* c) { c->key_cache = F32({192}); },
              "key_cache must be float16, got float32");
  ExpectError([](Call* c) { c->value_cache = F32({192}); },
              "value_cache must be float16, got float32");
  ExpectError([](Call* c) { c->key_cache = F16({191}); },
              "key_cache must have at least 192 elements, got 191");
  ExpectError([](Call* c) { c->value_offset = 1; },
              "value_cache must have at least 193 elements, got 192");
  ExpectError([](Call* c) { c->k_scale = F16({1}); },
              "k_scale must be float32, got float16");
  ExpectError([](Call* c) { c->v_scale = F32({2}); },
              "v_scale must have 1 element, got shape [2]");
  Call call(DType::kF16);
  const std::string op = "fused_qk_norm_rope_and_cache: ";
  TestTensor other = F16({3});
  ExpectInvalid(call.Run(&call.query, &call.key_cache, &other),
                op + "value_cache result must have shape [24, 8], got [3]");
  ExpectInvalid(call.Run(&call.query, &other, &call.value_cache),
                op + "key_cache result must have shape [192], got [3]");
  ExpectInvalid(call.Run(&other, &call.key_cache, &call.value_cache),
                op + "query result must have shape [7, 4, 8], got [3]");
  TestTensor wide_query(DType::kF32, {7, 4, 8});
  ExpectInvalid(call.Run(&wide_query, &call.key_cache, &call.value_cache),
                op + "query result must be float16, got float32");
  TestTensor kv = F16({192});
  call.value_offset = 1;
  ExpectInvalid(call.RunStacked(&kv),
                op + "kv_cache must have at least 193 elements, got 192");
}

// Checked by the CUDA handler alone, so on parameters as it would bind them.
XLA_OPS_TEST(CudaLimits) {
  FusedQkNormRopeAndCacheParams params = {};
  params.num_tokens = params.num_heads = 1;
  params.head_dim = int64_t{1} << 30;
  EXPECT_TRUE(CheckCudaLimits(params).success());
  params.num_heads = 2;
  EXPECT_EQ(CheckCudaLimits(params).message(),
            "fused_qk_norm_rope_and_cache: qkv must have at most 1073741824 "
            "elements a token, got 2147483648");
  params.num_tokens = 0;
  EXPECT_TRUE(CheckCudaLimits(params).success());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 2u);
  EXPECT_EQ(std::string(handlers[0].target),
            "xla_ops.fused_qk_norm_rope_and_cache");
  EXPECT_EQ(std::string(handlers[1].target),
            "xla_ops.fused_qk_norm_rope_and_cache_stacked");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
