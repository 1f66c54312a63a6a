// The CPU handler of convert_fp8 on hand-built frames: every code, values
// against double arithmetic, every error text, guard bytes, threads.

#include "xla_ops/cc/ops/fp8_quant/convert_fp8.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_convert_fp8_cpu(XLA_FFI_CallFrame*);

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

struct Format {
  const char* name;
  DType dtype;
  double max;
};
constexpr Format kFormats[] = {{"fp8", DType::kF8E4M3FN, 448},
                               {"fp8_e4m3", DType::kF8E4M3FN, 448},
                               {"fp8_e5m2", DType::kF8E5M2, 57344}};

CallStatus Run(const TestTensor& src, TestTensor* dst, const char* format,
               float scale, TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&src});
  AddResults(&frame, {dst});
  frame.AddAttr("kv_cache_dtype", format).AddAttr("scale", scale);
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_convert_fp8_cpu);
}

bool Same(double a, double b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

XLA_OPS_TEST(ToFp8MatchesTheDefinition) {
  std::mt19937 random(1);
  for (const Format& format : kFormats) {
    for (const DType dtype : kDTypes) {
      TestTensor src(dtype, {3, 67});
      TestTensor dst(format.dtype, {3, 67});
      src.FillRandom(&random, 50.0);
      src.Set(0, NAN);
      src.Set(1, kInf);
      src.Set(2, -kInf);
      src.Set(3, 60000);
      src.Set(4, -0.0);
      ExpectOk(Run(src, &dst, format.name, 0.37f));
      for (int64_t i = 0; i < src.size(); ++i) {
        const float scaled = static_cast<float>(src.Get(i)) / 0.37f;
        const TestTensor want(format.dtype, {1}, {scaled});
        EXPECT_TRUE(Same(dst.Get(i), want.Get(0)));
      }
      EXPECT_TRUE(std::isnan(dst.Get(0)));
      EXPECT_EQ(dst.Get(1), format.max);
      EXPECT_EQ(dst.Get(2), -format.max);
      dst.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(FromFp8TakesEveryCode) {
  TestTensor codes(DType::kU8, {256});
  for (int64_t i = 0; i < 256; ++i) codes.Set(i, static_cast<double>(i));
  for (const Format& format : kFormats) {
    TestTensor typed(format.dtype, {256});
    for (int64_t i = 0; i < 256; ++i) {
      static_cast<uint8_t*>(typed.data())[i] = static_cast<uint8_t>(i);
    }
    for (const DType dtype : kDTypes) {
      TestTensor dst(dtype, {256});
      TestTensor same(dtype, {256});
      ExpectOk(Run(codes, &dst, format.name, 1.3f));
      ExpectOk(Run(typed, &same, format.name, 1.3f));
      for (int64_t i = 0; i < 256; ++i) {
        const float scaled = static_cast<float>(typed.Get(i)) * 1.3f;
        EXPECT_TRUE(Same(dst.Get(i), TestTensor(dtype, {1}, {scaled}).Get(0)));
        EXPECT_TRUE(Same(same.Get(i), dst.Get(i)));
      }
      dst.ExpectGuardsIntact();
    }
  }
}

XLA_OPS_TEST(ByteResultsAreTheCodes) {
  std::mt19937 random(2);
  TestTensor src(DType::kBF16, {5, 40});
  TestTensor typed(DType::kF8E5M2, {5, 40});
  TestTensor bytes(DType::kU8, {5, 40});
  src.FillRandom(&random, 100.0);
  ExpectOk(Run(src, &typed, "fp8_e5m2", 0.5f));
  ExpectOk(Run(src, &bytes, "fp8_e5m2", 0.5f));
  EXPECT_TRUE(typed.bytes() == bytes.bytes());
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(3);
  TestTensor src(DType::kF16, {300001});
  TestTensor alone(DType::kF8E4M3FN, {300001});
  TestTensor together(DType::kF8E4M3FN, {300001});
  src.FillRandom(&random, 100.0);
  ExpectOk(Run(src, &alone, "fp8", 0.5f));
  TestThreads threads(4);
  ExpectOk(Run(src, &together, "fp8", 0.5f, &threads));
  EXPECT_TRUE(alone.bytes() == together.bytes());
}

XLA_OPS_TEST(NothingToConvert) {
  TestTensor dst(DType::kF8E4M3FN, {0, 8});
  ExpectOk(Run(TestTensor(DType::kF16, {0, 8}), &dst, "fp8", 1.0f));
  dst.ExpectGuardsIntact();
}

XLA_OPS_TEST(Errors) {
  const TestTensor src(DType::kF16, {4, 8});
  TestTensor dst(DType::kU8, {4, 8});
  TestTensor plain(DType::kF16, {4, 8});
  ExpectInvalid(Run(src, &dst, "auto", 1),
                "convert_fp8: kv_cache_dtype must be fp8, fp8_e4m3 or "
                "fp8_e5m2, got auto");
  for (const auto& [scale, text] :
       {std::pair{0.0f, "0"}, {-1.0f, "-1"}, {INFINITY, "inf"}, {NAN, "nan"}}) {
    ExpectInvalid(
        Run(src, &dst, "fp8", scale),
        std::string("convert_fp8: scale must be positive and finite, got ") +
            text);
  }
  ExpectInvalid(Run(TestTensor(DType::kS32, {4, 8}), &dst, "fp8", 1),
                "convert_fp8: src must be float32, float16, bfloat16, "
                "float8_e4m3fn or uint8, got int32");
  ExpectInvalid(Run(TestTensor(DType::kF8E4M3FN, {4, 8}), &dst, "fp8_e5m2", 1),
                "convert_fp8: src must be float32, float16, bfloat16, "
                "float8_e5m2 or uint8, got float8_e4m3fn");
  ExpectInvalid(Run(src, &plain, "fp8", 1),
                "convert_fp8: dst must be float8_e4m3fn or uint8, got float16");
  ExpectInvalid(Run(TestTensor(DType::kU8, {4, 8}), &dst, "fp8", 1),
                "convert_fp8: dst must be float32, float16 or bfloat16, got "
                "uint8");
  ExpectInvalid(Run(TestTensor(DType::kF16, {4, 4}), &dst, "fp8", 1),
                "convert_fp8: dst must have shape [4, 4], got [4, 8]");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
