// Cases of attention and its gradient.

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tests/gpu/kernel_races_cases.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward.h"

namespace xla_ops {
namespace {

constexpr DType kF32 = DType::kF32;
constexpr DType kU8 = DType::kU8;
constexpr DType kS32 = DType::kS32;
constexpr DType kS64 = DType::kS64;

}  // namespace

struct Cases::Batch {
  const char* name;
  std::vector<int64_t> query_lens;
  std::vector<int64_t> kv_lens;
};

struct Cases::Variant {
  const char* name;
  int64_t page_size = 0;  // 0: contiguous keys
  int64_t num_splits = 1;
  int64_t window_left = -1;
  int64_t window_right = 0;
  float soft_cap = 0.0f;
  const char* kv_cache_dtype = "auto";
  bool extras = false;  // ALiBi slopes, sinks, leftpad_k or seqused_k
  int64_t num_slots = 0;
};

void Cases::AddAttention(DType dtype) {
  const Batch batches[] = {
      {"prefill", {130, 70, 1}, {130, 70, 1}},
      {"mixed", {17, 1, 65, 0}, {40, 150, 65, 9}},
      {"decode", {1, 1, 1, 1}, {300, 17, 0, 129}},
  };
  const Variant variants[] = {
      {"contiguous"},
      {"contiguous, full", 0, 1, -1, -1},
      {"contiguous, all features", 0, 1, 33, 5, 20.0f, "auto", true},
      {"contiguous, split", 0, 3},
      {"page 16", 16},
      {"page 16, split", 16, 4},
      {"page 24, all features", 24, 1, 33, 0, 20.0f, "auto", true},
      {"page 16, fp8, split", 16, 3, -1, 0, 0.0f, "fp8_e4m3"},
      {"page 16, e5m2", 16, 1, -1, 0, 0.0f, "fp8_e5m2"},
      {"page 256", 256},
  };
  for (const int64_t head_dim : {64, 128, 256, 40}) {
    for (const Batch& batch : batches) {
      for (const Variant& variant : variants) {
        AddAttention(dtype, head_dim, batch, variant);
      }
    }
  }
  // Decode that cuts the longest one, by lengths, into pieces that are larger
  // than the others, and smaller.
  if (dtype == kF32) return;
  const Batch one_long = {"one long", {1, 1, 2, 1}, {1700, 300, 4500, 0}};
  const Variant cut[] = {
      {"page 16, 6 slots", 16, 1, -1, 0, 0.0f, "auto", false, 6},
      {"page 16, 16 slots", 16, 1, -1, 0, 0.0f, "auto", false, 16},
      {"page 16, fp8, 6 slots", 16, 1, -1, 0, 0.0f, "fp8_e4m3", false, 6},
  };
  for (const int64_t head_dim : {64, 128, 256}) {
    for (const Variant& variant : cut) {
      AddAttention(dtype, head_dim, one_long, variant);
    }
  }
}

void Cases::AddAttention(DType dtype, int64_t head_dim, const Batch& batch,
                         const Variant& v) {
  constexpr int64_t kHeads = 4, kKvHeads = 2;
  const bool paged = v.page_size > 0;
  const bool fp8 = v.kv_cache_dtype != std::string_view("auto");
  const DType kv_dtype = fp8 ? kU8 : dtype;
  const auto num_seqs = static_cast<int64_t>(batch.query_lens.size());
  const int64_t max_num_seqs = num_seqs + 1;

  // One sequence and three tokens more than there are.
  TestTensor cu_seqlens_q(kS32, {max_num_seqs + 1});
  TestTensor cu_seqlens_k(kS32, {max_num_seqs + 1});
  TestTensor seqused_k(kS32, {max_num_seqs});
  TestTensor leftpad_k(kS32, {max_num_seqs});
  int64_t num_tokens = 0, num_kv_tokens = 0, longest = 0;
  for (int64_t s = 0; s <= max_num_seqs; ++s) {
    cu_seqlens_q.Set(s, static_cast<double>(num_tokens));
    cu_seqlens_k.Set(s, static_cast<double>(num_kv_tokens));
    if (s == max_num_seqs) break;
    const int64_t kv_len = s < num_seqs ? batch.kv_lens[s] : 0;
    num_tokens += s < num_seqs ? batch.query_lens[s] : 0;
    num_kv_tokens += kv_len;
    longest = std::max(longest, kv_len);
    seqused_k.Set(s, static_cast<double>(kv_len));
    leftpad_k.Set(s, static_cast<double>(kv_len / 5));
  }
  num_tokens += 3;

  const int64_t max_blocks =
      paged ? (longest + v.page_size - 1) / v.page_size : 0;
  // Sequences share blocks where they are long.
  const int64_t num_blocks =
      paged ? std::min<int64_t>(max_blocks * max_num_seqs, 300) : 1;
  const int64_t page_size = paged ? v.page_size : num_kv_tokens;
  // Blocks in a mixed order, and one that does not exist.
  TestTensor block_table(kS32, {max_num_seqs, max_blocks});
  for (int64_t i = 0; i < block_table.size(); ++i) {
    block_table.Set(
        i, static_cast<double>((block_table.size() - 1 - i) % num_blocks));
  }
  if (max_blocks > 1) block_table.Set(1, 9999);

  const Dims query = {num_tokens, kHeads, head_dim};
  const Dims cache = {num_blocks, page_size, kKvHeads, head_dim};
  const int64_t workspace =
      AttentionWorkspaceBytes(num_tokens, kHeads, head_dim, v.num_splits) +
      v.num_slots * AttentionSlotBytes(kKvHeads, head_dim);
  const std::string detail = NameOf(dtype) + " " + std::to_string(head_dim) +
                             " " + batch.name + ", " + v.name;
  const TestTensor scale = Scalar(0.1);
  const std::vector<TestTensor> keys = {Random(kv_dtype, cache),
                                        Random(kv_dtype, cache)};
  const std::vector<TestTensor> rest = {
      cu_seqlens_q,
      paged ? Absent(kS32) : cu_seqlens_k,
      paged ? seqused_k : Absent(kS32),
      paged ? block_table : Absent(kS32),
      !paged && v.extras ? leftpad_k : Absent(kS32),
      TestTensor(kS32, {1}, {static_cast<double>(num_seqs)}),
      v.extras ? Random(kF32, {kHeads}, 0.1) : Absent(kF32),
      v.extras ? Random(kF32, {kHeads}) : Absent(kF32),
      fp8 ? scale : Absent(kF32),
      fp8 ? scale : Absent(kF32)};
  const auto with = [&](std::vector<TestTensor> args) {
    args.insert(args.end(), rest.begin(), rest.end());
    return args;
  };
  const int64_t row = kKvHeads * head_dim;
  const auto add_attrs = [=](CallFrame* frame) {
    frame->AddAttr("scale", 0.125f)
        .AddAttr("window_left", v.window_left)
        .AddAttr("window_right", v.window_right)
        .AddAttr("soft_cap", v.soft_cap)
        .AddAttr("kv_cache_dtype", v.kv_cache_dtype)
        .AddAttr("paged", paged)
        .AddAttr("num_kv_heads", kKvHeads)
        .AddAttr("num_blocks", num_blocks)
        .AddAttr("page_size", page_size)
        .AddAttr("block_stride", page_size * row)
        .AddAttr("page_stride", row)
        .AddAttr("head_stride", head_dim)
        .AddAttr("key_offset", int64_t{0})
        .AddAttr("value_offset", int64_t{0});
  };
  const std::string op = paged ? "paged_attention" : "flash_attn_varlen";
  const Dims of_rows = {kHeads, num_tokens};
  Add(op, detail, with({Random(dtype, query), keys[0], keys[1]}),
      {{dtype, query},
       {kF32, of_rows},
       {kU8, {workspace}, -1, /*scratch=*/true}},
      [=](CallFrame* frame) {
        add_attrs(frame);
        frame->AddAttr("num_splits", v.num_splits).AddAttr("debug", false);
      });
  if (paged) {
    // The same on rows of a projection, which it writes first.
    TestTensor positions(kS64, {num_tokens});
    TestTensor slots(kS64, {num_tokens});
    for (int64_t i = 0; i < num_tokens; ++i) {
      positions.Set(i, static_cast<double>(i % 13 - 1));
      slots.Set(i, static_cast<double>(i % (num_blocks * page_size)));
    }
    const Dims columns = {num_tokens, (kHeads + 2 * kKvHeads) * head_dim};
    const Dims both = {2, num_blocks, page_size, kKvHeads, head_dim};
    Add("fused_qk_norm_rope_and_paged_attention", detail,
        {Random(dtype, columns), Random(dtype, {11, head_dim}), positions,
         slots, Random(dtype, {head_dim}), Random(dtype, {head_dim}), rest[8],
         rest[9], rest[0], rest[2], rest[3], rest[5], rest[6], rest[7],
         Random(kv_dtype, both)},
        {{dtype, query},
         {kv_dtype, both, 14},
         {dtype, query, -1, /*scratch=*/true},
         {kF32, of_rows, -1, /*scratch=*/true},
         {kU8, {workspace}, -1, /*scratch=*/true}},
        [=](CallFrame* frame) {
          frame->AddAttr("num_heads", kHeads)
              .AddAttr("num_kv_heads", kKvHeads)
              .AddAttr("head_dim", head_dim)
              .AddAttr("eps", 1e-5f)
              .AddAttr("is_neox", true)
              .AddAttr("kv_cache_dtype", v.kv_cache_dtype)
              .AddAttr("num_blocks", num_blocks)
              .AddAttr("page_size", page_size)
              .AddAttr("block_stride", page_size * row)
              .AddAttr("page_stride", row)
              .AddAttr("head_stride", head_dim)
              .AddAttr("key_offset", int64_t{0})
              .AddAttr("value_offset", num_blocks * page_size * row)
              .AddAttr("scale", 0.125f)
              .AddAttr("window_left", v.window_left)
              .AddAttr("window_right", v.window_right)
              .AddAttr("soft_cap", v.soft_cap)
              .AddAttr("num_splits", v.num_splits)
              .AddAttr("debug", false);
        });
  }
  if (v.num_splits > 1 || v.num_slots > 0) return;

  const bool wants_dkv = !paged && !fp8;
  const Dims none = {0};
  const Dims rows = {num_kv_tokens, kKvHeads, head_dim};
  const int64_t backward_workspace = AttentionBackwardWorkspaceBytes(
      num_tokens, kHeads, head_dim, max_num_seqs);
  Add(op + "_backward", detail,
      with({Random(dtype, query), Random(dtype, query), keys[0], keys[1],
            Random(dtype, query), Random(kF32, of_rows),
            v.extras ? Random(kF32, of_rows) : Absent(kF32)}),
      {{dtype, query},
       {dtype, wants_dkv ? rows : none},
       {dtype, wants_dkv ? rows : none},
       {kF32, v.extras ? Dims{kHeads} : none},
       {kU8, {backward_workspace}, -1, /*scratch=*/true}},
      [=](CallFrame* frame) {
        add_attrs(frame);
        // Of the others no two runs need agree.
        frame->AddAttr("deterministic", true)
            .AddAttr("wants_dq", true)
            .AddAttr("wants_dkv", wants_dkv)
            .AddAttr("wants_dsinks", v.extras);
      });
}

}  // namespace xla_ops
