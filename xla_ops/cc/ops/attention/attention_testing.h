// A batch of attention with all its operands, and attention in double, for
// the C++ tests.
//
//   Shape shape;
//   shape.layout = Layout::kContiguous;
//   Batch batch(shape, {{1, 37}, {23, 23}});   // {new tokens, KV tokens}
//   batch.sinks = TestTensor(DType::kF32, {4}, {1, 2, 3, 4});
//   ExpectOk(batch.Run());
//   batch.ExpectResult();
//
// Elements of key and value that no row may see are NaN, so that a kernel
// that reads one and lets it count is found out.
//
// Only for files that end in _test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TESTING_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TESTING_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention/attention.h"

extern "C" XLA_FFI_Error* xla_ops_flash_attn_varlen_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_paged_attention_cpu(XLA_FFI_CallFrame*);

namespace xla_ops::testing {

// A sequence: new query tokens, and KV tokens with the new ones included.
struct Seq {
  int64_t num_rows;
  int64_t kv_len;
};

enum class Layout {
  kNhd,         // [num_blocks, page_size, num_kv_heads, head_dim]
  kHnd,         // [num_blocks, num_kv_heads, page_size, head_dim]
  kStacked,     // [2, num_blocks, page_size, num_kv_heads, head_dim]
  kContiguous,  // [num_kv_tokens, num_kv_heads, head_dim]
  kPacked,      // [num_kv_tokens, 2, num_kv_heads, head_dim]
};

struct Shape {
  DType dtype = DType::kF32;
  std::string kv_cache_dtype = "auto";
  int64_t num_heads = 4;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 16;
  int64_t page_size = 4;
  Layout layout = Layout::kNhd;
  // Contiguous: rows before a sequence's tokens, which leftpad_k skips, and
  // after them, which seqused_k hides. The operands are absent where 0.
  int64_t leftpad = 0;
  int64_t slack = 0;

  bool paged() const {
    return layout != Layout::kContiguous && layout != Layout::kPacked;
  }
  // Keys and values in one buffer.
  bool together() const {
    return layout == Layout::kStacked || layout == Layout::kPacked;
  }
  DType kv_dtype() const {
    if (kv_cache_dtype == "auto") return dtype;
    return kv_cache_dtype == "fp8_e5m2" ? DType::kF8E5M2 : DType::kF8E4M3FN;
  }
};

// Decode, whole prefill, chunked prefill, one token, an empty query, a KV
// length below its query's, whose first rows see nothing when causal, and no
// KV token at all.
inline std::vector<Seq> Mixed() {
  return {{1, 37}, {23, 23}, {9, 50}, {1, 1}, {0, 12}, {5, 3}, {2, 0}};
}

// Tests may alter any member before Run.
struct Batch {
  Batch(const Shape& shape_in, const std::vector<Seq>& seqs,
        int64_t padding_rows = 0, int64_t padding_seqs = 0, uint32_t seed = 1)
      : shape(shape_in),
        num_tokens(Rows(seqs) + padding_rows),
        max_num_seqs(static_cast<int64_t>(seqs.size()) + padding_seqs),
        max_blocks(shape.paged() ? Pages(seqs, true) + 1 : 0),
        num_blocks(shape.paged() ? Pages(seqs, false) + 2 : 1),
        scale(1 / std::sqrt(static_cast<float>(shape.head_dim))),
        query(shape.dtype, {num_tokens, shape.num_heads, shape.head_dim}),
        key(shape.kv_dtype(), {0}),
        value(key),
        cu_seqlens_q(DType::kS32, {max_num_seqs + 1}),
        num_seqs(DType::kS32, {1}, {static_cast<double>(seqs.size())}),
        out(query),
        lse(DType::kF32, {shape.num_heads, num_tokens}),
        workspace(DType::kU8, {kAttentionSchedulerBytes}) {
    if (!shape.paged()) {
      shape.page_size = 0;
      for (const Seq& seq : seqs) {
        shape.page_size += shape.leftpad + seq.kv_len + shape.slack;
      }
    }
    LayOut();
    std::mt19937 random(seed);
    query.FillRandom(&random, 2.0);
    cu_seqlens_q.Fill(static_cast<double>(Rows(seqs)));
    cu_seqlens_q.Set(0, 0);
    for (size_t s = 0; s < seqs.size(); ++s) {
      cu_seqlens_q.Set(
          s + 1, cu_seqlens_q.Get(s) + static_cast<double>(seqs[s].num_rows));
    }
    if (shape.paged()) {
      FillPages(seqs, &random);
    } else {
      FillRows(seqs, &random);
    }
  }

  CallStatus Run(TaskRunner* threads = nullptr) {
    return Run(shape.paged() ? xla_ops_paged_attention_cpu
                             : xla_ops_flash_attn_varlen_cpu,
               threads);
  }
  CallStatus Run(XLA_FFI_Handler* handler, TaskRunner* threads = nullptr) {
    CallFrame frame;
    AddArgs(&frame,
            {&query, &key, shape.together() ? &key : &value, &cu_seqlens_q,
             &cu_seqlens_k, &seqused_k, &block_table, &leftpad_k, &num_seqs,
             &alibi_slopes, &sinks, &k_scale, &v_scale});
    AddResults(&frame, {&out, &lse, &workspace});
    frame.AddAttr("scale", scale)
        .AddAttr("window_left", window_left)
        .AddAttr("window_right", window_right)
        .AddAttr("soft_cap", soft_cap)
        .AddAttr("kv_cache_dtype", shape.kv_cache_dtype)
        .AddAttr("paged", paged)
        .AddAttr("num_splits", num_splits)
        .AddAttr("num_kv_heads", shape.num_kv_heads)
        .AddAttr("num_blocks", num_blocks)
        .AddAttr("page_size", shape.page_size)
        .AddAttr("block_stride", block_stride)
        .AddAttr("page_stride", page_stride)
        .AddAttr("head_stride", head_stride)
        .AddAttr("key_offset", key_offset)
        .AddAttr("value_offset", value_offset)
        .AddAttr("debug", debug)
        .SetTaskRunner(threads);
    return frame.Call(handler);
  }

  // Where token j of sequence s lies in a cache's view; -1: nowhere.
  // `first_row`: contiguous, that of its token 0.
  int64_t TokenAt(int64_t s, int64_t j, int64_t first_row = 0) const {
    if (!shape.paged()) return (first_row + j) * page_stride;
    const double block = block_table.Get(s * max_blocks + j / shape.page_size);
    if (block < 0 || block >= static_cast<double>(num_blocks)) return -1;
    return static_cast<int64_t>(block) * block_stride +
           j % shape.page_size * page_stride;
  }

  // Compares out and lse with the definition in double, row by row, from
  // the operands as they are now.
  void ExpectResult() const {
    out.ExpectGuardsIntact();
    lse.ExpectGuardsIntact();
    std::vector<double> want(query.size(), 0.0);
    std::vector<double> want_lse(lse.size(),
                                 std::numeric_limits<double>::infinity());
    const int64_t seqs = num_seqs.size() == 0
                             ? max_num_seqs
                             : Clamp(num_seqs.Get(0), 0, max_num_seqs);
    int64_t row = Clamp(cu_seqlens_q.Get(0), 0, num_tokens);
    int64_t kv_row =
        shape.paged() ? 0 : Clamp(cu_seqlens_k.Get(0), 0, shape.page_size);
    for (int64_t s = 0; s < seqs; ++s) {
      const int64_t end = Clamp(cu_seqlens_q.Get(s + 1), row, num_tokens);
      const int64_t kv_end = shape.paged() ? 0
                                           : Clamp(cu_seqlens_k.Get(s + 1),
                                                   kv_row, shape.page_size);
      int64_t kv_len = kv_end - kv_row;
      if (seqused_k.size() > 0) {
        kv_len = Clamp(seqused_k.Get(s), 0,
                       shape.paged() ? max_blocks * shape.page_size
                                     : shape.page_size - kv_row);
      }
      const int64_t pad =
          leftpad_k.size() == 0 ? 0 : Clamp(leftpad_k.Get(s), 0, kv_len);
      kv_len -= pad;
      for (int64_t i = row; i < end; ++i) {
        for (int64_t h = 0; h < shape.num_heads; ++h) {
          Attend(s, i, h, kv_row + pad, kv_len, i - row + kv_len - (end - row),
                 &want[(i * shape.num_heads + h) * shape.head_dim],
                 &want_lse[h * num_tokens + i]);
        }
      }
      row = end;
      kv_row = kv_end;
    }
    const double step = shape.dtype == DType::kF32   ? 0
                        : shape.dtype == DType::kF16 ? std::ldexp(1.0, -11)
                                                     : std::ldexp(1.0, -8);
    // Values are of order 1: fp32 accumulation, then one rounding. The
    // comparisons fail for NaN.
    for (int64_t i = 0; i < out.size(); ++i) {
      EXPECT_TRUE(std::abs(out.Get(i) - want[i]) <=
                  2e-5 + step * std::abs(want[i]));
    }
    for (int64_t i = 0; i < lse.size(); ++i) {
      EXPECT_TRUE(lse.Get(i) == want_lse[i] ||
                  std::abs(lse.Get(i) - want_lse[i]) <=
                      1e-5 + 1e-6 * std::abs(want_lse[i]));
    }
  }

  Shape shape;  // contiguous: page_size is set to the number of KV rows
  int64_t num_tokens;
  int64_t max_num_seqs;
  int64_t max_blocks;
  int64_t num_blocks;
  int64_t block_stride = 0;
  int64_t page_stride = 0;
  int64_t head_stride = 0;
  int64_t key_offset = 0;
  int64_t value_offset = 0;
  bool paged = shape.paged();
  float scale;
  int64_t window_left = -1;
  int64_t window_right = 0;
  float soft_cap = 0;
  int64_t num_splits = 1;
  bool debug = false;
  TestTensor query, key, value;
  TestTensor cu_seqlens_q;
  TestTensor cu_seqlens_k{DType::kS32, {0}};
  TestTensor seqused_k{DType::kS32, {0}};
  TestTensor block_table{DType::kS32, {0}};
  TestTensor leftpad_k{DType::kS32, {0}};
  TestTensor num_seqs;
  TestTensor alibi_slopes{DType::kF32, {0}};
  TestTensor sinks{DType::kF32, {0}};
  TestTensor k_scale{DType::kF32, {0}};
  TestTensor v_scale{DType::kF32, {0}};
  TestTensor out, lse, workspace;

 private:
  static int64_t Rows(const std::vector<Seq>& seqs) {
    int64_t rows = 0;
    for (const Seq& seq : seqs) rows += seq.num_rows;
    return rows;
  }
  int64_t Pages(const std::vector<Seq>& seqs, bool longest) const {
    int64_t sum = 0;
    int64_t max = 0;
    for (const Seq& seq : seqs) {
      const int64_t pages =
          (seq.kv_len + shape.page_size - 1) / shape.page_size;
      sum += pages;
      max = std::max(max, pages);
    }
    return longest ? max : sum;
  }
  static int64_t Clamp(double x, int64_t low, int64_t high) {
    return static_cast<int64_t>(std::min(std::max(x, static_cast<double>(low)),
                                         static_cast<double>(high)));
  }

  // Makes key and value, of NaN, and the strides.
  void LayOut() {
    const int64_t heads = shape.num_kv_heads;
    const int64_t head_dim = shape.head_dim;
    const bool hnd = shape.layout == Layout::kHnd;
    const bool packed = shape.layout == Layout::kPacked;
    head_stride = head_dim * (hnd ? shape.page_size : 1);
    page_stride = head_dim * (hnd ? 1 : heads) * (packed ? 2 : 1);
    block_stride = shape.page_size * heads * head_dim;
    const int64_t size = num_blocks * block_stride;
    if (shape.layout == Layout::kStacked) value_offset = size;
    if (packed) value_offset = heads * head_dim;
    key = TestTensor(shape.kv_dtype(), {size * (shape.together() ? 2 : 1)});
    if (!shape.together()) value = key;
  }

  void FillToken(int64_t at, std::mt19937* random) {
    std::normal_distribution<double> normal;
    for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        const int64_t element = at + h * head_stride + d;
        key.Set(key_offset + element, normal(*random));
        (shape.together() ? key : value)
            .Set(value_offset + element, normal(*random));
      }
    }
  }

  void FillPages(const std::vector<Seq>& seqs, std::mt19937* random) {
    seqused_k = TestTensor(DType::kS32, {max_num_seqs});
    block_table = TestTensor(DType::kS32, {max_num_seqs, max_blocks});
    std::vector<int64_t> blocks(num_blocks);
    for (int64_t i = 0; i < num_blocks; ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), *random);
    int64_t next_block = 0;
    for (size_t s = 0; s < seqs.size(); ++s) {
      seqused_k.Set(s, static_cast<double>(seqs[s].kv_len));
      for (int64_t j = 0; j < seqs[s].kv_len; ++j) {
        if (j % shape.page_size == 0) {
          block_table.Set(s * max_blocks + j / shape.page_size,
                          static_cast<double>(blocks[next_block++]));
        }
        FillToken(TokenAt(s, j), random);
      }
    }
  }

  void FillRows(const std::vector<Seq>& seqs, std::mt19937* random) {
    cu_seqlens_k = TestTensor(DType::kS32, {max_num_seqs + 1});
    if (shape.slack > 0) seqused_k = TestTensor(DType::kS32, {max_num_seqs});
    if (shape.leftpad > 0) leftpad_k = TestTensor(DType::kS32, {max_num_seqs});
    cu_seqlens_k.Fill(static_cast<double>(shape.page_size));
    int64_t row = 0;
    for (size_t s = 0; s < seqs.size(); ++s) {
      const int64_t kv_len = seqs[s].kv_len;
      cu_seqlens_k.Set(s, static_cast<double>(row));
      if (shape.slack > 0) {
        seqused_k.Set(s, static_cast<double>(shape.leftpad + kv_len));
      }
      if (shape.leftpad > 0) {
        leftpad_k.Set(s, static_cast<double>(shape.leftpad));
      }
      for (int64_t j = 0; j < kv_len; ++j) {
        FillToken(TokenAt(s, j, row + shape.leftpad), random);
      }
      row += shape.leftpad + kv_len + shape.slack;
    }
  }

  static double ScaleOf(const TestTensor& scale, int64_t i) {
    if (scale.size() == 0) return 1.0;
    return scale.Get(scale.size() == 1 ? 0 : i);
  }

  // Query row `row`, head `h` of sequence `s`, at KV position `position`.
  void Attend(int64_t s, int64_t row, int64_t h, int64_t first_row,
              int64_t kv_len, int64_t position, double* want,
              double* want_lse) const {
    const TestTensor& values = shape.together() ? key : value;
    const int64_t kv_head = h / (shape.num_heads / shape.num_kv_heads);
    const int64_t scale_at = s * shape.num_kv_heads + kv_head;
    const double infinity = std::numeric_limits<double>::infinity();
    std::vector<std::pair<int64_t, double>> seen;  // element, logit
    double max = -infinity;
    for (int64_t j = 0; j < kv_len; ++j) {
      if (window_left >= 0 && position - j > window_left) continue;
      if (window_right >= 0 && j - position > window_right) continue;
      const int64_t token = TokenAt(s, j, first_row);
      if (token < 0) continue;
      const int64_t at = token + kv_head * head_stride;
      double logit = 0;
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        logit += query.Get((row * shape.num_heads + h) * shape.head_dim + d) *
                 key.Get(key_offset + at + d);
      }
      logit *= scale * ScaleOf(k_scale, scale_at);
      if (soft_cap > 0) logit = soft_cap * std::tanh(logit / soft_cap);
      if (alibi_slopes.size() > 0) {
        const bool of_seq = alibi_slopes.dims().size() == 2;
        logit -= alibi_slopes.Get((of_seq ? s * shape.num_heads : 0) + h) *
                 static_cast<double>(std::abs(position - j));
      }
      max = std::max(max, logit);
      seen.emplace_back(at, logit);
    }
    if (max == -infinity) return;
    const bool has_sink = sinks.size() > 0;
    if (has_sink) max = std::max(max, sinks.Get(h));
    double sum = has_sink ? std::exp(sinks.Get(h) - max) : 0.0;
    for (const auto& [at, logit] : seen) {
      sum += std::exp(logit - max);
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        want[d] += std::exp(logit - max) * values.Get(value_offset + at + d);
      }
    }
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      want[d] *= ScaleOf(v_scale, scale_at) / sum;
    }
    *want_lse = max + std::log(sum);
  }
};

inline void ExpectRight(Batch batch) {
  ExpectOk(batch.Run());
  batch.ExpectResult();
}

}  // namespace xla_ops::testing

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_TESTING_H_
