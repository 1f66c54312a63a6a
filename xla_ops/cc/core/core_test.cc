// Operand checks and their texts, dtypes, dispatch, cache geometry and numbers
// of objects.

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/cache_geometry.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/numbered.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

std::string ErrorText(const ffi::Error& error) { return error.message(); }

// --- Dtypes ----------------------------------------------------------------

constexpr DType kAllDTypes[] = {
    DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3FN, DType::kF8E5M2,
    DType::kS8,  DType::kU8,  DType::kS32,  DType::kS64,      DType::kBool};

XLA_OPS_TEST(DTypesConvertBothWays) {
  for (const DType dtype : kAllDTypes) {
    EXPECT_TRUE(ToDType(ToFfi(dtype)) == dtype);
    EXPECT_EQ(static_cast<int64_t>(ffi::ByteWidth(ToFfi(dtype))),
              SizeOf(dtype));
    EXPECT_EQ(DTypeName(ToFfi(dtype)), std::string(Name(dtype)));
  }
  EXPECT_TRUE(!ToDType(ffi::F64).has_value());
  EXPECT_EQ(DTypeName(ffi::F64), "float64");
  EXPECT_EQ(DTypeName(ffi::PRED), "bool");
  EXPECT_EQ(DTypeName(ffi::S4), "S4");
}

XLA_OPS_TEST(DispatchKnowsTheTypeAtCompileTime) {
  for (const DType dtype : kFloatDTypes) {
    const int64_t size = DispatchFloat(dtype, [](auto constant) {
      return static_cast<int64_t>(sizeof(CpuType<constant.value>));
    });
    EXPECT_EQ(size, SizeOf(dtype));
    EXPECT_TRUE(DispatchFloat(dtype, [](auto constant) {
                  return constant.value;
                }) == dtype);
  }
}

// --- Checks ----------------------------------------------------------------

// A buffer as a handler sees it.
class FakeBuffer {
 public:
  FakeBuffer(ffi::DataType dtype, std::vector<int64_t> dims)
      : dims_(std::move(dims)),
        buffer_{XLA_FFI_Buffer_STRUCT_SIZE,           nullptr,
                static_cast<XLA_FFI_DataType>(dtype), nullptr,
                static_cast<int64_t>(dims_.size()),   dims_.data()} {}
  ffi::AnyBuffer get() { return ffi::AnyBuffer(&buffer_); }

 private:
  std::vector<int64_t> dims_;
  XLA_FFI_Buffer buffer_;
};

XLA_OPS_TEST(ErrorsHaveOneForm) {
  EXPECT_EQ(ErrorText(MustError("op", "eps", "be positive", "0")),
            "op: eps must be positive, got 0");
  EXPECT_EQ(FormatFloat(0.0), "0");
  EXPECT_EQ(FormatFloat(1e-6f), "1e-06");
  EXPECT_EQ(FormatFloat(std::numeric_limits<double>::infinity()), "inf");
  EXPECT_EQ(FormatDTypes({DType::kF32}), "float32");
  EXPECT_EQ(FormatDTypes({DType::kF32, DType::kF16}), "float32 or float16");
  EXPECT_EQ(FormatDTypes(kFloatDTypes), "float32, float16 or bfloat16");
}

XLA_OPS_TEST(ChecksAcceptAndRefuse) {
  FakeBuffer matrix(ffi::F32, {2, 3});
  FakeBuffer scalar(ffi::S32, {});
  const ffi::AnyBuffer m = matrix.get();
  EXPECT_EQ(ErrorText(CheckDType("op", "x", m, kFloatDTypes)), "");
  EXPECT_EQ(ErrorText(CheckDType("op", "x", scalar.get(), kFloatDTypes)),
            "op: x must be float32, float16 or bfloat16, got int32");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {2, 3})), "");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {"rows", 3})), "");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {"rows", 4})),
            "op: x must have shape [rows, 4], got [2, 3]");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", m, {6})),
            "op: x must have shape [6], got [2, 3]");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", scalar.get(), {"n"})),
            "op: x must have shape [n], got []");
  EXPECT_EQ(ErrorText(CheckShape("op", "x", scalar.get(), {})), "");
  EXPECT_EQ(ErrorText(CheckSameAs("op", "x", m, m)), "");
  EXPECT_EQ(ErrorText(CheckSameAs("op", "x", scalar.get(), m)),
            "op: x must be float32, got int32");
  FakeBuffer other(ffi::F32, {3, 2});
  EXPECT_EQ(ErrorText(CheckSameAs("op", "x", other.get(), m)),
            "op: x must have shape [2, 3], got [3, 2]");
  EXPECT_EQ(ErrorText(CheckOneElement("op", "x", scalar.get())), "");
  EXPECT_EQ(ErrorText(CheckOneElement("op", "x", m)),
            "op: x must have 1 element, got shape [2, 3]");
  EXPECT_EQ(ErrorText(CheckAtLeast("op", "n", 0, 0)), "");
  EXPECT_EQ(ErrorText(CheckAtLeast("op", "n", -1, 0)),
            "op: n must be at least 0, got -1");
}

// --- Cache geometry --------------------------------------------------------

constexpr int64_t kHuge = int64_t{1} << 62;

XLA_OPS_TEST(CacheExtentIsExact) {
  // NHD, 3 blocks of 4 tokens of 2 heads of 8.
  EXPECT_EQ(CacheExtent({3, 4, 64, 16, 8}, 2, 8), 3 * 4 * 2 * 8);
  // HND.
  EXPECT_EQ(CacheExtent({3, 4, 64, 8, 32}, 2, 8), 3 * 4 * 2 * 8);
  // Every second block: the last gap is not part of it.
  EXPECT_EQ(CacheExtent({3, 4, 128, 16, 8}, 2, 8), 5 * 64);
  EXPECT_EQ(CacheExtent({1, 1, 0, 0, 0}, 1, 1), 1);
  EXPECT_EQ(CacheExtent({0, 4, 64, 16, 8}, 2, 8), 0);
  EXPECT_EQ(CacheExtent({3, 0, kHuge, kHuge, 8}, 2, 8), 0);
  EXPECT_EQ(CacheExtent({3, 4, kHuge, 16, 8}, 2, 8), -1);
  EXPECT_EQ(CacheExtent({kHuge, 4, kHuge, 16, 8}, 2, 8), -1);
  EXPECT_EQ(CacheExtent({2, 3, kHuge, kHuge, 8}, 2, 8), -1);
}

XLA_OPS_TEST(CacheBoundsHold) {
  FakeBuffer buffer(ffi::F32, {2, 192});
  const CacheGeometry geometry = {3, 4, 64, 16, 8};
  const auto check = [&](const CacheGeometry& geometry, int64_t offset) {
    return ErrorText(CheckCacheInBounds("op", "key_cache", buffer.get(),
                                        geometry, 2, 8, "key_offset", offset));
  };
  EXPECT_EQ(check(geometry, 0), "");
  EXPECT_EQ(check(geometry, 192), "");
  EXPECT_EQ(check(geometry, 193),
            "op: key_cache must have at least 385 elements, got 384");
  EXPECT_EQ(check(geometry, -1), "op: key_offset must be at least 0, got -1");
  EXPECT_EQ(check(geometry, std::numeric_limits<int64_t>::max()),
            "op: key_cache must hold its view (offset and strides), got "
            "384 elements");
  EXPECT_EQ(check({3, 4, kHuge, 16, 8}, 0),
            "op: key_cache must hold its view (offset and strides), got "
            "384 elements");
  EXPECT_EQ(check({0, 4, 64, 16, 8}, kHuge), "");  // nothing to reach
  EXPECT_EQ(ErrorText(CheckGeometry("op", geometry)), "");
  EXPECT_EQ(ErrorText(CheckGeometry("op", {3, -4, 64, 16, 8})),
            "op: page_size must be at least 0, got -4");
  EXPECT_EQ(ErrorText(CheckGeometry("op", {3, 4, 64, 16, -8})),
            "op: head_stride must be at least 0, got -8");
  EXPECT_EQ(ErrorText(CheckGeometry("op", {kHuge, 4, 0, 0, 0})),
            "op: num_blocks must give less than 2^63 slots, got "
            "4611686018427387904");
}

// --- Numbered objects ------------------------------------------------------

XLA_OPS_TEST(ObjectsAreFoundByTheNumberThatTheyGot) {
  auto& all = Numbered<int>::All();
  EXPECT_TRUE(all.Find(0) == nullptr);
  EXPECT_EQ(all.Add(std::make_unique<int>(5)), 0);
  int* const first = all.Find(0);
  for (int64_t i = 1; i < 100; ++i) {
    EXPECT_EQ(all.Add(std::make_unique<int>(static_cast<int>(i))), i);
  }
  EXPECT_TRUE(all.Find(0) == first);  // it stays where it is
  EXPECT_EQ(*first, 5);
  EXPECT_EQ(*all.Find(99), 99);
  for (const int64_t number :
       {int64_t{-1}, int64_t{100}, std::numeric_limits<int64_t>::max(),
        std::numeric_limits<int64_t>::min()}) {
    EXPECT_TRUE(all.Find(number) == nullptr);
  }
  EXPECT_TRUE(Numbered<char>::All().Find(0) == nullptr);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
