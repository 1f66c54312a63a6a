// xla_ops.new_op's CPU handler on hand-built frames: values against double
// arithmetic, every error text, guard bytes, no elements, threads.

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

extern "C" XLA_FFI_Error* xla_ops_new_op_cpu(XLA_FFI_CallFrame* call_frame);
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

CallStatus Run(const TestTensor& input, TestTensor* out, float scale,
               TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&input});
  AddResults(&frame, {out});
  frame.AddAttr("scale", scale).SetTaskRunner(threads);
  return frame.Call(xla_ops_new_op_cpu);
}

// The definition: the product, exact in double, rounded to fp32 and then to
// the tensor's type.
void ExpectNewOp(const TestTensor& input, const TestTensor& out, float scale) {
  const DType dtype = input.dtype();
  for (int64_t i = 0; i < input.size(); ++i) {
    const double exact = input.Get(i) * double{scale};
    const float rounded = static_cast<float>(exact);
    EXPECT_EQ(out.Get(i), TestTensor(dtype, {1}, {rounded}).Get(0));
  }
}

XLA_OPS_TEST(MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (const std::vector<int64_t>& dims :
         {std::vector<int64_t>{}, {1}, {7}, {3, 33}, {2, 3, 5}, {4099}}) {
      TestTensor input(dtype, dims);
      TestTensor out(dtype, dims);
      input.FillRandom(&random, 3.0);
      ExpectOk(Run(input, &out, 0.3f));
      ExpectNewOp(input, out, 0.3f);
      out.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(EmptyInputIsSuccess) {
  TestTensor input(DType::kF16, {3, 0, 8});
  TestTensor out(DType::kF16, {3, 0, 8});
  ExpectOk(Run(input, &out, 2.0f));
  out.ExpectGuardsIntact();
}

XLA_OPS_TEST(SpecialValues) {
  const double inf = std::numeric_limits<double>::infinity();
  TestTensor input(DType::kBF16, {4}, {std::nan(""), inf, -inf, 1});
  TestTensor out(DType::kBF16, {4});
  ExpectOk(Run(input, &out, -2.0f));
  EXPECT_TRUE(std::isnan(out.Get(0)));
  EXPECT_EQ(out.Get(1), -inf);
  EXPECT_EQ(out.Get(2), inf);
  EXPECT_EQ(out.Get(3), -2.0);
}

XLA_OPS_TEST(OutMayBeInput) {
  std::mt19937 random(2);
  TestTensor input(DType::kBF16, {5, 40});
  TestTensor out(DType::kBF16, {5, 40});
  input.FillRandom(&random);
  ExpectOk(Run(input, &out, 0.3f));
  ExpectOk(Run(input, &input, 0.3f));
  EXPECT_TRUE(input.bytes() == out.bytes());
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(3);
  TestTensor input(DType::kF16, {301, 1024});
  TestTensor alone(DType::kF16, {301, 1024});
  TestTensor together(DType::kF16, {301, 1024});
  input.FillRandom(&random);
  ExpectOk(Run(input, &alone, 0.3f));
  TestThreads threads(4);
  ExpectOk(Run(input, &together, 0.3f, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(Errors) {
  const TestTensor input(DType::kF16, {4, 64});
  TestTensor out(DType::kF16, {4, 64});
  ExpectInvalid(
      Run(TestTensor(DType::kS32, {4, 64}), &out, 1.0f),
      "new_op: input must be float32, float16 or bfloat16, got int32");
  TestTensor other_dtype(DType::kF32, {4, 64});
  ExpectInvalid(Run(input, &other_dtype, 1.0f),
                "new_op: out must be float16, got float32");
  TestTensor other_shape(DType::kF16, {4, 32});
  ExpectInvalid(Run(input, &other_shape, 1.0f),
                "new_op: out must have shape [4, 64], got [4, 32]");
  const float inf = std::numeric_limits<float>::infinity();
  ExpectInvalid(Run(input, &out, inf), "new_op: scale must be finite, got inf");
  ExpectInvalid(Run(input, &out, std::nanf("")),
                "new_op: scale must be finite, got nan");
  // No error wrote anything.
  EXPECT_TRUE(out.bytes() == TestTensor(DType::kF16, {4, 64}).bytes());
}

XLA_OPS_TEST(TableNamesTheTarget) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 1u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.new_op");
  EXPECT_EQ(std::string(handlers[0].platform), "Host");
  EXPECT_TRUE(handlers[0].bundle.execute == xla_ops_new_op_cpu);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
