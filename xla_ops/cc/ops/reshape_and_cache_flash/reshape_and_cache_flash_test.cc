// The CPU handlers of the reshape_and_cache_flash targets on hand-built
// frames: every layout, dtype and slot against a slow model of the cache,
// every error text, guard bytes, unaliased results, debug reports.

#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/reshape_and_cache_flash/reshape_and_cache_flash_checks.h"

extern "C" {
XLA_FFI_Error* xla_ops_reshape_and_cache_flash_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_reshape_and_cache_flash_stacked_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* xla_ops_reshape_and_cache_flash_one_cpu(XLA_FFI_CallFrame*);
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

// The attributes, by the names that the contract gives them.
struct Attrs {
  std::string kv_cache_dtype = "auto";
  int64_t num_blocks = 4;
  int64_t page_size = 3;
  int64_t block_stride = 0;
  int64_t page_stride = 0;
  int64_t head_stride = 0;
  int64_t key_offset = 0;
  int64_t value_offset = 0;
  bool debug = false;

  void AddTo(CallFrame* frame, bool one = false) const {
    frame->AddAttr("kv_cache_dtype", kv_cache_dtype)
        .AddAttr("num_blocks", num_blocks)
        .AddAttr("page_size", page_size)
        .AddAttr("block_stride", block_stride)
        .AddAttr("page_stride", page_stride)
        .AddAttr("head_stride", head_stride)
        .AddAttr("key_offset", key_offset)
        .AddAttr("debug", debug);
    if (!one) frame->AddAttr("value_offset", value_offset);
  }
};

Attrs Nhd(int64_t heads, int64_t head_dim) {
  Attrs attrs;
  attrs.head_stride = head_dim;
  attrs.page_stride = heads * head_dim;
  attrs.block_stride = attrs.page_size * attrs.page_stride;
  return attrs;
}

Attrs Hnd(int64_t heads, int64_t head_dim) {
  Attrs attrs;
  attrs.page_stride = head_dim;
  attrs.head_stride = attrs.page_size * head_dim;
  attrs.block_stride = heads * attrs.head_stride;
  return attrs;
}

// What one cache element becomes: the definition, by way of float, in which
// the division is specified.
double Convert(const TestTensor& rows, int64_t i, DType cache_dtype,
               float scale) {
  if (cache_dtype == rows.dtype()) return rows.Get(i);
  const float scaled = static_cast<float>(rows.Get(i)) / scale;
  return TestTensor(cache_dtype, {1}, {scaled}).Get(0);
}

bool Same(double a, double b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

// Writes `rows` into `cache`, the slow way. Elements that no slot names keep
// their value.
void Model(const Attrs& attrs, const TestTensor& rows, const TestTensor& slots,
           int64_t offset, float scale, TestTensor* cache) {
  const int64_t heads = rows.dims()[1];
  const int64_t head_dim = rows.dims()[2];
  for (int64_t t = 0; t < slots.size(); ++t) {
    const double slot = slots.Get(t);
    if (slot < 0) continue;
    if (slot >= static_cast<double>(attrs.num_blocks * attrs.page_size)) {
      continue;
    }
    const int64_t block = static_cast<int64_t>(slot) / attrs.page_size;
    const int64_t page_offset = static_cast<int64_t>(slot) % attrs.page_size;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t d = 0; d < head_dim; ++d) {
        cache->Set(offset + block * attrs.block_stride +
                       page_offset * attrs.page_stride + h * attrs.head_stride +
                       d,
                   Convert(rows, (t * heads + h) * head_dim + d, cache->dtype(),
                           scale));
      }
    }
  }
}

void ExpectSameValues(const TestTensor& got, const TestTensor& want) {
  got.ExpectGuardsIntact();
  for (int64_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(Same(got.Get(i), want.Get(i)));
  }
}

const TestTensor& One() {
  static const auto* one = new TestTensor(DType::kF32, {1}, {1});
  return *one;
}

CallStatus RunBoth(const TestTensor& key, const TestTensor& value,
                   TestTensor* key_cache, TestTensor* value_cache,
                   const TestTensor& slots, const Attrs& attrs,
                   const TestTensor& k_scale = One(),
                   const TestTensor& v_scale = One(),
                   TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame,
          {&key, &value, key_cache, value_cache, &slots, &k_scale, &v_scale});
  AddResults(&frame, {key_cache, value_cache});
  attrs.AddTo(&frame);
  frame.SetTaskRunner(threads);
  return frame.Call(xla_ops_reshape_and_cache_flash_cpu);
}

CallStatus RunStacked(const TestTensor& key, const TestTensor& value,
                      TestTensor* kv_cache, const TestTensor& slots,
                      const Attrs& attrs) {
  CallFrame frame;
  AddArgs(&frame, {&key, &value, kv_cache, &slots, &One(), &One()});
  AddResults(&frame, {kv_cache});
  attrs.AddTo(&frame);
  return frame.Call(xla_ops_reshape_and_cache_flash_stacked_cpu);
}

CallStatus RunOne(const TestTensor& key, TestTensor* cache,
                  const TestTensor& slots, const Attrs& attrs,
                  const TestTensor& scale = One()) {
  CallFrame frame;
  AddArgs(&frame, {&key, cache, &slots, &scale});
  AddResults(&frame, {cache});
  attrs.AddTo(&frame, /*one=*/true);
  return frame.Call(xla_ops_reshape_and_cache_flash_one_cpu);
}

// Padding, out of range at either end, and the extremes of the type.
TestTensor HardSlots() {
  return TestTensor(DType::kS64, {9},
                    {5, -1, 0, 11, 12, -7, 1e15, -9.2e18, 9.2e18});
}

XLA_OPS_TEST(WritesNhdAndHnd) {
  std::mt19937 random(1);
  for (const DType dtype : kDTypes) {
    for (const int64_t head_dim : {1, 8, 20}) {
      for (const Attrs& attrs : {Nhd(2, head_dim), Hnd(2, head_dim)}) {
        const TestTensor slots = HardSlots();
        // Two rows more than slots.
        TestTensor key(dtype, {11, 2, head_dim});
        TestTensor value(dtype, {11, 2, head_dim});
        TestTensor key_cache(dtype, {4 * 3 * 2, head_dim});
        TestTensor value_cache(dtype, {4 * 3 * 2 * head_dim});
        for (TestTensor* t : {&key, &value, &key_cache, &value_cache}) {
          t->FillRandom(&random);
        }
        TestTensor want_key = key_cache;
        TestTensor want_value = value_cache;
        Model(attrs, key, slots, 0, 1, &want_key);
        Model(attrs, value, slots, 0, 1, &want_value);
        ExpectOk(RunBoth(key, value, &key_cache, &value_cache, slots, attrs));
        ExpectSameValues(key_cache, want_key);
        ExpectSameValues(value_cache, want_value);
      }
    }
  }
}

XLA_OPS_TEST(WritesStackedViews) {
  std::mt19937 random(2);
  const TestTensor slots = HardSlots();
  // [2, blocks, ...] taken apart by unbind(0), and [blocks, 2, ...] by
  // kv[:, 0] and kv[:, 1].
  Attrs outer = Nhd(2, 8);
  outer.value_offset = 4 * outer.block_stride;
  Attrs inner = Nhd(2, 8);
  inner.value_offset = inner.block_stride;
  inner.block_stride *= 2;
  for (const Attrs& attrs : {outer, inner}) {
    TestTensor key(DType::kBF16, {9, 2, 8});
    TestTensor value(DType::kBF16, {9, 2, 8});
    TestTensor kv_cache(DType::kBF16, {2, 4, 3, 2, 8});
    for (TestTensor* t : {&key, &value, &kv_cache}) t->FillRandom(&random);
    TestTensor want = kv_cache;
    Model(attrs, key, slots, attrs.key_offset, 1, &want);
    Model(attrs, value, slots, attrs.value_offset, 1, &want);
    ExpectOk(RunStacked(key, value, &kv_cache, slots, attrs));
    ExpectSameValues(kv_cache, want);
  }
}

XLA_OPS_TEST(WritesOneCache) {
  std::mt19937 random(3);
  const TestTensor slots = HardSlots();
  Attrs attrs = Hnd(2, 8);
  attrs.key_offset = 24;
  TestTensor key(DType::kF32, {9, 2, 8});
  TestTensor cache(DType::kF32, {24 + 4 * 3 * 2 * 8});
  key.FillRandom(&random);
  cache.FillRandom(&random);
  TestTensor want = cache;
  Model(attrs, key, slots, 24, 1, &want);
  ExpectOk(RunOne(key, &cache, slots, attrs));
  ExpectSameValues(cache, want);
}

XLA_OPS_TEST(ConvertsToFp8) {
  std::mt19937 random(4);
  const double inf = std::numeric_limits<double>::infinity();
  const std::pair<const char*, DType> kKinds[] = {
      {"fp8", DType::kF8E4M3FN},
      {"fp8_e4m3", DType::kF8E4M3FN},
      {"fp8_e5m2", DType::kF8E5M2}};
  for (const DType dtype : kDTypes) {
    for (const auto& [name, kind] : kKinds) {
      for (const bool as_bytes : {false, true}) {
        Attrs attrs = Nhd(2, 8);
        attrs.kv_cache_dtype = name;
        const TestTensor slots = HardSlots();
        TestTensor key(dtype, {9, 2, 8});
        TestTensor value(dtype, {9, 2, 8});
        key.FillRandom(&random, 300);
        value.FillRandom(&random, 1e-3);
        for (int i = 0; i < 4; ++i) {
          key.Set(i, std::vector<double>{inf, -inf, NAN, 0}[i]);
        }
        const TestTensor k_scale(DType::kF32, {1}, {0.7});
        const TestTensor v_scale(DType::kF32, {}, {3e-4});
        TestTensor key_cache(as_bytes ? DType::kU8 : kind, {4, 3, 2, 8});
        TestTensor value_cache(as_bytes ? DType::kU8 : kind, {4, 3, 2, 8});
        key_cache.Fill(1);
        value_cache.Fill(1);
        TestTensor want_key(kind, {4, 3, 2, 8});
        TestTensor want_value(kind, {4, 3, 2, 8});
        std::memcpy(want_key.data(), key_cache.data(), 4 * 3 * 2 * 8);
        std::memcpy(want_value.data(), value_cache.data(), 4 * 3 * 2 * 8);
        Model(attrs, key, slots, 0, 0.7f, &want_key);
        Model(attrs, value, slots, 0, 3e-4f, &want_value);
        ExpectOk(RunBoth(key, value, &key_cache, &value_cache, slots, attrs,
                         k_scale, v_scale));
        EXPECT_TRUE(
            std::memcmp(key_cache.data(), want_key.data(), 4 * 3 * 2 * 8) == 0);
        EXPECT_TRUE(std::memcmp(value_cache.data(), want_value.data(),
                                4 * 3 * 2 * 8) == 0);
        key_cache.ExpectGuardsIntact();
        value_cache.ExpectGuardsIntact();
        // Slot 5 holds token 0: infinities saturated, NaN kept.
        const double largest = kind == DType::kF8E5M2 ? 57344 : 448;
        EXPECT_EQ(want_key.Get(5 * 16), largest);
        EXPECT_EQ(want_key.Get(5 * 16 + 1), -largest);
        EXPECT_TRUE(std::isnan(want_key.Get(5 * 16 + 2)));
      }
    }
  }
}

XLA_OPS_TEST(AbsentScalesAreOne) {
  std::mt19937 random(7);
  Attrs attrs = Nhd(2, 8);
  attrs.kv_cache_dtype = "fp8";
  const TestTensor slots(DType::kS64, {3}, {2, 0, 7});
  TestTensor key(DType::kBF16, {3, 2, 8});
  key.FillRandom(&random);
  const TestTensor absent(DType::kF32, {0});
  const TestTensor one(DType::kF32, {1}, {1});
  TestTensor caches[4] = {{DType::kF8E4M3FN, {4, 3, 2, 8}},
                          {DType::kF8E4M3FN, {4, 3, 2, 8}},
                          {DType::kF8E4M3FN, {4, 3, 2, 8}},
                          {DType::kF8E4M3FN, {4, 3, 2, 8}}};
  for (TestTensor& cache : caches) cache.Fill(0);
  ExpectOk(
      RunBoth(key, key, &caches[0], &caches[1], slots, attrs, absent, absent));
  ExpectOk(RunBoth(key, key, &caches[2], &caches[3], slots, attrs, one, one));
  EXPECT_TRUE(std::memcmp(caches[0].data(), caches[2].data(), 192) == 0);
  EXPECT_TRUE(std::memcmp(caches[1].data(), caches[3].data(), 192) == 0);
}

XLA_OPS_TEST(AutoNeverReadsTheScales) {
  std::mt19937 random(5);
  const Attrs attrs = Nhd(2, 8);
  const TestTensor nan(DType::kF32, {1});
  TestTensor key(DType::kF16, {1, 2, 8});
  key.FillRandom(&random);
  TestTensor key_cache(DType::kF16, {4, 3, 2, 8});
  TestTensor value_cache(DType::kF16, {4, 3, 2, 8});
  const TestTensor slots(DType::kS64, {1}, {2});
  ExpectOk(RunBoth(key, key, &key_cache, &value_cache, slots, attrs, nan, nan));
  EXPECT_EQ(key_cache.Get(2 * 16), key.Get(0));
}

XLA_OPS_TEST(LastOfEqualSlotsWins) {
  std::mt19937 random(6);
  const Attrs attrs = Nhd(2, 8);
  TestTensor key(DType::kF32, {3, 2, 8});
  key.FillRandom(&random);
  TestTensor cache(DType::kF32, {4, 3, 2, 8});
  ExpectOk(RunOne(key, &cache, TestTensor(DType::kS64, {3}, {7, 7, 7}), attrs));
  for (int64_t i = 0; i < 16; ++i) {
    EXPECT_EQ(cache.Get(7 * 16 + i), key.Get(2 * 16 + i));
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(7);
  Attrs attrs = Nhd(8, 64);
  attrs.num_blocks = 50;
  attrs.page_size = 16;
  attrs.block_stride = 16 * 8 * 64;
  attrs.kv_cache_dtype = "fp8";
  TestTensor key(DType::kBF16, {700, 8, 64});
  TestTensor value(DType::kBF16, {700, 8, 64});
  key.FillRandom(&random);
  value.FillRandom(&random);
  TestTensor slots(DType::kS64, {700});
  for (int64_t t = 0; t < 700; ++t) {
    slots.Set(t, static_cast<double>(random() % 820));  // some twice or out
  }
  TestTensor alone_key(DType::kF8E4M3FN, {50, 16, 8, 64});
  TestTensor alone_value = alone_key;
  TestTensor key_cache = alone_key;
  TestTensor value_cache = alone_key;
  ExpectOk(RunBoth(key, value, &alone_key, &alone_value, slots, attrs));
  TestThreads threads(4);
  ExpectOk(RunBoth(key, value, &key_cache, &value_cache, slots, attrs, One(),
                   One(), &threads));
  EXPECT_TRUE(key_cache.bytes() == alone_key.bytes());
  EXPECT_TRUE(value_cache.bytes() == alone_value.bytes());
}

XLA_OPS_TEST(UnaliasedResultsAreCopiedFirst) {
  std::mt19937 random(8);
  const Attrs attrs = Nhd(2, 8);
  TestTensor key(DType::kF32, {1, 2, 8});
  TestTensor key_cache(DType::kF32, {4, 3, 2, 8});
  TestTensor value_cache(DType::kF32, {4, 3, 2, 8});
  for (TestTensor* t : {&key, &key_cache, &value_cache}) {
    t->FillRandom(&random);
  }
  const TestTensor old_key = key_cache;
  TestTensor key_out(DType::kF32, {4, 3, 2, 8});
  TestTensor value_out(DType::kF32, {4, 3, 2, 8});
  // With a token, and with none at all.
  for (const TestTensor& slots :
       {TestTensor(DType::kS64, {1}, {4}), TestTensor(DType::kS64, {0})}) {
    key_out.Fill(NAN);
    value_out.Fill(NAN);
    TestTensor want = key_cache;
    Model(attrs, key, slots, 0, 1, &want);
    CallFrame frame;
    AddArgs(&frame,
            {&key, &key, &key_cache, &value_cache, &slots, &One(), &One()});
    AddResults(&frame, {&key_out, &value_out});
    attrs.AddTo(&frame);
    ExpectOk(frame.Call(xla_ops_reshape_and_cache_flash_cpu));
    ExpectSameValues(key_out, want);
    EXPECT_TRUE(key_cache.bytes() == old_key.bytes());
    EXPECT_EQ(value_out.Get(0), value_cache.Get(0));
  }
}

XLA_OPS_TEST(EmptyOperandsAreSuccess) {
  const Attrs attrs = Nhd(2, 8);
  TestTensor cache(DType::kF32, {4, 3, 2, 8});
  const TestTensor before = cache;
  const TestTensor none(DType::kF32, {0, 2, 8});
  ExpectOk(RunOne(none, &cache, TestTensor(DType::kS64, {0}), attrs));
  ExpectOk(RunOne(TestTensor(DType::kF32, {1, 0, 8}), &cache,
                  TestTensor(DType::kS64, {1}, {0}), attrs));
  EXPECT_TRUE(cache.bytes() == before.bytes());
  // An empty cache has no slot: every token is skipped.
  TestTensor no_cache(DType::kF32, {0, 3, 2, 8});
  Attrs empty = attrs;
  empty.num_blocks = 0;
  ExpectOk(RunOne(TestTensor(DType::kF32, {1, 2, 8}), &no_cache,
                  TestTensor(DType::kS64, {1}, {0}), empty));
  empty.num_blocks = 4;
  empty.page_size = 0;
  ExpectOk(RunOne(TestTensor(DType::kF32, {1, 2, 8}), &no_cache,
                  TestTensor(DType::kS64, {1}, {0}), empty));
  no_cache.ExpectGuardsIntact();
}

// What `body` writes to stderr.
template <typename Body>
std::string CaptureStderr(const Body& body) {
  std::FILE* file = std::tmpfile();
  std::fflush(stderr);
  const int saved = dup(STDERR_FILENO);
  dup2(fileno(file), STDERR_FILENO);
  body();
  std::fflush(stderr);
  dup2(saved, STDERR_FILENO);
  close(saved);
  std::rewind(file);
  std::string text;
  for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) {
    text += static_cast<char>(c);
  }
  std::fclose(file);
  return text;
}

XLA_OPS_TEST(DebugReportsSkippedSlots) {
  Attrs attrs = Nhd(2, 8);
  TestTensor key(DType::kF32, {20, 2, 8});
  TestTensor cache(DType::kF32, {4, 3, 2, 8});
  const TestTensor slots(DType::kS64, {4}, {3, -1, 12, 999});
  EXPECT_EQ(CaptureStderr([&] { ExpectOk(RunOne(key, &cache, slots, attrs)); }),
            "");
  attrs.debug = true;
  EXPECT_EQ(
      CaptureStderr([&] { ExpectOk(RunOne(key, &cache, slots, attrs)); }),
      "xla_ops: reshape_and_cache_flash: slot_mapping[2] must be less than "
      "12, got 12; skipped\n"
      "xla_ops: reshape_and_cache_flash: slot_mapping[3] must be less than "
      "12, got 999; skipped\n");
  TestTensor many(DType::kS64, {20});
  many.Fill(100);
  const std::string text =
      CaptureStderr([&] { ExpectOk(RunOne(key, &cache, many, attrs)); });
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 8);
}

constexpr char kPrefix[] = "reshape_and_cache_flash: ";

XLA_OPS_TEST(OperandErrors) {
  const Attrs attrs = Nhd(2, 8);
  const TestTensor key(DType::kF16, {4, 2, 8});
  const TestTensor slots(DType::kS64, {4}, {0, 1, 2, 3});
  TestTensor cache(DType::kF16, {4, 3, 2, 8});
  const TestTensor before = cache;
  const auto expect = [&](const CallStatus& status, const char* text) {
    ExpectInvalid(status, std::string(kPrefix) + text);
  };
  expect(RunOne(TestTensor(DType::kS32, {4, 2, 8}), &cache, slots, attrs),
         "key must be float32, float16 or bfloat16, got int32");
  expect(RunOne(TestTensor(DType::kF16, {4, 8}), &cache, slots, attrs),
         "key must have shape [num_tokens, num_kv_heads, head_dim], got "
         "[4, 8]");
  expect(RunOne(key, &cache, TestTensor(DType::kS32, {4}), attrs),
         "slot_mapping must be int64, got int32");
  expect(RunOne(key, &cache, TestTensor(DType::kS64, {4, 1}), attrs),
         "slot_mapping must have shape [num_tokens], got [4, 1]");
  expect(RunOne(key, &cache, TestTensor(DType::kS64, {5}), attrs),
         "slot_mapping must have at most 4 elements, got 5");
  expect(RunOne(key, &cache, slots, attrs, TestTensor(DType::kF16, {1})),
         "k_scale must be float32, got float16");
  expect(RunOne(key, &cache, slots, attrs, TestTensor(DType::kF32, {2})),
         "k_scale must have 1 element, got shape [2]");
  expect(RunBoth(key, TestTensor(DType::kF32, {4, 2, 8}), &cache, &cache, slots,
                 attrs),
         "value must be float16, got float32");
  expect(RunBoth(key, TestTensor(DType::kF16, {4, 2, 4}), &cache, &cache, slots,
                 attrs),
         "value must have shape [4, 2, 8], got [4, 2, 4]");
  expect(RunBoth(key, key, &cache, &cache, slots, attrs, One(),
                 TestTensor(DType::kF32, {3})),
         "v_scale must have 1 element, got shape [3]");
  EXPECT_TRUE(cache.bytes() == before.bytes());
}

XLA_OPS_TEST(CacheErrors) {
  const Attrs attrs = Nhd(2, 8);
  const TestTensor key(DType::kF16, {4, 2, 8});
  const TestTensor slots(DType::kS64, {4}, {0, 1, 2, 3});
  TestTensor cache(DType::kF16, {4, 3, 2, 8});
  TestTensor fp8(DType::kF8E4M3FN, {4, 3, 2, 8});
  TestTensor other(DType::kF32, {4, 3, 2, 8});
  TestTensor small(DType::kF16, {4, 3, 2, 7});
  const auto expect = [&](const CallStatus& status, const char* text) {
    ExpectInvalid(status, std::string(kPrefix) + text);
  };
  expect(RunOne(key, &other, slots, attrs),
         "key_cache must be float16, got float32");
  expect(RunBoth(key, key, &cache, &other, slots, attrs),
         "value_cache must be float16, got float32");
  expect(RunStacked(key, key, &other, slots, attrs),
         "kv_cache must be float16, got float32");
  expect(RunOne(key, &small, slots, attrs),
         "key_cache must have at least 192 elements, got 168");
  expect(RunBoth(key, key, &cache, &small, slots, attrs),
         "value_cache must have at least 192 elements, got 168");

  Attrs changed = attrs;
  changed.kv_cache_dtype = "int8";
  expect(RunOne(key, &cache, slots, changed),
         "kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8");
  changed.kv_cache_dtype = "fp8";
  expect(RunOne(key, &cache, slots, changed),
         "key_cache must be float8_e4m3fn or uint8, got float16");
  changed.kv_cache_dtype = "fp8_e5m2";
  expect(RunOne(key, &fp8, slots, changed),
         "key_cache must be float8_e5m2 or uint8, got float8_e4m3fn");
  changed = attrs;
  changed.value_offset = 1;
  expect(RunStacked(key, key, &cache, slots, changed),
         "kv_cache must have at least 193 elements, got 192");
  changed.value_offset = -1;
  expect(RunStacked(key, key, &cache, slots, changed),
         "value_offset must be at least 0, got -1");
  changed.key_offset = -1;
  expect(RunStacked(key, key, &cache, slots, changed),
         "key_offset must be at least 0, got -1");
  const std::pair<const char*, int64_t Attrs::*> kSizes[] = {
      {"num_blocks", &Attrs::num_blocks},
      {"page_size", &Attrs::page_size},
      {"block_stride", &Attrs::block_stride},
      {"page_stride", &Attrs::page_stride},
      {"head_stride", &Attrs::head_stride}};
  for (const auto& [name, member] : kSizes) {
    changed = attrs;
    changed.*member = -1;
    expect(RunOne(key, &cache, slots, changed),
           (std::string(name) + " must be at least 0, got -1").c_str());
  }
}

XLA_OPS_TEST(ResultErrors) {
  const Attrs attrs = Nhd(2, 8);
  const TestTensor key(DType::kF16, {1, 2, 8});
  const TestTensor slots(DType::kS64, {1}, {0});
  TestTensor cache(DType::kF16, {4, 3, 2, 8});
  TestTensor result(DType::kF16, {4, 48});
  CallFrame frame;
  AddArgs(&frame, {&key, &cache, &slots, &One()});
  AddResults(&frame, {&result});
  attrs.AddTo(&frame, /*one=*/true);
  ExpectInvalid(frame.Call(xla_ops_reshape_and_cache_flash_one_cpu),
                "reshape_and_cache_flash: key_cache result must have shape "
                "[4, 3, 2, 8], got [4, 48]");
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 3u);
  const char* const kTargets[] = {"xla_ops.reshape_and_cache_flash",
                                  "xla_ops.reshape_and_cache_flash_stacked",
                                  "xla_ops.reshape_and_cache_flash_one"};
  for (size_t i = 0; i < count && i < 3; ++i) {
    EXPECT_EQ(std::string(handlers[i].target), kTargets[i]);
    EXPECT_EQ(std::string(handlers[i].platform), "Host");
    EXPECT_TRUE(handlers[i].bundle.execute != nullptr);
  }
}

// Checked by the CUDA handlers alone, so on parameters as they would bind them.
XLA_OPS_TEST(CudaLimits) {
  ReshapeAndCacheFlashParams params = {};
  params.num_tokens = params.num_blocks = params.page_size = 1;
  params.num_kv_heads = 1024;
  params.head_dim = 1 << 20;
  EXPECT_TRUE(CheckCudaLimits(params).success());
  params.num_kv_heads = 1025;
  EXPECT_EQ(CheckCudaLimits(params).message(),
            "reshape_and_cache_flash: key must have at most 1073741824 "
            "elements a token, got 1074790400");
  params.num_tokens = 0;  // nothing is launched
  EXPECT_TRUE(CheckCudaLimits(params).success());
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
