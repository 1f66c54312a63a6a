// xla_ops.grouped_matmul_backward_weight's CPU handler on hand-built frames:
// values against double arithmetic, offsets that are not what they should be,
// every error text, guard bytes, zero sizes, threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_grouped_matmul_backward_weight_cpu(
    XLA_FFI_CallFrame* call_frame);

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

// A call's operands and result.
struct Call {
  Call(DType dtype, int64_t rows, int64_t columns, int64_t depth,
       const std::vector<double>& offsets)
      : grad(dtype, {rows, columns}),
        input(dtype, {rows, depth}),
        offsets(DType::kS32, {static_cast<int64_t>(offsets.size())}, offsets),
        dweight(dtype,
                {static_cast<int64_t>(offsets.size()) - 1, columns, depth}) {
    std::mt19937 random(1);
    grad.FillRandom(&random);
    input.FillRandom(&random);
    dweight.Fill(std::nan(""));
  }

  CallStatus Run(TaskRunner* threads = nullptr) {
    CallFrame frame;
    AddArgs(&frame, {&grad, &input, &offsets});
    AddResults(&frame, {&dweight});
    frame.SetTaskRunner(threads);
    return frame.Call(xla_ops_grouped_matmul_backward_weight_cpu);
  }

  TestTensor grad, input, offsets, dweight;
};

// The definition in double, with the offsets that the contract makes of the
// call's. A sum of fp32 is off by at most as many roundings as it has terms;
// below 2^-14 the steps of float16 are 2^-24.
void ExpectGradient(const Call& call) {
  const int64_t rows = call.grad.dims()[0], columns = call.grad.dims()[1];
  const int64_t depth = call.input.dims()[1];
  const int64_t groups = call.dweight.dims()[0];
  const DType dtype = call.grad.dtype();
  const double rounding = std::exp2(dtype == DType::kF32   ? -24
                                    : dtype == DType::kF16 ? -11
                                                           : -8);
  const double least = dtype == DType::kF16 ? std::exp2(-25) : 0;
  int64_t begin =
      std::clamp<int64_t>(static_cast<int64_t>(call.offsets.Get(0)), 0, rows);
  for (int64_t e = 0; e < groups; ++e) {
    const int64_t end = std::clamp<int64_t>(
        static_cast<int64_t>(call.offsets.Get(e + 1)), begin, rows);
    for (int64_t n = 0; n < columns; ++n) {
      for (int64_t k = 0; k < depth; ++k) {
        double exact = 0, magnitude = 0;
        for (int64_t m = begin; m < end; ++m) {
          const double term =
              call.grad.Get(m * columns + n) * call.input.Get(m * depth + k);
          exact += term;
          magnitude += std::abs(term);
        }
        const double bound =
            least + std::abs(exact) * rounding * 1.01 +
            magnitude * static_cast<double>(end - begin) * std::exp2(-24);
        const double got = call.dweight.Get((e * columns + n) * depth + k);
        EXPECT_TRUE(std::abs(got - exact) <= bound);
      }
    }
    begin = end;
  }
  call.dweight.ExpectGuardsIntact();
}

struct Case {
  int64_t rows, columns, depth;
  std::vector<double> offsets;
};

XLA_OPS_TEST(MatchesTheDefinition) {
  for (const DType dtype : kDTypes) {
    for (const Case& c : {
             Case{1, 1, 1, {0, 1}},
             Case{7, 5, 3, {0, 2, 2, 7}},
             Case{40, 33, 70, {0, 33, 40}},
             Case{67, 70, 137, {0, 0, 1, 66, 67, 67}},
             Case{300, 4, 64, {0, 290}},
             Case{5, 9, 8, {1, 3, 4}},  // rows 0 and 4 are of no group
         }) {
      Call call(dtype, c.rows, c.columns, c.depth, c.offsets);
      ExpectOk(call.Run());
      ExpectGradient(call);
    }
  }
}

XLA_OPS_TEST(OffsetsAreNotTrusted) {
  for (const std::vector<double>& offsets :
       {std::vector<double>{-3, 2, 4, 6},
        {0, 4, 2, 6},
        {0, 2, 4, 9},
        {5, 1, 0, 3},
        {7, 8, 9, 10},
        {-2147483648.0, -1, 2147483647.0, 0}}) {
    Call call(DType::kBF16, 6, 4, 8, offsets);
    ExpectOk(call.Run());
    ExpectGradient(call);
  }
}

XLA_OPS_TEST(RowsStayInTheirGroup) {
  const double nan = std::nan("");
  Call call(DType::kF32, 4, 1, 1, {1, 2, 3});
  call.grad = TestTensor(DType::kF32, {4, 1}, {nan, nan, 2, 3});
  call.input = TestTensor(DType::kF32, {4, 1}, {1, 2, 3, nan});
  ExpectOk(call.Run());
  EXPECT_TRUE(std::isnan(call.dweight.Get(0)));
  EXPECT_EQ(call.dweight.Get(1), 6.0);
}

XLA_OPS_TEST(ZeroSizes) {
  for (const Case& c : {
           Case{0, 4, 8, {0, 0, 0}},  // zeros
           Case{3, 4, 8, {0}},
           Case{3, 4, 0, {0, 3}},
           Case{3, 0, 8, {0, 3}},
       }) {
    Call call(DType::kF16, c.rows, c.columns, c.depth, c.offsets);
    ExpectOk(call.Run());
    ExpectGradient(call);
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  Call alone(DType::kF16, 101, 200, 160, {0, 50, 51, 51, 101});
  Call together(DType::kF16, 101, 200, 160, {0, 50, 51, 51, 101});
  ExpectOk(alone.Run());
  TestThreads threads(4);
  ExpectOk(together.Run(&threads));
  EXPECT_TRUE(alone.dweight.bytes() == together.dweight.bytes());
}

// Calls with one tensor replaced.
void ExpectError(TestTensor Call::* member, TestTensor tensor,
                 const std::string& text) {
  Call call(DType::kF32, 4, 16, 64, {0, 1, 4});
  call.*member = std::move(tensor);
  const std::vector<uint8_t> before = call.dweight.bytes();
  ExpectInvalid(call.Run(), "grouped_matmul_backward_weight: " + text);
  EXPECT_TRUE(call.dweight.bytes() == before);
}

XLA_OPS_TEST(Errors) {
  ExpectError(&Call::input, TestTensor(DType::kS32, {4, 64}),
              "input must be float32, float16 or bfloat16, got int32");
  ExpectError(&Call::input, TestTensor(DType::kF32, {4}),
              "input must have shape [M, K], got [4]");
  ExpectError(&Call::grad, TestTensor(DType::kF16, {4, 16}),
              "grad must be float32, got float16");
  ExpectError(&Call::grad, TestTensor(DType::kF32, {5, 16}),
              "grad must have shape [4, N], got [5, 16]");
  ExpectError(&Call::offsets, TestTensor(DType::kS64, {3}),
              "group_offsets must be int32, got int64");
  ExpectError(&Call::offsets, TestTensor(DType::kS32, {0}),
              "group_offsets must have shape [E + 1], got [0]");
  ExpectError(&Call::offsets, TestTensor(DType::kS32, {3, 1}),
              "group_offsets must have shape [E + 1], got [3, 1]");
  ExpectError(&Call::dweight, TestTensor(DType::kF16, {2, 16, 64}),
              "dweight must be float32, got float16");
  ExpectError(&Call::dweight, TestTensor(DType::kF32, {2, 64, 16}),
              "dweight must have shape [2, 16, 64], got [2, 64, 16]");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
