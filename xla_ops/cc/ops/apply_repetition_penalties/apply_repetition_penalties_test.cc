// The CPU handler of apply_repetition_penalties on hand-built frames: values
// against the definition, special ones, copies, every error text, threads.

#include "xla_ops/cc/ops/apply_repetition_penalties/apply_repetition_penalties.h"

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

extern "C" XLA_FFI_Error* xla_ops_apply_repetition_penalties_cpu(
    XLA_FFI_CallFrame*);
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

CallStatus Run(const TestTensor& logits, const TestTensor& prompt,
               const TestTensor& output, const TestTensor& penalties,
               TestTensor* result, TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&logits, &prompt, &output, &penalties});
  AddResults(&frame, {result});
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_apply_repetition_penalties_cpu);
}

TestTensor Mask(std::mt19937* random, int64_t rows, int64_t columns) {
  TestTensor mask(DType::kBool, {rows, columns});
  for (int64_t i = 0; i < mask.size(); ++i) mask.Set(i, (*random)() % 3 == 0);
  return mask;
}

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (const int64_t vocab : {1, 7, 64, 257}) {
      TestTensor logits(dtype, {3, vocab});
      TestTensor penalties(dtype, {3}, {1.3, 0.8, 1.0});
      logits.FillRandom(&random, 3.0);
      const TestTensor before = logits;
      const TestTensor prompt = Mask(&random, 3, vocab);
      const TestTensor output = Mask(&random, 3, vocab);
      ExpectOk(Run(logits, prompt, output, penalties, &logits));
      for (int64_t i = 0; i < logits.size(); ++i) {
        const auto x = static_cast<float>(before.Get(i));
        const auto p = static_cast<float>(penalties.Get(i / vocab));
        const bool repeated = prompt.Get(i) != 0 || output.Get(i) != 0;
        const float want = !repeated ? x : x > 0 ? x / p : x * p;
        EXPECT_EQ(logits.Get(i), TestTensor(dtype, {1}, {want}).Get(0));
      }
      logits.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(SpecialValues) {
  TestTensor logits(DType::kF32, {1, 5}, {NAN, kInf, -kInf, 0, -0.0});
  TestTensor all(DType::kBool, {1, 5});
  all.Fill(1);
  const TestTensor two(DType::kF32, {1}, {2});
  ExpectOk(Run(logits, all, all, two, &logits));
  EXPECT_TRUE(std::isnan(logits.Get(0)));
  EXPECT_EQ(logits.Get(1), kInf);
  EXPECT_EQ(logits.Get(2), -kInf);
  EXPECT_EQ(logits.Get(3), 0.0);
  EXPECT_TRUE(std::signbit(logits.Get(4)));
  TestTensor ones(DType::kF32, {1, 2}, {1, -1});
  TestTensor both(DType::kBool, {1, 2}, {1, 1});
  ExpectOk(Run(ones, both, both, TestTensor(DType::kF32, {1}, {0}), &ones));
  EXPECT_EQ(ones.Get(0), kInf);
  EXPECT_EQ(ones.Get(1), 0.0);
}

XLA_OPS_TEST(AResultOfItsOwnIsACopy) {
  std::mt19937 random(2);
  TestTensor logits(DType::kBF16, {4, 100});
  TestTensor penalties(DType::kBF16, {4});
  TestTensor result(DType::kBF16, {4, 100});
  logits.FillRandom(&random);
  penalties.Fill(1.5);
  const TestTensor prompt = Mask(&random, 4, 100);
  const TestTensor output = Mask(&random, 4, 100);
  const std::vector<unsigned char> before = logits.bytes();
  ExpectOk(Run(logits, prompt, output, penalties, &result));
  EXPECT_TRUE(logits.bytes() == before);
  ExpectOk(Run(logits, prompt, output, penalties, &logits));
  EXPECT_TRUE(logits.bytes() == result.bytes());
  EXPECT_TRUE(logits.bytes() != before);
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(3);
  TestTensor logits(DType::kF32, {5, 40001});
  TestTensor penalties(DType::kF32, {5});
  logits.FillRandom(&random);
  penalties.FillRandom(&random);
  const TestTensor prompt = Mask(&random, 5, 40001);
  const TestTensor output = Mask(&random, 5, 40001);
  TestTensor alone(DType::kF32, {5, 40001});
  TestTensor together(DType::kF32, {5, 40001});
  ExpectOk(Run(logits, prompt, output, penalties, &alone));
  TestThreads threads(4);
  ExpectOk(Run(logits, prompt, output, penalties, &together, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(NothingToDo) {
  for (const std::vector<int64_t>& dims :
       {std::vector<int64_t>{0, 8}, std::vector<int64_t>{3, 0}}) {
    TestTensor logits(DType::kF16, dims);
    const TestTensor mask(DType::kBool, dims);
    ExpectOk(
        Run(logits, mask, mask, TestTensor(DType::kF16, {dims[0]}), &logits));
    logits.ExpectGuardsIntact();
  }
}

XLA_OPS_TEST(Errors) {
  const TestTensor logits(DType::kF16, {4, 8});
  const TestTensor mask(DType::kBool, {4, 8});
  const TestTensor penalties(DType::kF16, {4});
  TestTensor out(DType::kF16, {4, 8});
  const auto expect = [&](const TestTensor& l, const TestTensor& p,
                          const TestTensor& o, const TestTensor& r,
                          const std::string& text) {
    ExpectInvalid(Run(l, p, o, r, &out),
                  "apply_repetition_penalties_: " + text);
  };
  expect(TestTensor(DType::kS32, {4, 8}), mask, mask, penalties,
         "logits must be float32, float16 or bfloat16, got int32");
  expect(TestTensor(DType::kF16, {4}), mask, mask, penalties,
         "logits must have shape [num_seqs, vocab_size], got [4]");
  const TestTensor bytes(DType::kU8, {4, 8});
  const TestTensor wide(DType::kBool, {4, 9});
  expect(logits, bytes, mask, penalties, "prompt_mask must be bool, got uint8");
  expect(logits, mask, bytes, penalties, "output_mask must be bool, got uint8");
  expect(logits, wide, mask, penalties,
         "prompt_mask must have shape [4, 8], got [4, 9]");
  expect(logits, mask, wide, penalties,
         "output_mask must have shape [4, 8], got [4, 9]");
  expect(logits, mask, mask, TestTensor(DType::kF32, {4}),
         "repetition_penalties must be float16, got float32");
  expect(logits, mask, mask, TestTensor(DType::kF16, {4, 1}),
         "repetition_penalties must have shape [4], got [4, 1]");
  TestTensor other(DType::kF16, {4, 16});
  ExpectInvalid(Run(logits, mask, mask, penalties, &other),
                "apply_repetition_penalties_: logits result must have shape "
                "[4, 8], got [4, 16]");
}

XLA_OPS_TEST(TableNamesTheTarget) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 1u);
  EXPECT_EQ(std::string(handlers[0].target),
            "xla_ops.apply_repetition_penalties");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
