// xla_ops.copy_blocks's CPU handler on hand-built frames: what is copied and
// what is not, every error text, guard bytes, empty operands, threads.

#include "xla_ops/cc/ops/copy_blocks/copy_blocks.h"

#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/copy_blocks/copy_blocks_checks.h"

extern "C" XLA_FFI_Error* xla_ops_copy_blocks_cpu(XLA_FFI_CallFrame*);
extern "C" XlaOpsHandlersFn xla_ops_handlers;

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::ExpectOk;
using testing::TestTensor;
using testing::TestThreads;

struct Attrs {
  int64_t num_blocks;
  int64_t page_size;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_stride;
  int64_t page_stride;
  int64_t head_stride;
  int64_t offset = 0;
  bool debug = false;
};

// Dense [7, 3, 2, 5].
constexpr Attrs kDense = {7, 3, 2, 5, 30, 10, 5};

CallStatus Run(const TestTensor& cache, const TestTensor& mapping,
               TestTensor* result, const Attrs& attrs,
               TaskRunner* threads = nullptr) {
  CallFrame frame;
  AddArgs(&frame, {&cache, &mapping});
  AddResults(&frame, {result});
  frame.AddAttr("num_blocks", attrs.num_blocks)
      .AddAttr("page_size", attrs.page_size)
      .AddAttr("num_kv_heads", attrs.num_kv_heads)
      .AddAttr("head_dim", attrs.head_dim)
      .AddAttr("block_stride", attrs.block_stride)
      .AddAttr("page_stride", attrs.page_stride)
      .AddAttr("head_stride", attrs.head_stride)
      .AddAttr("offset", attrs.offset)
      .AddAttr("debug", attrs.debug)
      .SetTaskRunner(threads);
  return frame.Call(xla_ops_copy_blocks_cpu);
}

TestTensor Mapping(const std::vector<double>& numbers) {
  return TestTensor(DType::kS64, {static_cast<int64_t>(numbers.size()) / 2, 2},
                    numbers);
}

// The definition: pair after pair, element after element.
void Model(const TestTensor& mapping, const Attrs& attrs, TestTensor* cache) {
  for (int64_t p = 0; p < mapping.dims()[0]; ++p) {
    const auto source = static_cast<int64_t>(mapping.Get(2 * p));
    const auto target = static_cast<int64_t>(mapping.Get(2 * p + 1));
    if (source < 0 || source >= attrs.num_blocks) continue;
    if (target < 0 || target >= attrs.num_blocks) continue;
    for (int64_t page = 0; page < attrs.page_size; ++page) {
      for (int64_t head = 0; head < attrs.num_kv_heads; ++head) {
        for (int64_t d = 0; d < attrs.head_dim; ++d) {
          const int64_t at = attrs.offset + page * attrs.page_stride +
                             head * attrs.head_stride + d;
          cache->Set(at + target * attrs.block_stride,
                     cache->Get(at + source * attrs.block_stride));
        }
      }
    }
  }
}

const std::vector<std::vector<double>>& Mappings() {
  static const auto* mappings = new std::vector<std::vector<double>>{
      {1, 4, 0, 3, 6, 2},  // apart
      {0, 1, 1, 2, 2, 3},  // a chain
      {0, 1, 1, 0},        // a cycle
      {0, 1, 5, 0},        // a source written later
      {0, 4, 1, 4},        // one target twice
      {2, 2, 2, 3},        // to itself
      {-1, 2, 3, -1, 7, 1, 1, 7, 4, 5},
  };
  return *mappings;
}

XLA_OPS_TEST(CopiesPairAfterPair) {
  std::mt19937 random(1);
  // The same elements as a dense block, as blocks of a view, as one run, and
  // with gaps everywhere.
  const std::pair<Attrs, int64_t> kViews[] = {
      {kDense, 210},
      {{7, 1, 1, 30, 30, 0, 0}, 210},
      {{7, 2, 3, 5, 60, 5, 10, 30}, 420},
      {{7, 3, 2, 5, 40, 13, 6, 4}, 300},
  };
  for (const DType dtype :
       {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3FN,
        DType::kF8E5M2, DType::kS8, DType::kU8}) {
    for (const auto& [attrs, size] : kViews) {
      for (const std::vector<double>& numbers : Mappings()) {
        TestTensor cache(dtype, {size});
        for (int64_t i = 0; i < size; ++i) {
          cache.Set(i, static_cast<double>(random() % 100));
        }
        TestTensor want = cache;
        Model(Mapping(numbers), attrs, &want);
        ExpectOk(Run(cache, Mapping(numbers), &cache, attrs));
        EXPECT_TRUE(cache.bytes() == want.bytes());
        cache.ExpectGuardsIntact();
      }
    }
  }
}

XLA_OPS_TEST(ThreadsGiveTheSameBits) {
  std::mt19937 random(2);
  // Runs longer than one thread's piece, and not a multiple of it.
  const Attrs attrs = {9, 1, 3, 10001, 40000, 0, 12000};
  TestTensor cache(DType::kF32, {9 * 40000});
  cache.FillRandom(&random);
  TestTensor want = cache;
  for (const std::vector<double>& numbers : Mappings()) {
    Model(Mapping(numbers), attrs, &want);
    TestThreads threads(4);
    ExpectOk(Run(cache, Mapping(numbers), &cache, attrs, &threads));
    EXPECT_TRUE(cache.bytes() == want.bytes());
  }
}

XLA_OPS_TEST(UnaliasedResultIsCopiedFirst) {
  std::mt19937 random(3);
  TestTensor cache(DType::kF16, {7, 3, 2, 5});
  cache.FillRandom(&random);
  const TestTensor before = cache;
  for (const TestTensor& mapping :
       {Mapping({0, 1, 1, 2}), TestTensor(DType::kS64, {0, 2})}) {
    TestTensor result(DType::kF16, {7, 3, 2, 5});
    TestTensor want = cache;
    Model(mapping, kDense, &want);
    ExpectOk(Run(cache, mapping, &result, kDense));
    EXPECT_TRUE(result.bytes() == want.bytes());
    EXPECT_TRUE(cache.bytes() == before.bytes());
  }
}

XLA_OPS_TEST(EmptyOperandsAreSuccess) {
  TestTensor cache(DType::kF32, {7, 3, 2, 5});
  cache.Fill(1);
  const TestTensor before = cache;
  ExpectOk(Run(cache, TestTensor(DType::kS64, {0, 2}), &cache, kDense));
  for (int64_t Attrs::* size : {&Attrs::num_blocks, &Attrs::page_size,
                                &Attrs::num_kv_heads, &Attrs::head_dim}) {
    Attrs attrs = kDense;
    attrs.*size = 0;
    ExpectOk(Run(cache, Mapping({0, 1}), &cache, attrs));
    TestTensor none(DType::kF32, {0});
    ExpectOk(Run(none, Mapping({0, 1}), &none, attrs));
  }
  EXPECT_TRUE(cache.bytes() == before.bytes());
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

XLA_OPS_TEST(DebugReportsSkippedPairs) {
  TestTensor cache(DType::kF32, {7, 3, 2, 5});
  Attrs attrs = kDense;
  const auto run = [&] {
    ExpectOk(Run(cache, Mapping({0, 1, -1, 9, 7, 1, 1, 99}), &cache, attrs));
  };
  EXPECT_EQ(CaptureStderr(run), "");
  attrs.debug = true;
  EXPECT_EQ(
      CaptureStderr(run),
      "xla_ops: copy_blocks: block_mapping[2] must be less than [7, 7], got "
      "[7, 1]; skipped\n"
      "xla_ops: copy_blocks: block_mapping[3] must be less than [7, 7], got "
      "[1, 99]; skipped\n");
}

XLA_OPS_TEST(Errors) {
  TestTensor cache(DType::kF16, {7, 3, 2, 5});
  const TestTensor before = cache;
  const TestTensor mapping = Mapping({0, 1});
  const auto expect = [&](const CallStatus& status, const std::string& text) {
    ExpectInvalid(status, "copy_blocks: " + text);
  };
  TestTensor wide(DType::kS64, {210});
  expect(Run(wide, mapping, &wide, kDense),
         "cache must be float32, float16, bfloat16, float8_e4m3fn, "
         "float8_e5m2, int8 or uint8, got int64");
  expect(Run(cache, TestTensor(DType::kS32, {1, 2}), &cache, kDense),
         "block_mapping must be int64, got int32");
  expect(Run(cache, TestTensor(DType::kS64, {4}), &cache, kDense),
         "block_mapping must have shape [num_pairs, 2], got [4]");
  expect(Run(cache, TestTensor(DType::kS64, {2, 3}), &cache, kDense),
         "block_mapping must have shape [num_pairs, 2], got [2, 3]");
  const std::pair<const char*, int64_t Attrs::*> kNumbers[] = {
      {"num_blocks", &Attrs::num_blocks},
      {"page_size", &Attrs::page_size},
      {"num_kv_heads", &Attrs::num_kv_heads},
      {"head_dim", &Attrs::head_dim},
      {"block_stride", &Attrs::block_stride},
      {"page_stride", &Attrs::page_stride},
      {"head_stride", &Attrs::head_stride},
      {"offset", &Attrs::offset}};
  for (const auto& [name, member] : kNumbers) {
    Attrs attrs = kDense;
    attrs.*member = -1;
    expect(Run(cache, mapping, &cache, attrs),
           std::string(name) + " must be at least 0, got -1");
  }
  Attrs attrs = kDense;
  attrs.offset = 1;
  expect(Run(cache, mapping, &cache, attrs),
         "cache must have at least 211 elements, got 210");
  attrs = kDense;
  attrs.block_stride = std::numeric_limits<int64_t>::max();
  expect(Run(cache, mapping, &cache, attrs),
         "cache must hold its view (offset and strides), got 210 elements");
  TestTensor other(DType::kF16, {210});
  expect(Run(cache, mapping, &other, kDense),
         "cache result must have shape [7, 3, 2, 5], got [210]");
  EXPECT_TRUE(cache.bytes() == before.bytes());
}

XLA_OPS_TEST(TableNamesTheTargets) {
  size_t count = 0;
  const XlaOpsHandler* handlers = xla_ops_handlers(&count);
  EXPECT_EQ(count, 2u);
  EXPECT_EQ(std::string(handlers[0].target), "xla_ops.copy_blocks");
  EXPECT_EQ(std::string(handlers[1].target), "xla_ops.swap_blocks");
  EXPECT_EQ(std::string(handlers[0].platform), "Host");
}

// Checked by the CUDA handler alone, so on parameters as it would bind them.
XLA_OPS_TEST(CudaLimits) {
  CopyBlocksParams params = {};
  params.within_one = true;
  params.num_source_blocks = params.num_target_blocks = 2;
  params.num_pairs = 2147483647;
  params.outer_size = 16777216;
  params.inner_size = 15;
  params.run_size = 17;
  EXPECT_TRUE(CheckCudaLimits(params).success());
  params.run_size = 18;
  EXPECT_EQ(CheckCudaLimits(params).message(),
            "copy_blocks: cache must have blocks of at most 4278190080 bytes, "
            "got 4529848320");
  params.inner_size = params.run_size = int64_t{1} << 40;
  EXPECT_EQ(CheckCudaLimits(params).message(),
            "copy_blocks: cache must have blocks of at most 4278190080 bytes, "
            "got 9223372036854775807");
  params.num_pairs += 1;
  EXPECT_EQ(CheckCudaLimits(params).message(),
            "copy_blocks: block_mapping must have at most 2147483647 pairs, "
            "got 2147483648");
  params.num_target_blocks = 0;  // nothing is launched
  EXPECT_TRUE(CheckCudaLimits(params).success());
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
