// Cases of every op but attention.

#include "tests/gpu/kernel_races_cases.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace xla_ops {
namespace {

constexpr DType kF32 = DType::kF32;
constexpr DType kF16 = DType::kF16;
constexpr DType kBF16 = DType::kBF16;
constexpr DType kE4M3 = DType::kF8E4M3FN;
constexpr DType kS8 = DType::kS8;
constexpr DType kU8 = DType::kU8;
constexpr DType kS32 = DType::kS32;
constexpr DType kS64 = DType::kS64;
constexpr DType kFloats[] = {kF32, kF16, kBF16};

}  // namespace

std::string NameOf(DType dtype) {
  return dtype == kF32 ? "f32" : dtype == kF16 ? "f16" : "bf16";
}

std::string NameOf(const Dims& dims) {
  std::string name;
  for (const int64_t dim : dims) {
    name += (name.empty() ? "" : "x") + std::to_string(dim);
  }
  return name;
}

std::vector<Case> Cases::TakeAll() {
  for (const DType dtype : kFloats) {
    AddRows(dtype);
    AddActivations(dtype);
    AddRotary(dtype);
    AddQkNormRope(dtype);
    AddQkNormRopeAndCache(dtype);
    AddMerges(dtype);
    AddGroups(dtype);
    AddLinears(dtype);
    AddPenalties(dtype);
    AddWrites(dtype);
    AddFirstLayoutWrites(dtype);
    AddAttention(dtype);
  }
  AddCopies();
  return std::move(cases_);
}

TestTensor Cases::Random(DType dtype, Dims dims, double scale) {
  TestTensor tensor(dtype, std::move(dims));
  if (dtype == kU8) {
    // Stands for fp8; below 64 are finite numbers of either type.
    for (int64_t i = 0; i < tensor.size(); ++i) tensor.Set(i, random_() % 64);
  } else {
    tensor.FillRandom(&random_, scale);
  }
  return tensor;
}

void Cases::Add(const std::string& target, const std::string& detail,
                std::vector<TestTensor> args, std::vector<Result> results,
                std::function<void(CallFrame*)> add_attrs) {
  cases_.push_back({target + " " + detail, "xla_ops." + target, std::move(args),
                    std::move(results), std::move(add_attrs)});
}

// Norms and quantisations.
void Cases::AddRows(DType dtype) {
  const auto eps = [](CallFrame* frame) { frame->AddAttr("eps", 1e-5f); };
  const Dims shapes[] = {
      {3, 7},       // single elements, in one warp
      {2, 1031},    // in several
      {9, 64},      // several rows a block
      {2, 4096},    // few rows: a vector a thread
      {1, 16384},   // four
      {300, 512},   // many rows: a warp or less for each
      {258, 2048},  // several warps
      {1, 40000},   // too long to be held
  };
  for (const Dims& shape : shapes) {
    const std::string detail = NameOf(dtype) + " " + NameOf(shape);
    const int64_t rows = shape[0];
    const auto x = [&] { return Random(dtype, shape); };
    const auto weight = [&] { return Random(dtype, {shape[1]}); };
    const Result like_x = {dtype, shape};
    const Result fp8 = {kE4M3, shape};
    const Result int8 = {kS8, shape};
    const Result scales = {kF32, {rows, 1}};
    const TestTensor scale = Scalar(0.02);

    Add("rms_norm", detail, {x(), weight()}, {like_x}, eps);
    for (const TestTensor& added : {TestTensor(dtype, {0}), x()}) {
      const std::string kind = added.size() == 0 ? "" : " added";
      // A block for each part, and blocks whose sums are added up.
      const int64_t blocks = std::min<int64_t>(rows, 40);
      Add("rms_norm_backward", detail + kind, {x(), x(), weight(), added},
          {like_x, {kF32, {blocks, shape[1]}}, {kF32, {0, shape[1]}}}, eps);
      Add("rms_norm_backward", detail + kind + " by blocks",
          {x(), x(), weight(), added},
          {like_x,
           {kF32, {1, shape[1]}},
           {kF32, {blocks, shape[1]}, -1, /*scratch=*/true}},
          eps);
      Add("rms_norm_backward_input", detail + kind, {x(), x(), weight(), added},
          {like_x}, eps);
    }
    Add("fused_add_rms_norm", detail, {x(), x(), weight()}, {like_x, like_x},
        eps);
    Add("fused_add_rms_norm", detail + " in place", {x(), x(), weight()},
        {{dtype, shape, 0}, {dtype, shape, 1}}, eps);
    Add("rms_norm_static_fp8_quant", detail, {x(), weight(), scale}, {fp8},
        eps);
    Add("fused_add_rms_norm_static_fp8_quant", detail,
        {x(), x(), weight(), scale}, {fp8, {dtype, shape, 1}}, eps);
    for (const Result& codes : {fp8, int8}) {
      const std::string kind = codes.dtype == kS8 ? " int8" : " fp8";
      Add("rms_norm_dynamic_per_token_quant", detail + kind, {x(), weight()},
          {codes, scales}, eps);
      Add("fused_add_rms_norm_dynamic_per_token_quant", detail + kind,
          {x(), x(), weight()}, {codes, scales, {dtype, shape, 1}}, eps);
    }
    Add("rms_norm_dynamic_per_token_quant", detail + " bound",
        {x(), weight(), scale}, {fp8, scales}, eps);
    Add("static_scaled_fp8_quant", detail, {x(), scale}, {fp8});
    Add("dynamic_scaled_fp8_quant", detail, {x()}, {fp8, {kF32, {1}}});
    Add("dynamic_per_token_scaled_fp8_quant", detail, {x()}, {fp8, scales});
    Add("dynamic_per_token_scaled_fp8_quant", detail + " bound", {x(), scale},
        {fp8, scales});
    Add("static_scaled_int8_quant", detail, {x(), scale}, {int8});
    Add("static_scaled_int8_quant", detail + " azp",
        {x(), scale, TestTensor(kS32, {1}, {-17})}, {int8});
    Add("dynamic_scaled_int8_quant", detail, {x()}, {int8, scales});
    Add("dynamic_scaled_int8_azp_quant", detail, {x()},
        {int8, scales, {kS32, {rows, 1}}});
  }
}

void Cases::AddActivations(DType dtype) {
  for (const Dims& shape : {Dims{3, 7}, Dims{33, 40}, Dims{2, 11008}}) {
    const std::string detail = NameOf(dtype) + " " + NameOf(shape);
    const auto x = [&] { return Random(dtype, {shape[0], 2 * shape[1]}, 3.0); };
    for (const char* target : {"silu_and_mul", "mul_and_silu", "gelu_and_mul",
                               "gelu_tanh_and_mul"}) {
      Add(target, detail, {x()}, {{dtype, shape}});
    }
    for (const char* format : {"fp8_e4m3", "fp8_e5m2"}) {
      const auto attrs = [format](CallFrame* frame) {
        frame->AddAttr("kv_cache_dtype", format).AddAttr("scale", 0.37f);
      };
      Add("convert_fp8", detail + " to " + format, {Random(dtype, shape)},
          {{kU8, shape}}, attrs);
      Add("convert_fp8", detail + " from " + format, {Random(kU8, shape)},
          {{dtype, shape}}, attrs);
    }
    Add("silu_and_mul_quant", detail, {x(), Scalar(0.02)}, {{kE4M3, shape}});
    Add("fatrelu_and_mul", detail, {x()}, {{dtype, shape}},
        [](CallFrame* frame) { frame->AddAttr("threshold", 0.5f); });
    Add("swigluoai_and_mul", detail, {x()}, {{dtype, shape}},
        [](CallFrame* frame) {
          frame->AddAttr("alpha", 1.702f).AddAttr("limit", 7.0f);
        });
    for (const char* name : {"silu_and_mul", "gelu_tanh_and_mul",
                             "swigluoai_and_mul", "gelu_quick"}) {
      const bool is_gated = name != std::string_view("gelu_quick");
      TestTensor input = is_gated ? x() : Random(dtype, shape, 3.0);
      const Result like_input = {dtype, input.dims()};
      Add("activation_backward", detail + " " + name,
          {Random(dtype, shape), std::move(input)}, {like_input},
          [name](CallFrame* frame) {
            frame->AddAttr("activation", name)
                .AddAttr("threshold", 0.5f)
                .AddAttr("alpha", 1.702f)
                .AddAttr("limit", 7.0f);
          });
    }
    for (const char* target : {"gelu_new", "gelu_fast", "gelu_quick"}) {
      Add(target, detail, {Random(dtype, shape, 3.0)}, {{dtype, shape}});
      Add(target, detail + " in place", {Random(dtype, shape, 3.0)},
          {{dtype, shape, 0}});
    }
  }
}

void Cases::AddRotary(DType dtype) {
  struct Shape {
    int64_t tokens, heads, kv_heads, head_size, rotary_dim;
  };
  // Single elements; whole heads in vectors; a part of each head.
  for (const Shape& s : {Shape{3, 2, 1, 7, 6}, Shape{37, 8, 2, 128, 128},
                         Shape{5, 4, 4, 80, 32}}) {
    for (const bool is_neox : {false, true}) {
      const auto attrs = [s, is_neox](CallFrame* frame) {
        frame->AddAttr("head_size", s.head_size).AddAttr("is_neox", is_neox);
      };
      const std::string detail = NameOf(dtype) + " " +
                                 NameOf({s.tokens, s.heads, s.head_size}) +
                                 (is_neox ? " neox" : " gptj");
      TestTensor positions(kS64, {s.tokens});
      for (int64_t i = 0; i < s.tokens; ++i) positions.Set(i, i % 13 - 1);
      const Dims query = {s.tokens, s.heads, s.head_size};
      const Dims key = {s.tokens, s.kv_heads, s.head_size};
      TestTensor narrow(kS32, {s.tokens});
      for (int64_t i = 0; i < s.tokens; ++i) narrow.Set(i, i % 13 - 1);
      const TestTensor cache = Random(dtype, {11, s.rotary_dim});
      Add("rotary_embedding", detail + " fp32 cache",
          {narrow, Random(dtype, query), Random(dtype, key),
           Random(kF32, {11, s.rotary_dim})},
          {{dtype, query}, {dtype, key}}, attrs);
      for (const bool in_place : {false, true}) {
        const std::string name = detail + (in_place ? " in place" : "");
        Add("rotary_embedding", name,
            {positions, Random(dtype, query), Random(dtype, key), cache},
            {{dtype, query, in_place ? 1 : -1},
             {dtype, key, in_place ? 2 : -1}},
            attrs);
        Add("rotary_embedding_one", name,
            {positions, Random(dtype, query), cache},
            {{dtype, query, in_place ? 1 : -1}}, attrs);
      }
    }
  }
}

void Cases::AddQkNormRope(DType dtype) {
  struct Shape {
    int64_t tokens, q, k, v, head_dim;
  };
  // Single elements; a few lanes a head, some of them idle; too long for a
  // warp.
  for (const Shape& s : {Shape{3, 2, 1, 1, 6}, Shape{37, 8, 2, 2, 128},
                         Shape{5, 4, 4, 1, 80}, Shape{2, 1, 1, 1, 2048}}) {
    const Dims qkv = {s.tokens, (s.q + s.k + s.v) * s.head_dim};
    TestTensor positions(kS64, {s.tokens});
    for (int64_t i = 0; i < s.tokens; ++i) positions.Set(i, i % 13 - 1);
    for (const bool is_neox : {false, true}) {
      const auto attrs = [s, is_neox](CallFrame* frame) {
        frame->AddAttr("num_heads_q", s.q)
            .AddAttr("num_heads_k", s.k)
            .AddAttr("num_heads_v", s.v)
            .AddAttr("head_dim", s.head_dim)
            .AddAttr("eps", 1e-5f)
            .AddAttr("is_neox", is_neox);
      };
      for (const DType cache_dtype : {dtype, kF32}) {
        const auto args = [&] {
          return std::vector<TestTensor>{
              Random(dtype, qkv), Random(dtype, {s.head_dim}),
              Random(dtype, {s.head_dim}),
              Random(cache_dtype, {11, s.head_dim}), positions};
        };
        const std::string detail =
            NameOf(dtype) + " " + NameOf({s.tokens, s.q, s.head_dim}) +
            (is_neox ? " neox" : " gptj") + " cache " + NameOf(cache_dtype);
        Add("fused_qk_norm_rope", detail, args(), {{dtype, qkv}}, attrs);
        Add("fused_qk_norm_rope", detail + " in place", args(),
            {{dtype, qkv, 0}}, attrs);
      }
    }
  }
}

void Cases::AddQkNormRopeAndCache(DType dtype) {
  constexpr int64_t kTokens = 21, kBlocks = 5, kPage = 8, kHeads = 2;
  // A few lanes a head; single elements.
  for (const int64_t dim : {128, 6}) {
    const Dims qkv = {kTokens, 4 * kHeads * dim};
    const Dims query = {kTokens, 2 * kHeads, dim};
    const Dims cache = {kBlocks, kPage, kHeads, dim};
    const Dims stacked = {2, kBlocks, kPage, kHeads, dim};
    TestTensor positions(kS64, {kTokens});
    // Distinct slots, padding and one that does not exist.
    TestTensor slots(kS64, {kTokens});
    for (int64_t i = 0; i < kTokens; ++i) {
      positions.Set(i, i % 13 - 1);
      slots.Set(i, i * 17 % (kBlocks * kPage));
    }
    slots.Set(3, -1);
    slots.Set(4, kBlocks * kPage);
    for (const char* kv_cache_dtype : {"auto", "fp8_e4m3", "fp8_e5m2"}) {
      const bool is_auto = kv_cache_dtype == std::string_view("auto");
      const DType cache_dtype = is_auto ? dtype : kU8;
      for (const int form : {0, 1, 2, 3}) {
        const bool is_neox = form % 2 == 0, is_normed = form / 2 == 0;
        const auto attrs = [=](CallFrame* frame, int64_t value_offset) {
          frame->AddAttr("num_heads", 2 * kHeads)
              .AddAttr("num_kv_heads", kHeads)
              .AddAttr("head_dim", dim)
              .AddAttr("eps", 1e-5f)
              .AddAttr("is_neox", is_neox)
              .AddAttr("kv_cache_dtype", kv_cache_dtype)
              .AddAttr("num_blocks", kBlocks)
              .AddAttr("page_size", kPage)
              .AddAttr("block_stride", kPage * kHeads * dim)
              .AddAttr("page_stride", kHeads * dim)
              .AddAttr("head_stride", dim)
              .AddAttr("key_offset", int64_t{0})
              .AddAttr("value_offset", value_offset)
              .AddAttr("debug", false);
        };
        const auto weight = [&] {
          return is_normed ? Random(dtype, {dim}) : Absent(dtype);
        };
        const DType table = form == 1 ? kF32 : dtype;
        const std::string detail = NameOf(dtype) + " " + kv_cache_dtype + " " +
                                   NameOf(qkv) + (is_neox ? " neox" : " gptj") +
                                   (is_normed ? " norm" : "");
        Add("fused_qk_norm_rope_and_cache", detail,
            {Random(dtype, qkv), Random(table, {11, dim}), positions, slots,
             weight(), weight(), Scalar(0.05), Scalar(0.05),
             Random(cache_dtype, cache), Random(cache_dtype, cache)},
            {{dtype, query}, {cache_dtype, cache, 9}, {cache_dtype, cache, 8}},
            [=](CallFrame* frame) { attrs(frame, 0); });
        // Not aliased, so that the handler copies first.
        Add("fused_qk_norm_rope_and_cache_stacked", detail,
            {Random(dtype, qkv), Random(table, {11, dim}), positions, slots,
             weight(), weight(), Scalar(0.05), Scalar(0.05),
             Random(cache_dtype, stacked)},
            {{dtype, query}, {cache_dtype, stacked}}, [=](CallFrame* frame) {
              attrs(frame, kBlocks * kPage * kHeads * dim);
            });
      }
    }
  }
}

void Cases::AddMerges(DType dtype) {
  for (const Dims& shape :
       {Dims{2, 3, 7}, Dims{37, 4, 128}, Dims{3, 1, 4096}}) {
    const Dims lse = {shape[1], shape[0]};
    Add("merge_attn_states", NameOf(dtype) + " " + NameOf(shape),
        {Random(dtype, shape), Random(kF32, lse, 4.0), Random(dtype, shape),
         Random(kF32, lse, 4.0)},
        {{dtype, shape}, {kF32, lse}});
    Add("merge_attn_states_backward", NameOf(dtype) + " " + NameOf(shape),
        {Random(dtype, shape), Random(kF32, lse), Random(dtype, shape),
         Random(kF32, lse, 4.0), Random(dtype, shape), Random(kF32, lse, 4.0)},
        {{dtype, shape}, {kF32, lse}, {dtype, shape}, {kF32, lse}});
  }
}

void Cases::AddPenalties(DType dtype) {
  // Rows shorter than a vector; single elements at the end; several vectors a
  // thread.
  for (const Dims& shape : {Dims{37, 3}, Dims{5, 1031}, Dims{33, 65537}}) {
    const std::string detail = NameOf(dtype) + " " + NameOf(shape);
    // One token in eight is marked in each.
    const auto mask = [&] {
      TestTensor marked(DType::kBool, shape);
      for (int64_t i = 0; i < marked.size(); ++i) {
        marked.Set(i, random_() % 8 == 0);
      }
      return marked;
    };
    for (const bool in_place : {false, true}) {
      Add("apply_repetition_penalties", detail + (in_place ? " in place" : ""),
          {Random(dtype, shape, 3.0), mask(), mask(),
           Random(dtype, {shape[0]}, 1.0)},
          {{dtype, shape, in_place ? 0 : -1}});
    }
  }
}

// grouped_matmul: tiles of 16, 64 and 128 rows, several a block; rows of no
// group; rows that are not aligned. Its weight's gradient: groups of no step,
// of one and of more than the ring holds; several tiles a matrix.
void Cases::AddGroups(DType dtype) {
  struct Shape {
    int64_t rows, columns, depth;
    std::vector<double> offsets;
  };
  for (const Shape& s :
       {Shape{20, 72, 72, {2, 2, 9, 19}}, Shape{150, 136, 64, {0, 33, 150}},
        Shape{300, 264, 136, {0, 290}}, Shape{40, 33, 61, {0, 1, 30, 40}}}) {
    const auto groups = static_cast<int64_t>(s.offsets.size()) - 1;
    Add("grouped_matmul",
        NameOf(dtype) + " " + NameOf({s.rows, s.columns, s.depth}),
        {Random(dtype, {s.rows, s.depth}),
         Random(dtype, {groups, s.columns, s.depth}),
         TestTensor(kS32, {groups + 1}, s.offsets)},
        {{dtype, {s.rows, s.columns}}});
    Add("grouped_matmul_backward_weight",
        NameOf(dtype) + " " + NameOf({s.rows, s.columns, s.depth}),
        {Random(dtype, {s.rows, s.columns}), Random(dtype, {s.rows, s.depth}),
         TestTensor(kS32, {groups + 1}, s.offsets)},
        {{dtype, {groups, s.columns, s.depth}}});
  }
}

// linear: few rows, for the Hopper kernel with splits and without, with rings
// that go round; many rows, and rows that are not aligned, for the others.
void Cases::AddLinears(DType dtype) {
  struct Shape {
    int64_t rows, columns, depth, plan;
    bool bias;
  };
  for (const Shape& s :
       {Shape{1, 200, 264, 0, false}, Shape{20, 333, 1096, 0, true},
        Shape{64, 200, 520, 136 + (2 << 12) + (2 << 16), true},
        Shape{128, 72, 64, 72 + (4 << 12), false}, Shape{140, 72, 64, 0, true},
        Shape{9, 33, 61, 0, true}}) {
    Add("linear", NameOf(dtype) + " " + NameOf({s.rows, s.columns, s.depth}),
        {Random(dtype, {s.rows, s.depth}), Random(dtype, {s.columns, s.depth}),
         s.bias ? Random(dtype, {s.columns}) : Absent(dtype)},
        {{dtype, {s.rows, s.columns}}},
        [plan = s.plan](CallFrame* frame) { frame->AddAttr("plan", plan); });
  }
}

// reshape_and_cache_flash.
void Cases::AddWrites(DType dtype) {
  constexpr int64_t kTokens = 21, kBlocks = 5, kPage = 8;
  for (const char* kv_cache_dtype : {"auto", "fp8_e4m3", "fp8_e5m2"}) {
    const bool is_auto = kv_cache_dtype == std::string_view("auto");
    const DType cache_dtype = is_auto ? dtype : kU8;
    for (const Dims& head : {Dims{2, 64}, Dims{3, 7}}) {
      const int64_t row = head[0] * head[1];
      const Dims rows = {kTokens, head[0], head[1]};
      const Dims cache = {kBlocks, kPage, head[0], head[1]};
      const Dims stacked = {2, kBlocks, kPage, head[0], head[1]};
      // Distinct slots, padding and one that does not exist.
      TestTensor slots(kS64, {kTokens});
      for (int64_t i = 0; i < kTokens; ++i) {
        slots.Set(i, i * 17 % (kBlocks * kPage));
      }
      slots.Set(3, -1);
      slots.Set(4, kBlocks * kPage);
      const TestTensor scale = Scalar(0.05);
      for (const bool hnd : {false, true}) {
        const auto attrs = [=](CallFrame* frame, int64_t value_offset) {
          if (value_offset >= 0) frame->AddAttr("value_offset", value_offset);
          frame->AddAttr("kv_cache_dtype", kv_cache_dtype)
              .AddAttr("num_blocks", kBlocks)
              .AddAttr("page_size", kPage)
              .AddAttr("block_stride", kPage * row)
              .AddAttr("page_stride", hnd ? head[1] : row)
              .AddAttr("head_stride", hnd ? kPage * head[1] : head[1])
              .AddAttr("key_offset", int64_t{0})
              .AddAttr("debug", false);
        };
        const std::string detail = NameOf(dtype) + " " + kv_cache_dtype + " " +
                                   NameOf(rows) + (hnd ? " HND" : " NHD");
        const auto keys = [&] { return Random(dtype, rows); };
        Add("reshape_and_cache_flash", detail,
            {keys(), keys(), Random(cache_dtype, cache),
             Random(cache_dtype, cache), slots, scale, scale},
            {{cache_dtype, cache, 2}, {cache_dtype, cache, 3}},
            [=](CallFrame* frame) { attrs(frame, 0); });
        Add("reshape_and_cache_flash_stacked", detail,
            {keys(), keys(), Random(cache_dtype, stacked), slots, scale, scale},
            {{cache_dtype, stacked, 2}},
            [=](CallFrame* frame) { attrs(frame, kBlocks * kPage * row); });
        // Not aliased, so that the handler copies the cache first. One
        // cache has no value_offset.
        Add("reshape_and_cache_flash_one", detail,
            {keys(), Random(cache_dtype, cache), slots, scale},
            {{cache_dtype, cache}},
            [=](CallFrame* frame) { attrs(frame, -1); });
      }
    }
  }
}

// reshape_and_cache.
void Cases::AddFirstLayoutWrites(DType dtype) {
  constexpr int64_t kTokens = 37, kBlocks = 5, kPage = 8;
  for (const char* kv_cache_dtype : {"auto", "fp8_e4m3", "fp8_e5m2"}) {
    const bool is_auto = kv_cache_dtype == std::string_view("auto");
    const DType cache_dtype = is_auto ? dtype : kU8;
    // Heads, head_dim and x.
    for (const Dims& head : {Dims{2, 64, 16}, Dims{3, 7, 7}}) {
      const int64_t block = head[0] * head[1] * kPage;
      const Dims rows = {kTokens, head[0], head[1]};
      const Dims cache = {kBlocks, block};
      const Dims stacked = {2, kBlocks, block};
      // Distinct slots, padding and one that does not exist.
      TestTensor slots(kS64, {kTokens});
      for (int64_t i = 0; i < kTokens; ++i) slots.Set(i, i);
      slots.Set(3, -1);
      slots.Set(4, kBlocks * kPage);
      const TestTensor scale = Scalar(0.05);
      const auto attrs = [=](CallFrame* frame, int64_t value_offset) {
        frame->AddAttr("kv_cache_dtype", kv_cache_dtype)
            .AddAttr("num_blocks", kBlocks)
            .AddAttr("page_size", kPage)
            .AddAttr("key_x", head[2])
            .AddAttr("key_block_stride", block)
            .AddAttr("key_offset", int64_t{0})
            .AddAttr("debug", false);
        if (value_offset < 0) return;
        frame->AddAttr("value_block_stride", block)
            .AddAttr("value_offset", value_offset);
      };
      const std::string detail =
          NameOf(dtype) + " " + kv_cache_dtype + " " + NameOf(rows);
      const auto keys = [&] { return Random(dtype, rows); };
      Add("reshape_and_cache", detail,
          {keys(), keys(), Random(cache_dtype, cache),
           Random(cache_dtype, cache), slots, scale, scale},
          {{cache_dtype, cache, 2}, {cache_dtype, cache, 3}},
          [=](CallFrame* frame) { attrs(frame, 0); });
      Add("reshape_and_cache_stacked", detail,
          {keys(), keys(), Random(cache_dtype, stacked), slots, scale, scale},
          {{cache_dtype, stacked, 2}},
          [=](CallFrame* frame) { attrs(frame, kBlocks * block); });
      // Not aliased, so that the handler copies the cache first.
      Add("reshape_and_cache_one", detail,
          {keys(), Random(cache_dtype, cache), slots, scale},
          {{cache_dtype, cache}}, [=](CallFrame* frame) { attrs(frame, -1); });
    }
  }
}

// The kernel finds pairs that share a block and copies those in order.
void Cases::AddCopies() {
  struct Mapping {
    const char* name;
    std::vector<double> pairs;
  };
  std::vector<Mapping> mappings = {
      {"apart", {0, 10, 1, 11, 2, 12, -1, 3, 4, 99, 5, 5}},
      {"a chain", {0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 5, 6}},
      {"one target", {0, 9, 1, 9, 2, 9, 9, 3, 7, 8}},
      {"a swap", {0, 1, 1, 0, 0, 1, 8, 9, 9, 8}},
      {"many", {}},
  };
  // More pairs than a thread block has threads, most of them in conflict.
  for (int i = 0; i < 600; ++i) {
    mappings.back().pairs.push_back(i * 7 % 13);
    mappings.back().pairs.push_back(i * 5 % 13);
  }
  constexpr int64_t kBlocks = 13;
  for (const Mapping& mapping : mappings) {
    const auto num_pairs = static_cast<int64_t>(mapping.pairs.size() / 2);
    const TestTensor pairs(kS64, {num_pairs, 2}, mapping.pairs);
    // Bytes; 16-byte units; enough of them for several thread blocks.
    for (const int64_t size : {7, 512, 20000}) {
      for (const bool in_place : {false, true}) {
        const int64_t gap = size == 7 ? 1 : 0;
        const Dims cache = {kBlocks * (size + gap)};
        Add("copy_blocks",
            std::string(mapping.name) + " " + std::to_string(size) +
                (in_place ? " in place" : ""),
            {Random(kU8, cache), pairs}, {{kU8, cache, in_place ? 0 : -1}},
            [=](CallFrame* frame) {
              frame->AddAttr("num_blocks", kBlocks)
                  .AddAttr("page_size", int64_t{1})
                  .AddAttr("num_kv_heads", int64_t{1})
                  .AddAttr("head_dim", size)
                  .AddAttr("block_stride", size + gap)
                  .AddAttr("page_stride", int64_t{0})
                  .AddAttr("head_stride", int64_t{0})
                  .AddAttr("offset", int64_t{0})
                  .AddAttr("debug", false);
            });
        // From a cache of its own, which has a gap behind each block.
        const int64_t src_stride = size + 32;
        Add("swap_blocks",
            std::string(mapping.name) + " " + std::to_string(size) +
                (in_place ? " in place" : ""),
            {Random(kU8, cache), Random(kU8, {kBlocks * src_stride}), pairs},
            {{kU8, cache, in_place ? 0 : -1}}, [=](CallFrame* frame) {
              frame->AddAttr("num_src_blocks", kBlocks)
                  .AddAttr("num_dst_blocks", kBlocks)
                  .AddAttr("page_size", int64_t{1})
                  .AddAttr("num_kv_heads", int64_t{1})
                  .AddAttr("head_dim", size)
                  .AddAttr("src_block_stride", src_stride)
                  .AddAttr("dst_block_stride", size + gap)
                  .AddAttr("debug", false);
              for (const char* name :
                   {"src_page_stride", "src_head_stride", "src_offset",
                    "dst_page_stride", "dst_head_stride", "dst_offset"}) {
                frame->AddAttr(name, int64_t{0});
              }
            });
      }
    }
  }
}

}  // namespace xla_ops
