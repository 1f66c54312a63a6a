// What the CPU handlers of attention and of its gradient share: the batch's
// sequences, with every number brought into its range, and their KV tokens.
//
// Tested by attention_test.cc and attention_features_test.cc.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CPU_H_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CPU_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"

namespace xla_ops {

// The kernel of all CPU handlers of attention.
ffi::Error Attention(const AttentionParams& params, ffi::ThreadPool& pool);

// The KV tokens of a sequence, clamped to what the tensors' shapes allow.
struct KvTokens {
  int64_t first_row;  // contiguous: of token 0, in key and value
  int64_t count;      // L_k
};

// Sequence `index` of a batch.
struct Sequence {
  int64_t index;
  int64_t first_row;  // in query
  int64_t num_rows;   // L_q
  KvTokens kv;

  // The KV position of query row first_row + i; may be negative.
  int64_t PositionOf(int64_t i) const { return kv.count - num_rows + i; }
};

// How far from its position a row sees, given a window. No distance of a token
// from a query's position reaches the bound: lengths are 32-bit numbers.
inline int64_t Reach(int64_t window) {
  constexpr int64_t kUnbounded = int64_t{1} << 33;
  return window < 0 ? kUnbounded : std::min(window, kUnbounded);
}

template <typename T>
void Widen(const T* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = ToFloat(from[i]);
}

// a.b; `size` is a multiple of 8. Partial sums vectorise; the compiler must
// not reorder a single one.
inline float Dot(const float* a, const float* b, int64_t size) {
  constexpr int kLanes = 16;  // partial sums
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += a[i + lane] * b[i + lane];
    }
  }
  for (int lane = 0; i < size; ++i, ++lane) lanes[lane] += a[i] * b[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// Gathers the tokens of [begin, end) that exist: keys and values to fp32
// [tokens, head_dim] and which tokens they are. Returns how many. `T` is
// kv_dtype's.
template <typename T>
int64_t GatherTokens(const AttentionParams& params, const Sequence& sequence,
                     int64_t kv_head, int64_t begin, int64_t end, float* keys,
                     float* values, int64_t* tokens) {
  const int64_t size = params.head_dim;
  int64_t count = 0;
  const auto take = [&](int64_t token, int64_t at) {
    at += kv_head * params.head_stride;
    Widen(static_cast<const T*>(params.key) + at, size, keys + count * size);
    Widen(static_cast<const T*>(params.value) + at, size,
          values + count * size);
    tokens[count] = token;
    ++count;
  };
  if (!params.paged) {
    for (int64_t token = begin; token < end; ++token) {
      take(token, (sequence.kv.first_row + token) * params.page_stride);
    }
    return count;
  }
  const int32_t* table =
      params.block_table + sequence.index * params.max_blocks;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t block = table[token / params.page_size];
    if (block < 0 || block >= params.num_blocks) continue;
    take(token, block * params.block_stride +
                    token % params.page_size * params.page_stride);
  }
  return count;
}

inline int64_t GatherTokens(const AttentionParams& params,
                            const Sequence& sequence, int64_t kv_head,
                            int64_t begin, int64_t end, float* keys,
                            float* values, int64_t* tokens) {
  const auto gather = [&](auto element) {
    return GatherTokens<decltype(element)>(params, sequence, kv_head, begin,
                                           end, keys, values, tokens);
  };
  switch (params.kv_dtype) {
    case DType::kF8E4M3FN:
      return gather(Float8E4M3FN{});
    case DType::kF8E5M2:
      return gather(Float8E5M2{});
    default:
      return DispatchFloat(params.kv_dtype, [&](auto dtype) {
        return gather(CpuType<dtype.value>{});
      });
  }
}

// Scale `index` (0: of keys, 1: of values) of a sequence's KV head.
inline float KvScale(const AttentionParams& params, const float* scale,
                     int index, int64_t seq, int64_t kv_head) {
  if (scale == nullptr) return 1.0f;
  return scale[seq * params.kv_scale_seq_stride[index] +
               kv_head * params.kv_scale_head_stride[index]];
}

// Brings the values of the batch's tables into their range and, with
// `debug`, says which were not.
class Clamper {
 public:
  Clamper(const AttentionParams& params, const AttentionNames& names)
      : params_(params), names_(names) {}

  int64_t NumSeqs() {
    if (params_.num_seqs == nullptr) return params_.max_num_seqs;
    return Clamp("num_seqs", 0, *params_.num_seqs, 0, params_.max_num_seqs);
  }

  // `previous` is what this returned for the element before, or 0.
  int64_t QueryRow(int64_t i, int64_t previous) {
    return Clamp(names_.cu_seqlens_q, i, params_.cu_seqlens_q[i], previous,
                 params_.num_tokens);
  }
  // Contiguous only.
  int64_t KvRow(int64_t i, int64_t previous) {
    return Clamp("cu_seqlens_k", i, params_.cu_seqlens_k[i], previous,
                 params_.page_size);
  }

  // `begin` and `end` are the sequence's two KvRow; unused for pages.
  KvTokens Tokens(int64_t seq, int64_t begin, int64_t end) {
    const int64_t room = params_.paged ? params_.max_blocks * params_.page_size
                                       : params_.page_size - begin;
    KvTokens kv = {begin, end - begin};
    if (params_.seqused_k != nullptr) {
      kv.count = Clamp(names_.seqused_k, seq, params_.seqused_k[seq], 0, room);
    }
    if (params_.leftpad_k != nullptr) {
      const int64_t pad =
          Clamp("leftpad_k", seq, params_.leftpad_k[seq], 0, kv.count);
      kv.first_row += pad;
      kv.count -= pad;
    }
    return kv;
  }

  // Paged only; a debug mode's pass over the block ids.
  void ReportMaskedBlocks(int64_t seq, const KvTokens& kv) {
    if (kv.count == 0) return;
    const int64_t pages = (kv.count - 1) / params_.page_size + 1;
    for (int64_t page = 0; page < pages && reports_ < kMaxReports; ++page) {
      const int64_t block =
          params_.block_table[seq * params_.max_blocks + page];
      if (block >= 0 && block < params_.num_blocks) continue;
      Report(names_.block_table,
             std::to_string(seq) + ", " + std::to_string(page), block, 0,
             params_.num_blocks - 1, "masked");
    }
  }

 private:
  static constexpr int kMaxReports = 8;

  int64_t Clamp(const char* name, int64_t index, int64_t value, int64_t low,
                int64_t high) {
    if (params_.debug && (value < low || value > high)) {
      Report(name, std::to_string(index), value, low, high, "clamped");
    }
    return std::clamp(value, low, high);
  }
  void Report(const char* name, const std::string& index, int64_t value,
              int64_t low, int64_t high, const char* what) {
    if (reports_++ >= kMaxReports) return;
    std::fprintf(
        stderr, "xla_ops: %s: %s[%s] must be from %lld to %lld, got %lld; %s\n",
        names_.op, name, index.c_str(), static_cast<long long>(low),
        static_cast<long long>(high), static_cast<long long>(value), what);
  }

  const AttentionParams& params_;
  const AttentionNames& names_;
  int reports_ = 0;
};

// Calls body(sequence) for each of the batch's sequences, in order, so that
// their rows ascend.
template <typename Body>
void ForEachSequence(const AttentionParams& params, const AttentionNames& names,
                     const Body& body) {
  Clamper clamper(params, names);
  const int64_t num_seqs = clamper.NumSeqs();
  int64_t row = clamper.QueryRow(0, 0);
  int64_t kv_row = params.paged ? 0 : clamper.KvRow(0, 0);
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    const int64_t end = clamper.QueryRow(seq + 1, row);
    const int64_t kv_end = params.paged ? 0 : clamper.KvRow(seq + 1, kv_row);
    const Sequence sequence = {seq, row, end - row,
                               clamper.Tokens(seq, kv_row, kv_end)};
    if (params.debug && params.paged && sequence.num_rows > 0) {
      clamper.ReportMaskedBlocks(seq, sequence.kv);
    }
    body(sequence);
    row = end;
    kv_row = kv_end;
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_CPU_H_
