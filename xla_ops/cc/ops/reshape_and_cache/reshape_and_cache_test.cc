// The CPU handlers of reshape_and_cache on hand-built frames: where every
// element goes, bytes around it, copies, every error text, threads.

#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache.h"

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
#include "xla_ops/cc/ops/reshape_and_cache/reshape_and_cache_checks.h"

extern "C" XLA_FFI_Error* xla_ops_reshape_and_cache_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_reshape_and_cache_stacked_cpu(
    XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_reshape_and_cache_one_cpu(XLA_FFI_CallFrame*);
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

struct Shape {
  int64_t tokens, heads, dim, blocks, page, x;

  int64_t block() const { return heads * dim * page; }
};

struct Attrs {
  std::string kv_cache_dtype = "auto";
  int64_t num_blocks, page_size, key_x;
  int64_t key_block_stride, key_offset, value_block_stride, value_offset;

  static Attrs Dense(const Shape& s) {
    return {"auto", s.blocks, s.page, s.x, s.block(), 0, s.block(), 0};
  }
  void AddTo(CallFrame* frame, bool two) const {
    frame->AddAttr("kv_cache_dtype", kv_cache_dtype)
        .AddAttr("num_blocks", num_blocks)
        .AddAttr("page_size", page_size)
        .AddAttr("key_x", key_x)
        .AddAttr("key_block_stride", key_block_stride)
        .AddAttr("key_offset", key_offset)
        .AddAttr("debug", false);
    if (!two) return;
    frame->AddAttr("value_block_stride", value_block_stride)
        .AddAttr("value_offset", value_offset);
  }
};

struct Call {
  Shape shape;
  Attrs attrs;
  TestTensor key, value, key_cache, value_cache, slots, k_scale, v_scale;

  explicit Call(const Shape& s, DType dtype = DType::kF32)
      : shape(s),
        attrs(Attrs::Dense(s)),
        key(dtype, {s.tokens, s.heads, s.dim}),
        value(dtype, {s.tokens, s.heads, s.dim}),
        key_cache(dtype, {s.blocks, s.heads, s.dim / s.x, s.page, s.x}),
        value_cache(dtype, {s.blocks, s.heads, s.dim, s.page}),
        slots(DType::kS64, {s.tokens}),
        k_scale(DType::kF32, {0}),
        v_scale(DType::kF32, {0}) {
    std::mt19937 random(1);
    for (TestTensor* t : {&key, &value, &key_cache, &value_cache}) {
      t->FillRandom(&random);
    }
    for (int64_t t = 0; t < s.tokens; ++t) {
      slots.Set(t, static_cast<double>(t * 7 % (s.blocks * s.page)));
    }
  }

  CallStatus Run(TaskRunner* threads = nullptr) {
    CallFrame frame;
    AddArgs(&frame, {&key, &value, &key_cache, &value_cache, &slots, &k_scale,
                     &v_scale});
    AddResults(&frame, {&key_cache, &value_cache});
    attrs.AddTo(&frame, true);
    frame.SetTaskRunner(threads);
    return frame.Call(xla_ops_reshape_and_cache_cpu);
  }

  CallStatus RunOne(const TestTensor& cache, TestTensor* result) {
    CallFrame frame;
    AddArgs(&frame, {&key, &cache, &slots, &k_scale});
    AddResults(&frame, {result});
    attrs.AddTo(&frame, false);
    return frame.Call(xla_ops_reshape_and_cache_one_cpu);
  }

  CallStatus RunStacked(TestTensor* cache) {
    CallFrame frame;
    AddArgs(&frame, {&key, &value, cache, &slots, &k_scale, &v_scale});
    AddResults(&frame, {cache});
    attrs.AddTo(&frame, true);
    return frame.Call(xla_ops_reshape_and_cache_stacked_cpu);
  }

  // Writes `rows` into `cache` by the layout's definition.
  void Expect(const TestTensor& rows, int64_t x, int64_t stride, int64_t offset,
              const std::function<double(double)>& convert,
              TestTensor* cache) const {
    for (int64_t t = 0; t < shape.tokens; ++t) {
      const auto slot = static_cast<int64_t>(slots.Get(t));
      if (slot < 0 || slot >= shape.blocks * shape.page) continue;
      const int64_t block = slot / shape.page;
      const int64_t at = slot % shape.page;
      for (int64_t h = 0; h < shape.heads; ++h) {
        for (int64_t d = 0; d < shape.dim; ++d) {
          const int64_t chunk = h * (shape.dim / x) + d / x;
          cache->Set(
              offset + block * stride + (chunk * shape.page + at) * x + d % x,
              convert(rows.Get((t * shape.heads + h) * shape.dim + d)));
        }
      }
    }
  }
};

double Same(double x) { return x; }

constexpr Shape kShapes[] = {{1, 1, 8, 1, 1, 8},
                             {5, 3, 24, 7, 3, 8},
                             {17, 2, 64, 5, 16, 4},
                             {3, 1, 7, 4, 5, 7},
                             {4, 2, 6, 3, 4, 1}};

XLA_OPS_TEST(WritesEveryElementToItsPlace) {
  for (const DType dtype : kDTypes) {
    for (const Shape& shape : kShapes) {
      Call call(shape, dtype);
      call.slots.Set(shape.tokens / 2, -1);
      TestTensor keys = call.key_cache;
      TestTensor values = call.value_cache;
      call.Expect(call.key, shape.x, shape.block(), 0, Same, &keys);
      call.Expect(call.value, 1, shape.block(), 0, Same, &values);
      ExpectOk(call.Run());
      EXPECT_TRUE(call.key_cache.bytes() == keys.bytes());
      EXPECT_TRUE(call.value_cache.bytes() == values.bytes());
    }
  }
}

XLA_OPS_TEST(ConvertsToFp8) {
  const Shape shape = {6, 2, 32, 3, 4, 16};
  for (const DType dtype : kDTypes) {
    for (const char* name : {"fp8", "fp8_e4m3", "fp8_e5m2"}) {
      const DType fp8 =
          name == std::string("fp8_e5m2") ? DType::kF8E5M2 : DType::kF8E4M3FN;
      Call call(shape, dtype);
      call.attrs.kv_cache_dtype = name;
      call.key.Set(0, INFINITY);
      call.key.Set(1, -1e4);
      call.key_cache = TestTensor(fp8, call.key_cache.dims());
      call.value_cache = TestTensor(fp8, call.value_cache.dims());
      call.key_cache.Fill(1);
      call.value_cache.Fill(2);
      call.k_scale = TestTensor(DType::kF32, {1}, {0.37});
      const auto divide = [](double x) {
        return static_cast<float>(x) / 0.37f;
      };
      TestTensor keys = call.key_cache;
      TestTensor values = call.value_cache;
      call.Expect(call.key, shape.x, shape.block(), 0, divide, &keys);
      call.Expect(call.value, 1, shape.block(), 0, Same, &values);
      ExpectOk(call.Run());
      EXPECT_TRUE(call.key_cache.bytes() == keys.bytes());
      EXPECT_TRUE(call.value_cache.bytes() == values.bytes());
    }
  }
}

// Both caches in one buffer, their blocks in turn, with a gap behind each.
XLA_OPS_TEST(Stacked) {
  const Shape shape = {9, 2, 8, 5, 4, 4};
  Call call(shape, DType::kF16);
  const int64_t gap = 3;
  const int64_t stride = 2 * (shape.block() + gap);
  call.attrs.key_block_stride = call.attrs.value_block_stride = stride;
  call.attrs.key_offset = 1;
  call.attrs.value_offset = 1 + shape.block() + gap;
  TestTensor cache(DType::kF16, {1 + shape.blocks * stride});
  cache.Fill(7);
  TestTensor want = cache;
  call.Expect(call.key, 4, stride, call.attrs.key_offset, Same, &want);
  call.Expect(call.value, 1, stride, call.attrs.value_offset, Same, &want);
  ExpectOk(call.RunStacked(&cache));
  EXPECT_TRUE(cache.bytes() == want.bytes());
}

XLA_OPS_TEST(OneCacheThatIsNotAliased) {
  for (const int64_t x : {int64_t{4}, int64_t{1}}) {
    const Shape shape = {9, 2, 8, 5, 4, x};
    Call call(shape);
    TestTensor result(DType::kF32, call.key_cache.dims());
    const std::vector<unsigned char> before = call.key_cache.bytes();
    TestTensor want = call.key_cache;
    call.Expect(call.key, x, shape.block(), 0, Same, &want);
    ExpectOk(call.RunOne(call.key_cache, &result));
    EXPECT_TRUE(result.bytes() == want.bytes());
    EXPECT_TRUE(call.key_cache.bytes() == before);
  }
}

XLA_OPS_TEST(SlotsOutOfRangeWriteNothing) {
  Call call({6, 1, 8, 2, 4, 4});
  const int64_t slots[] = {-1, INT64_MIN, 8, 9, int64_t{1} << 40, INT64_MAX};
  for (int i = 0; i < 6; ++i) {
    static_cast<int64_t*>(call.slots.data())[i] = slots[i];
  }
  const std::vector<unsigned char> before = call.key_cache.bytes();
  ExpectOk(call.Run());
  EXPECT_TRUE(call.key_cache.bytes() == before);
}

XLA_OPS_TEST(NothingToWrite) {
  for (const Shape& shape : {Shape{0, 2, 8, 3, 4, 4}, Shape{3, 0, 8, 3, 4, 4},
                             Shape{3, 2, 0, 3, 4, 4}}) {
    Call call(shape);
    ExpectOk(call.Run());
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  const Shape shape = {400, 8, 64, 40, 16, 8};
  Call alone(shape, DType::kBF16);
  Call together(shape, DType::kBF16);
  ExpectOk(alone.Run());
  TestThreads threads(4);
  ExpectOk(together.Run(&threads));
  EXPECT_TRUE(alone.key_cache.bytes() == together.key_cache.bytes());
  EXPECT_TRUE(alone.value_cache.bytes() == together.value_cache.bytes());
}

void ExpectError(const std::function<void(Call*)>& change,
                 const std::string& text) {
  Call call({4, 2, 8, 3, 4, 4}, DType::kF16);
  change(&call);
  ExpectInvalid(call.Run(), "reshape_and_cache: " + text);
}

XLA_OPS_TEST(Errors) {
  const auto f16 = [](std::vector<int64_t> dims) {
    return TestTensor(DType::kF16, dims);
  };
  const auto f32 = [](std::vector<int64_t> dims) {
    return TestTensor(DType::kF32, dims);
  };
  ExpectError([](Call* c) { c->key = TestTensor(DType::kS32, {4, 2, 8}); },
              "key must be float32, float16 or bfloat16, got int32");
  ExpectError([&](Call* c) { c->key = f16({4, 8}); },
              "key must have shape [num_tokens, num_kv_heads, head_dim], got "
              "[4, 8]");
  ExpectError([&](Call* c) { c->value = f32({4, 2, 8}); },
              "value must be float16, got float32");
  ExpectError([&](Call* c) { c->value = f16({4, 2, 16}); },
              "value must have shape [4, 2, 8], got [4, 2, 16]");
  ExpectError([](Call* c) { c->slots = TestTensor(DType::kS32, {4}); },
              "slot_mapping must be int64, got int32");
  ExpectError([](Call* c) { c->slots = TestTensor(DType::kS64, {4, 1}); },
              "slot_mapping must have shape [num_tokens], got [4, 1]");
  ExpectError([](Call* c) { c->slots = TestTensor(DType::kS64, {5}); },
              "slot_mapping must have at most 4 elements, got 5");
  ExpectError([](Call* c) { c->attrs.num_blocks = -1; },
              "num_blocks must be at least 0, got -1");
  ExpectError([](Call* c) { c->attrs.page_size = -1; },
              "page_size must be at least 0, got -1");
  ExpectError([](Call* c) { c->attrs.num_blocks = INT64_MAX; },
              "num_blocks must give less than 2^63 slots, got "
              "9223372036854775807");
  // A head of 2^63 elements and more.
  for (const int64_t page_size : {int64_t{1} << 60, int64_t{1} << 61}) {
    ExpectError(
        [page_size](Call* c) {
          c->attrs.num_blocks = 1;
          c->attrs.page_size = page_size;
        },
        "key_cache must hold its view (offset and strides), got 192 elements");
  }
  for (const int64_t x : {int64_t{0}, int64_t{-4}, int64_t{3}}) {
    ExpectError([x](Call* c) { c->attrs.key_x = x; },
                "key_x must divide head_dim 8, got " + std::to_string(x));
  }
  ExpectError([](Call* c) { c->attrs.kv_cache_dtype = "int8"; },
              "kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got "
              "int8");
  ExpectError([&](Call* c) { c->key_cache = f32({3, 2, 2, 4, 4}); },
              "key_cache must be float16, got float32");
  ExpectError([](Call* c) { c->attrs.kv_cache_dtype = "fp8"; },
              "key_cache must be float8_e4m3fn or uint8, got float16");
  ExpectError([](Call* c) { c->attrs.key_block_stride = -1; },
              "key_block_stride must be at least 0, got -1");
  ExpectError([](Call* c) { c->attrs.value_offset = -1; },
              "value_offset must be at least 0, got -1");
  ExpectError([](Call* c) { c->attrs.value_offset = 1; },
              "value_cache must have at least 193 elements, got 192");
  ExpectError([](Call* c) { c->attrs.num_blocks = 4; },
              "key_cache must have at least 256 elements, got 192");
  ExpectError([](Call* c) { c->k_scale = TestTensor(DType::kF16, {1}); },
              "k_scale must be float32, got float16");
  ExpectError([&](Call* c) { c->v_scale = f32({2}); },
              "v_scale must have 1 element, got shape [2]");
  Call call({4, 2, 8, 3, 4, 4}, DType::kF16);
  TestTensor other = f16({3, 2, 2, 4, 8});
  ExpectInvalid(call.RunOne(call.key_cache, &other),
                "reshape_and_cache: key_cache result must have shape "
                "[3, 2, 2, 4, 4], got [3, 2, 2, 4, 8]");
}

// Checked by the CUDA handlers alone, so on parameters as they would bind them.
XLA_OPS_TEST(CudaLimits) {
  ReshapeAndCacheParams params = {};
  params.num_tokens = params.num_blocks = params.page_size = 1;
  params.num_kv_heads = 65535;
  params.head_dim = 16;
  EXPECT_TRUE(CheckCudaLimits(params).success());
  params.head_dim = 32;
  EXPECT_EQ(
      CheckCudaLimits(params).message(),
      "reshape_and_cache: key must have at most 1048560 elements a token, "
      "got 2097120");
  params.num_tokens = 0;
  EXPECT_TRUE(CheckCudaLimits(params).success());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 3u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.reshape_and_cache");
  EXPECT_EQ(std::string(handlers[1].target),
            "xla_ops.reshape_and_cache_stacked");
  EXPECT_EQ(std::string(handlers[2].target), "xla_ops.reshape_and_cache_one");
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
