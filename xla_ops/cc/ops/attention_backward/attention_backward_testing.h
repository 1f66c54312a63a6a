// A batch of attention (attention_testing.h) with what its gradient takes and
// gives, and that gradient in double, for the C++ tests.
//
//   BackwardBatch b(shape, {{1, 37}, {23, 23}});   // {new tokens, KV tokens}
//   b.batch.soft_cap = 3;
//   b.Forward();                                   // out and lse, in double
//   ExpectOk(b.Run());
//   b.ExpectResult();
//
// Only for files that end in _test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_TESTING_H_
#define XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_TESTING_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"
#include "xla_ops/cc/ops/attention/attention_testing.h"

extern "C" XLA_FFI_Error* xla_ops_flash_attn_varlen_backward_cpu(
    XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* xla_ops_paged_attention_backward_cpu(
    XLA_FFI_CallFrame*);

namespace xla_ops::testing {

// Tests may alter any member before Forward and Run.
struct BackwardBatch {
  BackwardBatch(const Shape& shape, std::vector<Seq> seqs_in,
                int64_t padding_rows = 0, int64_t padding_seqs = 0,
                uint32_t seed = 1)
      : batch(shape, seqs_in, padding_rows, padding_seqs, seed),
        seqs(std::move(seqs_in)),
        wants_dkv(!shape.paged() && shape.kv_cache_dtype == "auto"),
        grad_out(batch.query),
        dq(shape.dtype, batch.query.dims()),
        dk(shape.dtype,
           {batch.shape.page_size, shape.num_kv_heads, shape.head_dim}),
        dv(dk) {
    std::mt19937 random(seed + 1000);
    grad_out.FillRandom(&random);
  }

  void UseSinks() {
    batch.sinks = TestTensor(DType::kF32, {batch.shape.num_heads});
    for (int64_t h = 0; h < batch.sinks.size(); ++h) {
      batch.sinks.Set(h, 1.5 - static_cast<double>(h));
    }
    dsinks = TestTensor(DType::kF32, {batch.shape.num_heads});
    wants_dsinks = true;
  }
  void UseGradOfLse() {
    grad_lse = TestTensor(DType::kF32, batch.lse.dims());
    std::mt19937 random(7);
    grad_lse.FillRandom(&random);
  }

  // Fills in out and lse, by their definition.
  void Forward() {
    batch.out.Fill(0);
    batch.lse.Fill(kInfinity);
    ForEachRow([&](const Row& row) {
      for (int64_t d = 0; d < batch.shape.head_dim; ++d) {
        double sum = 0;
        for (const Seen& seen : row.seen) {
          sum += seen.weight * Value(row, seen, d);
        }
        batch.out.Set(row.at + d, sum);
      }
      batch.lse.Set(row.lse_at, row.lse);
    });
  }

  CallStatus Run(TaskRunner* threads = nullptr) {
    return Run(batch.shape.paged() ? xla_ops_paged_attention_backward_cpu
                                   : xla_ops_flash_attn_varlen_backward_cpu,
               threads);
  }
  CallStatus Run(XLA_FFI_Handler* handler, TaskRunner* threads = nullptr) {
    TestTensor none(DType::kF32, {0});
    CallFrame frame;
    AddArgs(&frame, {&grad_out, &batch.query, &batch.key,
                     batch.shape.together() ? &batch.key : &batch.value,
                     &batch.out, &batch.lse, &grad_lse, &batch.cu_seqlens_q,
                     &batch.cu_seqlens_k, &batch.seqused_k, &batch.block_table,
                     &batch.leftpad_k, &batch.num_seqs, &batch.alibi_slopes,
                     &batch.sinks, &batch.k_scale, &batch.v_scale});
    AddResults(&frame,
               {wants_dq || keep_unwanted ? &dq : &none,
                wants_dkv || keep_unwanted ? &dk : &none,
                wants_dkv || keep_unwanted ? &dv : &none,
                wants_dsinks || keep_unwanted ? &dsinks : &none, &workspace});
    frame.AddAttr("scale", batch.scale)
        .AddAttr("window_left", batch.window_left)
        .AddAttr("window_right", batch.window_right)
        .AddAttr("soft_cap", batch.soft_cap)
        .AddAttr("kv_cache_dtype", batch.shape.kv_cache_dtype)
        .AddAttr("paged", batch.paged)
        .AddAttr("num_kv_heads", batch.shape.num_kv_heads)
        .AddAttr("num_blocks", batch.num_blocks)
        .AddAttr("page_size", batch.shape.page_size)
        .AddAttr("block_stride", batch.block_stride)
        .AddAttr("page_stride", batch.page_stride)
        .AddAttr("head_stride", batch.head_stride)
        .AddAttr("key_offset", batch.key_offset)
        .AddAttr("value_offset", batch.value_offset)
        .AddAttr("deterministic", deterministic)
        .AddAttr("wants_dq", wants_dq)
        .AddAttr("wants_dkv", wants_dkv)
        .AddAttr("wants_dsinks", wants_dsinks)
        .SetTaskRunner(threads);
    return frame.Call(handler);
  }

  // Compares what is wanted with the derivatives in double.
  void ExpectResult() {
    std::vector<double> want_dq(dq.size(), 0.0);
    std::vector<double> want_dk(dk.size(), 0.0);
    std::vector<double> want_dv(dv.size(), 0.0);
    std::vector<double> want_dsinks(dsinks.size(), 0.0);
    const int64_t size = batch.shape.head_dim;
    ForEachRow([&](const Row& row) {
      double delta = 0;
      for (int64_t d = 0; d < size; ++d) {
        delta += grad_out.Get(row.at + d) * batch.out.Get(row.at + d);
      }
      if (grad_lse.size() > 0) delta -= grad_lse.Get(row.lse_at);
      if (batch.sinks.size() > 0) {
        want_dsinks[row.head] -=
            std::exp(batch.sinks.Get(row.head) - row.lse) * delta;
      }
      for (const Seen& seen : row.seen) {
        double g = 0;
        for (int64_t d = 0; d < size; ++d) {
          g += grad_out.Get(row.at + d) * Value(row, seen, d);
        }
        const double dx = seen.weight * (g - delta) * seen.slope_of_cap *
                          batch.scale * row.k_scale;
        for (int64_t d = 0; d < size; ++d) {
          want_dq[row.at + d] +=
              dx * batch.key.Get(batch.key_offset + seen.at + d);
          if (batch.shape.paged()) continue;
          const int64_t at = seen.dense_at + d;
          want_dk[at] += dx * batch.query.Get(row.at + d);
          want_dv[at] += seen.weight * grad_out.Get(row.at + d);
        }
      }
    });
    if (wants_dq) Expect(dq, want_dq);
    if (wants_dkv) Expect(dk, want_dk);
    if (wants_dkv) Expect(dv, want_dv);
    if (wants_dsinks) Expect(dsinks, want_dsinks);
  }

  Batch batch;
  std::vector<Seq> seqs;
  bool deterministic = false;
  bool wants_dq = true;
  bool wants_dkv;
  bool wants_dsinks = false;
  bool keep_unwanted = false;  // results with elements though not wanted
  TestTensor grad_out;
  TestTensor grad_lse{DType::kF32, {0}};
  TestTensor dq, dk, dv;
  TestTensor dsinks{DType::kF32, {0}};
  TestTensor workspace{DType::kU8, {0}};

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  // A token that a row sees.
  struct Seen {
    int64_t at;        // element of key and value, less their offset
    int64_t dense_at;  // contiguous: the same in dk and dv
    double weight;     // its logit at first
    double slope_of_cap;
  };
  // A row that sees a token.
  struct Row {
    int64_t head;
    int64_t at;      // in query
    int64_t lse_at;  // in lse
    double k_scale;
    double v_scale;
    double lse;
    std::vector<Seen> seen;
  };

  double Value(const Row& row, const Seen& seen, int64_t d) const {
    const TestTensor& values = batch.shape.together() ? batch.key : batch.value;
    return row.v_scale * values.Get(batch.value_offset + seen.at + d);
  }

  static double ScaleOf(const TestTensor& scale, int64_t i) {
    if (scale.size() == 0) return 1.0;
    return scale.Get(scale.size() == 1 ? 0 : i);
  }

  template <typename Body>
  void ForEachRow(const Body& body) {
    int64_t token = 0;
    int64_t kv_row = 0;
    for (size_t s = 0; s < seqs.size(); ++s) {
      kv_row += batch.shape.leftpad;
      for (int64_t i = 0; i < seqs[s].num_rows; ++i, ++token) {
        for (int64_t h = 0; h < batch.shape.num_heads; ++h) {
          const Row row =
              MakeRow(static_cast<int64_t>(s), token, h, kv_row,
                      seqs[s].kv_len - seqs[s].num_rows + i, seqs[s].kv_len);
          if (!row.seen.empty()) body(row);
        }
      }
      kv_row += seqs[s].kv_len + batch.shape.slack;
    }
  }

  Row MakeRow(int64_t s, int64_t token, int64_t h, int64_t first_row,
              int64_t position, int64_t kv_len) const {
    const int64_t size = batch.shape.head_dim;
    const int64_t kv_heads = batch.shape.num_kv_heads;
    const int64_t kv_head = h / (batch.shape.num_heads / kv_heads);
    Row row = {h,
               (token * batch.shape.num_heads + h) * size,
               h * batch.num_tokens + token,
               ScaleOf(batch.k_scale, s * kv_heads + kv_head),
               ScaleOf(batch.v_scale, s * kv_heads + kv_head),
               0,
               {}};
    const bool has_sink = batch.sinks.size() > 0;
    double max = has_sink ? batch.sinks.Get(h) : -kInfinity;
    for (int64_t j = 0; j < kv_len; ++j) {
      if (batch.window_left >= 0 && position - j > batch.window_left) continue;
      if (batch.window_right >= 0 && j - position > batch.window_right) {
        continue;
      }
      const int64_t at_token = batch.TokenAt(s, j, first_row);
      if (at_token < 0) continue;
      Seen seen = {at_token + kv_head * batch.head_stride,
                   ((first_row + j) * kv_heads + kv_head) * size, 0, 1};
      for (int64_t d = 0; d < size; ++d) {
        seen.weight += batch.query.Get(row.at + d) *
                       batch.key.Get(batch.key_offset + seen.at + d);
      }
      seen.weight *= batch.scale * row.k_scale;
      if (batch.soft_cap > 0) {
        const double t = std::tanh(seen.weight / batch.soft_cap);
        seen.weight = batch.soft_cap * t;
        seen.slope_of_cap = 1 - t * t;
      }
      if (batch.alibi_slopes.size() > 0) {
        const bool of_seq = batch.alibi_slopes.dims().size() == 2;
        seen.weight -= batch.alibi_slopes.Get(
                           (of_seq ? s * batch.shape.num_heads : 0) + h) *
                       static_cast<double>(std::abs(position - j));
      }
      max = std::max(max, seen.weight);
      row.seen.push_back(seen);
    }
    double sum = has_sink ? std::exp(batch.sinks.Get(h) - max) : 0.0;
    for (Seen& seen : row.seen) sum += std::exp(seen.weight - max);
    row.lse = max + std::log(sum);
    for (Seen& seen : row.seen) seen.weight = std::exp(seen.weight - row.lse);
    return row;
  }

  // fp32 sums and one rounding, of numbers of order 1; and lse, which is
  // rounded to fp32 beforehand.
  static void Expect(const TestTensor& got, const std::vector<double>& want) {
    got.ExpectGuardsIntact();
    double largest = 1;
    for (const double x : want) largest = std::max(largest, std::abs(x));
    const double step = got.dtype() == DType::kF32   ? 0
                        : got.dtype() == DType::kF16 ? std::ldexp(1.0, -11)
                                                     : std::ldexp(1.0, -8);
    for (int64_t i = 0; i < got.size(); ++i) {
      // False for NaN.
      EXPECT_TRUE(std::abs(got.Get(i) - want[i]) <=
                  2e-5 * largest + step * std::abs(want[i]));
    }
  }
};

inline void ExpectRight(BackwardBatch b) {
  b.Forward();
  ExpectOk(b.Run());
  b.ExpectResult();
}

}  // namespace xla_ops::testing

#endif  // XLA_OPS_CC_OPS_ATTENTION_BACKWARD_ATTENTION_BACKWARD_TESTING_H_
