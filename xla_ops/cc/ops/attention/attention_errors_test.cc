// Every error text of xla_ops.flash_attn_varlen and xla_ops.paged_attention,
// from their CPU handlers on hand-built frames.

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"
#include "xla_ops/cc/ops/attention/attention_testing.h"

namespace xla_ops::testing {
namespace {

// An argument as flash_attn_varlen and as paged_attention call it.
struct Name {
  Name(const char* name) : flash(name), paged(name) {}  // NOLINT: implicit
  Name(const char* flash, const char* paged) : flash(flash), paged(paged) {}
  std::string flash;
  std::string paged;
};

// 3 sequences of 13 rows in all, 4 heads over 2 KV heads of 16 elements:
// pages of 4 tokens in 11 blocks of 128 elements, 6 in a table; or 32 rows
// of 32 elements.
Batch Good(Layout layout, const char* kv_cache_dtype) {
  Shape shape;
  shape.dtype = DType::kF16;
  shape.kv_cache_dtype = kv_cache_dtype;
  shape.layout = layout;
  return Batch(shape, {{4, 9}, {3, 3}, {6, 20}});
}

// Alters a good batch and expects "<op>: <name> must <rule>" of both ops,
// and `out` untouched.
template <typename Change>
void ExpectErrorIn(const Batch& good, const Name& name, const std::string& rule,
                   const Change& change) {
  Batch batch = good;
  change(&batch);
  const std::vector<unsigned char> before = batch.out.bytes();
  ExpectInvalid(batch.Run(xla_ops_flash_attn_varlen_cpu),
                "flash_attn_varlen: " + name.flash + " must " + rule);
  ExpectInvalid(batch.Run(xla_ops_paged_attention_cpu),
                "paged_attention: " + name.paged + " must " + rule);
  EXPECT_TRUE(batch.out.bytes() == before);
}

template <typename Change>
void ExpectError(const Name& name, const std::string& rule,
                 const Change& change) {
  ExpectErrorIn(Good(Layout::kNhd, "auto"), name, rule, change);
}

template <typename Change>
void ExpectContiguousError(const Name& name, const std::string& rule,
                           const Change& change) {
  ExpectErrorIn(Good(Layout::kContiguous, "auto"), name, rule, change);
}

template <typename Change>
void ExpectFp8Error(const Name& name, const std::string& rule,
                    const Change& change) {
  ExpectErrorIn(Good(Layout::kNhd, "fp8"), name, rule, change);
}

const Name kQuery("q", "query");
const Name kKey("k", "key_cache");
const Name kValue("v", "value_cache");
const Name kCuSeqlensQ("cu_seqlens_q", "query_start_loc");
const Name kSeqUsedK("seqused_k", "context_lens");
const Name kBlockTable("block_table", "block_tables");

TestTensor Int32(std::vector<int64_t> dims) {
  return TestTensor(DType::kS32, std::move(dims));
}
TestTensor Float32(std::vector<int64_t> dims) {
  return TestTensor(DType::kF32, std::move(dims));
}

XLA_OPS_TEST(QueryErrors) {
  ExpectError(kQuery, "be float32, float16 or bfloat16, got int32",
              [](Batch* b) { b->query = Int32({1}); });
  ExpectError(kQuery,
              "have shape [num_tokens, num_heads, head_dim], got [4, 8]",
              [](Batch* b) { b->query = TestTensor(DType::kF16, {4, 8}); });
  for (const int64_t head_dim : {0, 12, 264}) {
    ExpectError(kQuery,
                "have a head_dim that is a multiple of 8 up to 256, got " +
                    std::to_string(head_dim),
                [&](Batch* b) {
                  b->query = TestTensor(DType::kF16, {4, 4, head_dim});
                });
  }
  for (const int64_t kv_heads : {-1, 0, 3, 8}) {
    ExpectError("num_kv_heads",
                "divide num_heads 4, got " + std::to_string(kv_heads),
                [&](Batch* b) { b->shape.num_kv_heads = kv_heads; });
  }
}

XLA_OPS_TEST(GeometryErrors) {
  ExpectError("num_blocks", "be at least 0, got -1",
              [](Batch* b) { b->num_blocks = -1; });
  ExpectError("page_size", "be at least 0, got -1",
              [](Batch* b) { b->shape.page_size = -1; });
  ExpectError("block_stride", "be at least 0, got -1",
              [](Batch* b) { b->block_stride = -1; });
  ExpectError("page_stride", "be at least 0, got -1",
              [](Batch* b) { b->page_stride = -1; });
  ExpectError("head_stride", "be at least 0, got -1",
              [](Batch* b) { b->head_stride = -1; });
  ExpectError("key_offset", "be at least 0, got -1",
              [](Batch* b) { b->key_offset = -1; });
  ExpectError("value_offset", "be at least 0, got -1",
              [](Batch* b) { b->value_offset = -1; });
  ExpectError("num_blocks",
              "give less than 2^63 slots, got 4611686018427387904",
              [](Batch* b) { b->num_blocks = int64_t{1} << 62; });
  ExpectError("page_size",
              "give less than 2^63 tokens, got 4611686018427387904",
              [](Batch* b) {
                b->num_blocks = 0;
                b->shape.page_size = int64_t{1} << 62;
              });
  for (const int64_t num_blocks : {0, 2}) {
    const Batch good = Good(Layout::kContiguous, "auto");
    Batch batch = good;
    batch.num_blocks = num_blocks;
    const std::string got = ", got " + std::to_string(num_blocks);
    ExpectInvalid(batch.Run(xla_ops_flash_attn_varlen_cpu),
                  "flash_attn_varlen: num_blocks must be 1 without "
                  "block_table" +
                      got);
    ExpectInvalid(batch.Run(xla_ops_paged_attention_cpu),
                  "paged_attention: num_blocks must be 1 without "
                  "block_tables" +
                      got);
  }
}

XLA_OPS_TEST(KeyAndValueErrors) {
  ExpectError("kv_cache_dtype", "be auto, fp8, fp8_e4m3 or fp8_e5m2, got int8",
              [](Batch* b) { b->shape.kv_cache_dtype = "int8"; });
  ExpectError(kKey, "be float16, got float32", [](Batch* b) {
    b->key = TestTensor(DType::kF32, b->key.dims());
  });
  ExpectError(kValue, "be float16, got bfloat16", [](Batch* b) {
    b->value = TestTensor(DType::kBF16, b->key.dims());
  });
  ExpectError(kKey, "be float8_e4m3fn or uint8, got float16",
              [](Batch* b) { b->shape.kv_cache_dtype = "fp8"; });
  ExpectFp8Error(
      kValue, "be float8_e4m3fn or uint8, got float8_e5m2",
      [](Batch* b) { b->value = TestTensor(DType::kF8E5M2, b->key.dims()); });
  ExpectFp8Error(kKey, "be float8_e5m2 or uint8, got float8_e4m3fn",
                 [](Batch* b) { b->shape.kv_cache_dtype = "fp8_e5m2"; });
  ExpectError(kKey, "have at least 1408 elements, got 16",
              [](Batch* b) { b->key = TestTensor(DType::kF16, {16}); });
  ExpectError(kValue, "have at least 1409 elements, got 1408",
              [](Batch* b) { b->value_offset = 1; });
  ExpectContiguousError(kKey, "have at least 1056 elements, got 1024",
                        [](Batch* b) { b->shape.page_size = 33; });
  ExpectError(kKey, "hold its view (offset and strides), got 1408 elements",
              [](Batch* b) { b->block_stride = int64_t{1} << 61; });
}

XLA_OPS_TEST(PagedTableErrors) {
  ExpectError(kSeqUsedK, "be int32, got int64",
              [](Batch* b) { b->seqused_k = TestTensor(DType::kS64, {3}); });
  ExpectError(kSeqUsedK, "have shape [max_num_seqs], got [3, 1]",
              [](Batch* b) { b->seqused_k = Int32({3, 1}); });
  ExpectError(kBlockTable, "be int32, got float32",
              [](Batch* b) { b->block_table = Float32({3, 6}); });
  ExpectError(kBlockTable, "have shape [3, max_blocks], got [2, 6]",
              [](Batch* b) { b->block_table = Int32({2, 6}); });
  ExpectError(kBlockTable, "have shape [3, max_blocks], got [0]",
              [](Batch* b) { b->block_table = Int32({0}); });
  ExpectError(kCuSeqlensQ, "have shape [4], got [3]",
              [](Batch* b) { b->cu_seqlens_q = Int32({3}); });
  ExpectError(kCuSeqlensQ, "be int32, got uint8",
              [](Batch* b) { b->cu_seqlens_q = TestTensor(DType::kU8, {4}); });
  for (const char* name : {"cu_seqlens_k", "leftpad_k"}) {
    Batch batch = Good(Layout::kNhd, "auto");
    (name[0] == 'c' ? batch.cu_seqlens_k : batch.leftpad_k) = Int32({4});
    ExpectInvalid(batch.Run(xla_ops_flash_attn_varlen_cpu),
                  std::string("flash_attn_varlen: ") + name +
                      " must be absent with block_table, got shape [4]");
    ExpectInvalid(batch.Run(xla_ops_paged_attention_cpu),
                  std::string("paged_attention: ") + name +
                      " must be absent with block_tables, got shape [4]");
  }
  ExpectError("num_seqs", "have 1 element, got shape [2]",
              [](Batch* b) { b->num_seqs = Int32({2}); });
  ExpectError("num_seqs", "be int32, got int64",
              [](Batch* b) { b->num_seqs = TestTensor(DType::kS64, {1}); });
}

XLA_OPS_TEST(ContiguousTableErrors) {
  ExpectContiguousError(kCuSeqlensQ, "be int32, got float32",
                        [](Batch* b) { b->cu_seqlens_q = Float32({4}); });
  ExpectContiguousError(kCuSeqlensQ,
                        "have shape [max_num_seqs + 1], got [4, 1]",
                        [](Batch* b) { b->cu_seqlens_q = Int32({4, 1}); });
  ExpectContiguousError(kCuSeqlensQ, "have shape [max_num_seqs + 1], got [0]",
                        [](Batch* b) { b->cu_seqlens_q = Int32({0}); });
  ExpectContiguousError("cu_seqlens_k", "have shape [4], got [3]",
                        [](Batch* b) { b->cu_seqlens_k = Int32({3}); });
  ExpectContiguousError("cu_seqlens_k", "have shape [4], got [0]",
                        [](Batch* b) { b->cu_seqlens_k = Int32({0}); });
  ExpectContiguousError("cu_seqlens_k", "be int32, got int64", [](Batch* b) {
    b->cu_seqlens_k = TestTensor(DType::kS64, {4});
  });
  ExpectContiguousError(kSeqUsedK, "have shape [3], got [4]",
                        [](Batch* b) { b->seqused_k = Int32({4}); });
  ExpectContiguousError(kSeqUsedK, "be int32, got float32",
                        [](Batch* b) { b->seqused_k = Float32({3}); });
  ExpectContiguousError("leftpad_k", "have shape [3], got [1, 3]",
                        [](Batch* b) { b->leftpad_k = Int32({1, 3}); });
  ExpectContiguousError("leftpad_k", "be int32, got float32",
                        [](Batch* b) { b->leftpad_k = Float32({3}); });
  ExpectContiguousError(kBlockTable,
                        "be absent where paged is false, got shape [3, 2]",
                        [](Batch* b) { b->block_table = Int32({3, 2}); });
}

XLA_OPS_TEST(LogitOperandErrors) {
  ExpectError("alibi_slopes", "be float32, got float16",
              [](Batch* b) { b->alibi_slopes = TestTensor(DType::kF16, {4}); });
  ExpectError("alibi_slopes", "have shape [4] or [3, 4], got [3]",
              [](Batch* b) { b->alibi_slopes = Float32({3}); });
  ExpectError("alibi_slopes", "have shape [4] or [3, 4], got [4, 3]",
              [](Batch* b) { b->alibi_slopes = Float32({4, 3}); });
  ExpectError("sinks", "be float32, got bfloat16",
              [](Batch* b) { b->sinks = TestTensor(DType::kBF16, {4}); });
  ExpectError("sinks", "have shape [4], got [2]",
              [](Batch* b) { b->sinks = Float32({2}); });
}

XLA_OPS_TEST(ScaleErrors) {
  for (const bool of_keys : {true, false}) {
    const char* name = of_keys ? "k_scale" : "v_scale";
    const auto set = [&](const TestTensor& tensor) {
      return [of_keys, tensor](Batch* b) {
        (of_keys ? b->k_scale : b->v_scale) = tensor;
      };
    };
    ExpectError(name, "be absent with kv_cache_dtype auto, got shape [1]",
                set(Float32({1})));
    ExpectFp8Error(name, "be float32, got float16",
                   set(TestTensor(DType::kF16, {1})));
    ExpectFp8Error(name, "have 1 element or shape [3, 2], got shape [2]",
                   set(Float32({2})));
    ExpectFp8Error(name, "have 1 element or shape [3, 2], got shape [2, 3]",
                   set(Float32({2, 3})));
  }
}

XLA_OPS_TEST(ScalarErrors) {
  const float inf = std::numeric_limits<float>::infinity();
  const Name scale("softmax_scale", "scale");
  const Name soft_cap("softcap", "soft_cap");
  ExpectError(scale, "be finite, got nan", [](Batch* b) { b->scale = NAN; });
  ExpectError(scale, "be finite, got inf", [&](Batch* b) { b->scale = inf; });
  ExpectError("window_left", "be at least -1, got -2",
              [](Batch* b) { b->window_left = -2; });
  ExpectError("window_right", "be at least -1, got -2",
              [](Batch* b) { b->window_right = -2; });
  ExpectError(soft_cap, "be finite and at least 0, got -1",
              [](Batch* b) { b->soft_cap = -1; });
  ExpectError(soft_cap, "be finite and at least 0, got nan",
              [](Batch* b) { b->soft_cap = NAN; });
  ExpectError(soft_cap, "be finite and at least 0, got inf",
              [&](Batch* b) { b->soft_cap = inf; });
  for (const int64_t num_splits : {0, 1025}) {
    ExpectError("num_splits",
                "be from 1 to 1024, got " + std::to_string(num_splits),
                [&](Batch* b) { b->num_splits = num_splits; });
  }
}

XLA_OPS_TEST(ResultErrors) {
  ExpectError("out", "have shape [13, 4, 16], got [13, 64]",
              [](Batch* b) { b->out = TestTensor(DType::kF16, {13, 64}); });
  ExpectError("out", "be float16, got float32",
              [](Batch* b) { b->out = Float32({13, 4, 16}); });
  ExpectError("lse", "be float32, got float16",
              [](Batch* b) { b->lse = TestTensor(DType::kF16, {4, 13}); });
  ExpectError("lse", "have shape [4, 13], got [13, 4]",
              [](Batch* b) { b->lse = Float32({13, 4}); });
  ExpectError("workspace", "be uint8, got float32",
              [](Batch* b) { b->workspace = Float32({128}); });
  ExpectError("workspace", "have at least 128 elements, got 127",
              [](Batch* b) { b->workspace = TestTensor(DType::kU8, {127}); });
  // 128, and 2 splits of 13 * 4 rows of 16 + 2 floats.
  ExpectError("workspace", "have at least 7616 elements, got 128",
              [](Batch* b) { b->num_splits = 2; });
}

// Checked by CUDA handlers alone, so on parameters as they would bind them.
XLA_OPS_TEST(CudaLimits) {
  const auto call = [](int64_t num_tokens, int64_t num_heads,
                       int64_t num_kv_heads, int64_t max_num_seqs) {
    AttentionParams params = {};
    params.num_tokens = num_tokens;
    params.num_heads = num_heads;
    params.num_kv_heads = num_kv_heads;
    params.max_num_seqs = max_num_seqs;
    return params;
  };
  const auto expect_ok = [](const AttentionParams& params) {
    EXPECT_TRUE(CheckCudaLimits(kFlashAttnVarlenNames, params).success());
  };
  const auto expect_error = [](const AttentionParams& params, const Name& name,
                               const std::string& rule) {
    EXPECT_EQ(CheckCudaLimits(kFlashAttnVarlenNames, params).message(),
              "flash_attn_varlen: " + name.flash + " must " + rule);
    EXPECT_EQ(CheckCudaLimits(kPagedAttentionNames, params).message(),
              "paged_attention: " + name.paged + " must " + rule);
  };
  const int64_t rows = 2147483647;
  const int64_t seqs = 1073741823;
  const int64_t big = int64_t{1} << 62;
  expect_ok(call(rows, 1, 1, 1));
  expect_ok(call(rows / 8, 8, 4, seqs));
  expect_ok(call(1, 65535, 65535, 1));
  expect_ok(call(0, 8, 4, big));
  expect_ok(call(big, 0, 0, 1));
  expect_error(call(rows + 1, 1, 1, 1), kQuery,
               "have at most 2147483647 rows (token, head), got 2147483648");
  expect_error(call(rows / 8 + 1, 8, 4, 1), kQuery,
               "have at most 2147483647 rows (token, head), got 2147483648");
  expect_error(
      call(big, 8, 4, 1), kQuery,
      "have at most 2147483647 rows (token, head), got 9223372036854775807");
  expect_error(call(1, 8, 4, seqs + 1), kCuSeqlensQ,
               "have at most 1073741824 elements, got 1073741825");
  expect_error(call(1, 65536, 65536, 1), "num_kv_heads",
               "be at most 65535, got 65536");
}

// Whatever the type and shape of an operand without an element.
XLA_OPS_TEST(AbsentOperandsAreNotLookedAt) {
  const TestTensor absent(DType::kBF16, {7, 0, 2});
  for (const Layout layout : {Layout::kNhd, Layout::kContiguous}) {
    Batch batch = Good(layout, "auto");
    batch.alibi_slopes = batch.sinks = batch.k_scale = batch.v_scale = absent;
    batch.leftpad_k = batch.num_seqs = absent;
    (batch.paged ? batch.cu_seqlens_k : batch.seqused_k) = absent;
    if (!batch.paged) batch.block_table = absent;
    ExpectRight(batch);
  }
}

}  // namespace
}  // namespace xla_ops::testing

XLA_OPS_TEST_MAIN()
