// The CPU handlers of rotary_embedding on hand-built frames: values against
// the definition, every error text, guard bytes, zero sizes, threads.

#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/rotary_embedding/rotary_embedding_checks.h"

extern "C" XLA_FFI_Error* xla_ops_rotary_embedding_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_rotary_embedding_one_cpu(XLA_FFI_CallFrame*);
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

CallStatus Run(const TestTensor& positions, const TestTensor& query,
               const TestTensor& key, const TestTensor& cache,
               TestTensor* query_out, TestTensor* key_out, int64_t head_size,
               bool is_neox, TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&positions, &query, &key, &cache});
  AddResults(&frame, {query_out, key_out});
  frame.AddAttr("head_size", head_size).AddAttr("is_neox", is_neox);
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_rotary_embedding_cpu);
}

CallStatus RunOne(const TestTensor& positions, const TestTensor& query,
                  const TestTensor& cache, TestTensor* query_out,
                  int64_t head_size, bool is_neox) {
  CallFrame frame;
  AddArgs(&frame, {&positions, &query, &cache});
  AddResults(&frame, {query_out});
  frame.AddAttr("head_size", head_size).AddAttr("is_neox", is_neox);
  return frame.Call(xla_ops_rotary_embedding_one_cpu);
}

// `value` rounded to `dtype`.
double Round(DType dtype, double value) {
  return TestTensor(dtype, {1}, {value}).Get(0);
}

// Every rounding is in the contract, so results are equal to the last bit.
// Products of fp32 numbers and sums of two are exact in double, or rounded
// there so finely that only a tie could differ.
void ExpectRotated(const TestTensor& positions, const TestTensor& in,
                   const TestTensor& cache, const TestTensor& out,
                   int64_t head_size, bool is_neox) {
  const DType dtype = in.dtype();
  const int64_t rotary_dim = cache.dims()[1];
  const int64_t pairs = rotary_dim / 2;
  const int64_t row = in.size() / positions.size();
  for (int64_t i = 0; i < in.size(); ++i) {
    const int64_t lane = i % head_size;
    const auto position = static_cast<int64_t>(positions.Get(i / row));
    double want = in.Get(i);
    if (lane < rotary_dim && position >= 0 && position < cache.dims()[0]) {
      const int64_t pair = is_neox ? lane % pairs : lane / 2;
      const bool first = is_neox ? lane < pairs : lane % 2 == 0;
      const int64_t distance = is_neox ? pairs : 1;
      const double other = in.Get(first ? i + distance : i - distance);
      const double cos = cache.Get(position * rotary_dim + pair);
      const double sin = cache.Get(position * rotary_dim + pairs + pair);
      const double a = Round(dtype, in.Get(i) * cos);
      const double b = Round(dtype, other * sin);
      want = Round(dtype, first ? a - b : a + b);
    }
    EXPECT_EQ(out.Get(i), want);
  }
  out.ExpectGuardsIntact();
}

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  const TestTensor positions(DType::kS64, {5}, {0, 3, -1, 8, 7});
  const struct {
    int64_t heads, kv_heads, head_size, rotary_dim;
  } kShapes[] = {{1, 1, 2, 2},   {3, 1, 7, 6},   {4, 2, 10, 4},
                 {6, 3, 64, 64}, {4, 1, 80, 32}, {2, 2, 16, 0}};
  for (const DType dtype : kDTypes) {
    for (const auto& shape : kShapes) {
      for (const bool is_neox : {true, false}) {
        TestTensor query(dtype, {5, shape.heads * shape.head_size});
        TestTensor key(dtype, {5, shape.kv_heads, shape.head_size});
        TestTensor cache(dtype, {8, shape.rotary_dim});
        for (TestTensor* t : {&query, &key, &cache}) t->FillRandom(&random);
        TestTensor query_out(dtype, query.dims());
        TestTensor key_out(dtype, key.dims());
        ExpectOk(Run(positions, query, key, cache, &query_out, &key_out,
                     shape.head_size, is_neox));
        ExpectRotated(positions, query, cache, query_out, shape.head_size,
                      is_neox);
        ExpectRotated(positions, key, cache, key_out, shape.head_size, is_neox);
        TestTensor alone(dtype, query.dims());
        ExpectOk(
            RunOne(positions, query, cache, &alone, shape.head_size, is_neox));
        EXPECT_TRUE(alone.bytes() == query_out.bytes());
        // In place, as a mutable front calls it.
        ExpectOk(Run(positions, query, key, cache, &query, &key,
                     shape.head_size, is_neox));
        EXPECT_TRUE(query.bytes() == query_out.bytes());
        EXPECT_TRUE(key.bytes() == key_out.bytes());
      }
    }
  }
}

XLA_OPS_TEST(BatchesOfSequences) {
  std::mt19937 random(2);
  const TestTensor positions(DType::kS64, {2, 3}, {0, 1, 2, 3, 1, 0});
  TestTensor query(DType::kF32, {2, 3, 4, 8});
  TestTensor key(DType::kF32, {2, 3, 16});
  TestTensor cache(DType::kF32, {4, 8});
  for (TestTensor* t : {&query, &key, &cache}) t->FillRandom(&random);
  TestTensor query_out(DType::kF32, query.dims());
  TestTensor key_out(DType::kF32, key.dims());
  ExpectOk(Run(positions, query, key, cache, &query_out, &key_out, 8, true));
  ExpectRotated(positions, query, cache, query_out, 8, true);
  ExpectRotated(positions, key, cache, key_out, 8, true);
}

XLA_OPS_TEST(EmptyOperandsAreSuccess) {
  const TestTensor cache(DType::kF32, {4, 8});
  const TestTensor none(DType::kS64, {0});
  TestTensor query(DType::kF32, {0, 16});
  ExpectOk(RunOne(none, query, cache, &query, 8, true));
  // No head; and no position is in range of an empty cache.
  const TestTensor positions(DType::kS64, {2}, {0, 1});
  TestTensor no_heads(DType::kF32, {2, 0, 8});
  ExpectOk(RunOne(positions, no_heads, cache, &no_heads, 8, true));
  TestTensor some(DType::kF32, {2, 8}, std::vector<double>(16, 3));
  TestTensor out(DType::kF32, {2, 8});
  ExpectOk(
      RunOne(positions, some, TestTensor(DType::kF32, {0, 8}), &out, 8, true));
  EXPECT_TRUE(out.bytes() == some.bytes());
}

// Positions of 32 bits give the same bits, and so does an fp32 cache of numbers
// that it rounds to.
XLA_OPS_TEST(Int32PositionsAndFloatCache) {
  std::mt19937 random(4);
  const std::vector<double> numbers = {3, -1, 0, 11, 40, 10};
  const TestTensor wide(DType::kS64, {6}, numbers);
  const TestTensor narrow(DType::kS32, {6}, numbers);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    TestTensor query(dtype, {6, 64});
    TestTensor cache(DType::kF32, {11, 16});
    query.FillRandom(&random);
    cache.FillRandom(&random);
    TestTensor rounded(dtype, {11, 16});
    for (int64_t i = 0; i < cache.size(); ++i) rounded.Set(i, cache.Get(i));
    for (const bool is_neox : {false, true}) {
      TestTensor want(dtype, {6, 64});
      ExpectOk(RunOne(wide, query, rounded, &want, 16, is_neox));
      for (const TestTensor* positions : {&wide, &narrow}) {
        for (const TestTensor* table : {&cache, &rounded}) {
          TestTensor out(dtype, {6, 64});
          ExpectOk(RunOne(*positions, query, *table, &out, 16, is_neox));
          EXPECT_TRUE(out.bytes() == want.bytes());
        }
      }
    }
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(3);
  TestTensor positions(DType::kS64, {301});
  for (int i = 0; i < 301; ++i) positions.Set(i, i % 40);
  TestTensor query(DType::kBF16, {301, 512});
  TestTensor key(DType::kBF16, {301, 128});
  TestTensor cache(DType::kBF16, {40, 64});
  for (TestTensor* t : {&query, &key, &cache}) t->FillRandom(&random);
  TestTensor alone_query(DType::kBF16, {301, 512});
  TestTensor alone_key(DType::kBF16, {301, 128});
  TestTensor query_out(DType::kBF16, {301, 512});
  TestTensor key_out(DType::kBF16, {301, 128});
  ExpectOk(
      Run(positions, query, key, cache, &alone_query, &alone_key, 64, false));
  TestThreads threads(4);
  ExpectOk(Run(positions, query, key, cache, &query_out, &key_out, 64, false,
               &threads));
  EXPECT_TRUE(query_out.bytes() == alone_query.bytes());
  EXPECT_TRUE(key_out.bytes() == alone_key.bytes());
}

XLA_OPS_TEST(Errors) {
  const TestTensor positions(DType::kS64, {2}, {0, 1});
  const TestTensor cache(DType::kF16, {4, 8});
  const TestTensor query(DType::kF16, {2, 32});
  const TestTensor key(DType::kF16, {2, 16});
  TestTensor query_out(DType::kF16, {2, 32});
  TestTensor key_out(DType::kF16, {2, 16});
  const auto expect = [&](const TestTensor& p, const TestTensor& q,
                          const TestTensor& k, const TestTensor& c,
                          int64_t head_size, const std::string& text) {
    ExpectInvalid(Run(p, q, k, c, &query_out, &key_out, head_size, true),
                  "rotary_embedding: " + text);
  };
  const auto f16 = [](std::vector<int64_t> dims) {
    return TestTensor(DType::kF16, dims);
  };
  expect(TestTensor(DType::kF32, {2}), query, key, cache, 8,
         "positions must be int64 or int32, got float32");
  expect(TestTensor(DType::kS64, {}), query, key, cache, 8,
         "positions must have shape [num_tokens] or [batch_size, seq_len], "
         "got []");
  expect(positions, query, key, cache, 0,
         "head_size must be at least 1, got 0");
  expect(positions, TestTensor(DType::kS32, {2, 32}), key, cache, 8,
         "query must be float32, float16 or bfloat16, got int32");
  const std::string shapes =
      " must have shape [2, num_heads * 8] or [2, num_heads, 8], got ";
  expect(positions, f16({2}), key, cache, 8, "query" + shapes + "[2]");
  expect(positions, f16({3, 32}), key, cache, 8, "query" + shapes + "[3, 32]");
  expect(positions, f16({2, 31}), key, cache, 8, "query" + shapes + "[2, 31]");
  expect(positions, f16({2, 4, 9}), key, cache, 8,
         "query" + shapes + "[2, 4, 9]");
  expect(positions, query, TestTensor(DType::kF32, {2, 16}), cache, 8,
         "key must be float16, got float32");
  TestTensor odd(DType::kF16, {2, 15});
  ExpectInvalid(Run(positions, query, odd, cache, &query_out, &odd, 8, true),
                "rotary_embedding: key" + shapes + "[2, 15]");
  TestTensor three(DType::kF16, {2, 24});
  ExpectInvalid(
      Run(positions, query, three, cache, &query_out, &three, 8, true),
      "rotary_embedding: key must have a number of heads that divides "
      "query's 4, got 3");
  expect(positions, query, key, TestTensor(DType::kBF16, {4, 8}), 8,
         "cos_sin_cache must be float16 or float32, got bfloat16");
  TestTensor wide(DType::kF32, {2, 32});
  ExpectInvalid(RunOne(positions, wide, cache, &wide, 8, true),
                "rotary_embedding: cos_sin_cache must be float32, got float16");
  expect(positions, query, key, f16({8}), 8,
         "cos_sin_cache must have shape [max_position, rotary_dim], got [8]");
  expect(positions, query, key, f16({4, 7}), 8,
         "cos_sin_cache must have an even last dimension of at most 8, got 7");
  expect(positions, query, key, f16({4, 10}), 8,
         "cos_sin_cache must have an even last dimension of at most 8, got "
         "10");
  ExpectInvalid(RunOne(positions, query, cache, &key_out, 8, true),
                "rotary_embedding: query result must have shape [2, 32], got "
                "[2, 16]");
  EXPECT_TRUE(query_out.bytes() == f16({2, 32}).bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 2u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.rotary_embedding");
  EXPECT_EQ(std::string(handlers[1].target), "xla_ops.rotary_embedding_one");
  EXPECT_EQ(std::string(handlers[0].platform), "Host");
}

// Checked by the CUDA handler alone, so on parameters as it would bind them.
XLA_OPS_TEST(CudaLimits) {
  RotaryEmbeddingParams params = {};
  params.num_tokens = 1;
  params.head_size = 1 << 20;
  params.query.num_heads = 1000;
  params.key.num_heads = 24;
  EXPECT_TRUE(CheckCudaLimits(params).success());
  params.key.num_heads = 25;
  EXPECT_EQ(CheckCudaLimits(params).message(),
            "rotary_embedding: query must have at most 1073741824 elements a "
            "token, key's included, got 1074790400");
  params.num_tokens = 0;  // nothing is launched
  EXPECT_TRUE(CheckCudaLimits(params).success());
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
