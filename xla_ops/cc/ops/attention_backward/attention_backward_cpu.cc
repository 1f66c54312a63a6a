// CPU kernel and handlers of attention's gradient.
//
// In three passes, each over pieces of its own that are spread over XLA's
// threads; a number is summed by one thread in one order, so that every run
// gives the same bits:
//   - rows of every head: delta, and from it dsinks;
//   - dq: tiles of query tokens, as the forward has them; each walks the KV
//     tokens that any of its rows sees;
//   - dk, dv: tiles of rows of key and value; each walks the query rows that
//     see any of its tokens, of every sequence that it holds tokens of.
// The last two compute the weights anew, from lse: nothing is as large as the
// logits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/ops/attention/attention_cpu.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward.h"
#include "xla_ops/cc/ops/attention_backward/attention_backward_checks.h"

namespace xla_ops {
namespace {

constexpr int64_t kTileRows = 16;    // query tokens of a piece of dq
constexpr int64_t kTileTokens = 32;  // KV tokens
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The call's batch, worked out once.
struct Work {
  const AttentionBackwardParams& params;
  const AttentionParams& batch = params.batch;
  int64_t group = batch.num_heads / std::max<int64_t>(batch.num_kv_heads, 1);
  int64_t left = Reach(batch.window_left);
  int64_t right = Reach(batch.window_right);
  std::unique_ptr<Sequence[]> sequences = nullptr;
  int64_t num_sequences = 0;
  std::unique_ptr<float[]> delta = nullptr;  // [num_heads, num_tokens]

  // Of a query token and head, in query, grad_out and dq.
  int64_t OffsetOf(int64_t token, int64_t head) const {
    return (token * batch.num_heads + head) * batch.head_dim;
  }
  // The same in lse and delta.
  int64_t RowOf(int64_t token, int64_t head) const {
    return head * batch.num_tokens + token;
  }
};

// delta of all rows of a head, 0 where lse is +inf, and the head's dsink.
template <typename T>
void ComputeDelta(const Work& work, int64_t head) {
  const AttentionBackwardParams& params = work.params;
  const int64_t size = work.batch.head_dim;
  const T* grad_out = static_cast<const T*>(params.grad_out);
  const T* out = static_cast<const T*>(params.out);
  double dsink = 0;
  for (int64_t token = 0; token < work.batch.num_tokens; ++token) {
    const int64_t row = work.RowOf(token, head);
    const float lse = params.lse[row];
    if (lse == kInfinity) {
      work.delta[row] = 0;
      continue;
    }
    const int64_t at = work.OffsetOf(token, head);
    float delta = 0;
    for (int64_t d = 0; d < size; ++d) {
      delta += ToFloat(grad_out[at + d]) * ToFloat(out[at + d]);
    }
    if (params.grad_lse != nullptr) delta -= params.grad_lse[row];
    work.delta[row] = delta;
    if (params.wants_dsinks) {
      dsink -= std::exp(work.batch.sinks[head] - lse) * delta;
    }
  }
  if (params.wants_dsinks) params.dsinks[head] = static_cast<float>(dsink);
}

// One query token and head, as fp32 vectors.
struct Row {
  const float* query;     // scaled, by k_scale too
  const float* grad_out;  // scaled by v_scale
  float lse;
  float delta;
  float slope;
  int64_t position;
};

// A row's weight of a token, and the derivative of its logit x.
struct Weight {
  float w;
  float dx;
};

Weight WeightOf(const AttentionParams& batch, const Row& row, const float* key,
                const float* value, int64_t token) {
  float logit = Dot(row.query, key, batch.head_dim);
  float slope_of_cap = 1;
  if (batch.soft_cap > 0) {
    const float t = std::tanh(logit / batch.soft_cap);
    logit = batch.soft_cap * t;
    slope_of_cap = 1 - t * t;
  }
  if (row.slope != 0) {
    logit -= row.slope * static_cast<float>(std::abs(row.position - token));
  }
  const float w = std::exp(logit - row.lse);
  const float g = Dot(row.grad_out, value, batch.head_dim);
  return {w, w * (g - row.delta) * slope_of_cap};
}

template <typename T>
void Load(const T* from, int64_t size, float scale, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = ToFloat(from[i]) * scale;
}

template <typename T>
void Store(const float* from, int64_t size, float scale, T* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = FromFloat<T>(from[i] * scale);
}

void AddScaled(const float* from, int64_t size, float scale, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] += scale * from[i];
}

// Loads row i of a sequence, and a head, into the two vectors.
template <typename T>
void LoadRow(const Work& work, const Sequence& sequence, int64_t i,
             int64_t head, float q_scale, float g_scale, float* query,
             float* grad_out) {
  const int64_t size = work.batch.head_dim;
  const int64_t at = work.OffsetOf(sequence.first_row + i, head);
  Load(static_cast<const T*>(work.batch.query) + at, size, q_scale, query);
  Load(static_cast<const T*>(work.params.grad_out) + at, size, g_scale,
       grad_out);
}

// What else there is to the row.
Row RowAt(const Work& work, const Sequence& sequence, int64_t i, int64_t head,
          const float* query, const float* grad_out) {
  const AttentionParams& batch = work.batch;
  const int64_t row = work.RowOf(sequence.first_row + i, head);
  const float slope =
      batch.alibi_slopes == nullptr
          ? 0.0f
          : batch.alibi_slopes[sequence.index * batch.alibi_seq_stride + head];
  return {query,           grad_out, work.params.lse[row],
          work.delta[row], slope,    sequence.PositionOf(i)};
}

// Up to kTileRows query tokens of one sequence.
struct Tile {
  const Sequence* sequence;
  int64_t first;  // in the sequence
  int64_t num_rows;
};

int64_t MaxTiles(const AttentionParams& batch) {
  return std::min(batch.num_tokens,
                  batch.num_tokens / kTileRows + batch.max_num_seqs);
}

int64_t MakeTiles(const Work& work, Tile* tiles) {
  int64_t num_tiles = 0;
  for (int64_t s = 0; s < work.num_sequences; ++s) {
    const Sequence& sequence = work.sequences[s];
    for (int64_t at = 0; at < sequence.num_rows; at += kTileRows) {
      tiles[num_tiles++] = {&sequence, at,
                            std::min(kTileRows, sequence.num_rows - at)};
    }
  }
  return num_tiles;
}

// dq of a tile's rows, of the query heads that share a KV head. `memory` has
// room for 3 vectors a row and head, and 2 a token.
template <typename T>
void ComputeDq(const Work& work, const Tile& tile, int64_t kv_head,
               float* memory) {
  const AttentionParams& batch = work.batch;
  const Sequence& sequence = *tile.sequence;
  const int64_t size = batch.head_dim;
  const int64_t num_rows = tile.num_rows * work.group;  // token, then head
  float* const query = memory;
  float* const grad_out = query + num_rows * size;
  float* const dq = grad_out + num_rows * size;
  float* const keys = dq + num_rows * size;
  float* const values = keys + kTileTokens * size;
  int64_t tokens[kTileTokens];
  const float scale =
      batch.scale * KvScale(batch, batch.k_scale, 0, sequence.index, kv_head);
  const float v_scale =
      KvScale(batch, batch.v_scale, 1, sequence.index, kv_head);
  const auto token_of = [&](int64_t row) {
    return tile.first + row / work.group;
  };
  const auto head_of = [&](int64_t row) {
    return kv_head * work.group + row % work.group;
  };
  for (int64_t row = 0; row < num_rows; ++row) {
    LoadRow<T>(work, sequence, token_of(row), head_of(row), scale, v_scale,
               query + row * size, grad_out + row * size);
  }
  std::fill_n(dq, num_rows * size, 0.0f);

  const int64_t first = sequence.PositionOf(tile.first);
  const int64_t end =
      std::min(first + tile.num_rows + work.right, sequence.kv.count);
  int64_t begin = std::max<int64_t>(first - work.left, 0);
  for (; begin < end; begin += kTileTokens) {
    const int64_t count =
        GatherTokens(batch, sequence, kv_head, begin,
                     std::min(begin + kTileTokens, end), keys, values, tokens);
    for (int64_t r = 0; r < num_rows; ++r) {
      const Row row = RowAt(work, sequence, token_of(r), head_of(r),
                            query + r * size, grad_out + r * size);
      if (row.lse == kInfinity) continue;
      for (int64_t t = 0; t < count; ++t) {
        if (tokens[t] < row.position - work.left) continue;
        if (tokens[t] > row.position + work.right) break;
        const float* key = keys + t * size;
        const Weight weight =
            WeightOf(batch, row, key, values + t * size, tokens[t]);
        AddScaled(key, size, weight.dx, dq + r * size);
      }
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t at =
        work.OffsetOf(sequence.first_row + token_of(row), head_of(row));
    Store(dq + row * size, size, scale, static_cast<T*>(work.params.dq) + at);
  }
}

// dk and dv of rows [first_row, first_row + num_rows) of key and value, of one
// head. `memory` has room for 4 vectors a token and 2.
template <typename T>
void ComputeDkDv(const Work& work, int64_t first_row, int64_t num_rows,
                 int64_t kv_head, float* memory) {
  const AttentionParams& batch = work.batch;
  const int64_t size = batch.head_dim;
  float* const dk = memory;
  float* const dv = dk + kTileTokens * size;
  float* const keys = dv + kTileTokens * size;
  float* const values = keys + kTileTokens * size;
  float* const query = values + kTileTokens * size;
  float* const grad_out = query + size;
  int64_t tokens[kTileTokens];
  std::fill_n(dk, 2 * kTileTokens * size, 0.0f);

  for (int64_t s = 0; s < work.num_sequences; ++s) {
    const Sequence& sequence = work.sequences[s];
    const int64_t row_of_token = sequence.kv.first_row - first_row;
    const int64_t begin = std::max<int64_t>(-row_of_token, 0);
    const int64_t end = std::min(num_rows - row_of_token, sequence.kv.count);
    // Query rows that see any of these tokens.
    const int64_t first = sequence.PositionOf(0);
    const int64_t from = std::max<int64_t>(begin - work.right - first, 0);
    const int64_t to =
        std::min(end - 1 + work.left - first + 1, sequence.num_rows);
    if (begin >= end || from >= to) continue;
    GatherTokens(batch, sequence, kv_head, begin, end, keys, values, tokens);
    for (int64_t i = from; i < to; ++i) {
      for (int64_t h = 0; h < work.group; ++h) {
        const int64_t head = kv_head * work.group + h;
        const Row row = RowAt(work, sequence, i, head, query, grad_out);
        if (row.lse == kInfinity) continue;
        LoadRow<T>(work, sequence, i, head, batch.scale, 1.0f, query, grad_out);
        const int64_t last = std::min(end, row.position + work.right + 1);
        for (int64_t t = std::max(begin, row.position - work.left); t < last;
             ++t) {
          const int64_t at = (t - begin) * size;
          const Weight weight = WeightOf(batch, row, keys + at, values + at, t);
          const int64_t to_row = (row_of_token + t) * size;
          AddScaled(query, size, weight.dx, dk + to_row);
          AddScaled(grad_out, size, weight.w, dv + to_row);
        }
      }
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t at =
        ((first_row + row) * batch.num_kv_heads + kv_head) * size;
    Store(dk + row * size, size, 1.0f, static_cast<T*>(work.params.dk) + at);
    Store(dv + row * size, size, 1.0f, static_cast<T*>(work.params.dv) + at);
  }
}

ffi::Error NoMemory(const Work& work) {
  return ffi::Error(
      ffi::ErrorCode::kResourceExhausted,
      std::string(BackwardNamesOf(work.batch.op).op) + ": out of host memory");
}

// Inner-loop steps of one piece; an estimate: half of `longest` is seen.
int64_t CostOf(int64_t longest, int64_t rows, int64_t head_dim) {
  return (longest / 2 + 1) * std::min(rows, int64_t{1} << 20) * 3 * head_dim;
}

// Calls body(memory of its own, piece) for each piece.
template <typename Body>
ffi::Error ForEachPiece(const Work& work, ffi::ThreadPool& pool, int64_t pieces,
                        int64_t cost, int64_t floats, const Body& body) {
  if (pieces == 0) return ffi::Error::Success();
  const int workers = NumWorkers(pool, pieces, cost);
  const std::unique_ptr<float[]> memory(
      new (std::nothrow) float[workers * floats]);
  if (memory == nullptr) return NoMemory(work);
  ParallelForWithWorker(pool, pieces, cost, [&](int worker, int64_t piece) {
    body(memory.get() + worker * floats, piece);
  });
  return ffi::Error::Success();
}

template <typename T>
ffi::Error AllDq(const Work& work, ffi::ThreadPool& pool) {
  const AttentionParams& batch = work.batch;
  // Rows of no sequence are zero.
  std::fill_n(static_cast<T*>(work.params.dq),
              batch.num_tokens * batch.num_heads * batch.head_dim,
              FromFloat<T>(0));
  const std::unique_ptr<Tile[]> tiles(new (std::nothrow) Tile[MaxTiles(batch)]);
  if (tiles == nullptr) return NoMemory(work);
  const int64_t num_tiles = MakeTiles(work, tiles.get());
  int64_t longest = 0;
  for (int64_t s = 0; s < work.num_sequences; ++s) {
    longest = std::max(longest, work.sequences[s].kv.count);
  }
  const int64_t rows = std::min(kTileRows, batch.num_tokens) * work.group;
  return ForEachPiece(work, pool, num_tiles * batch.num_kv_heads,
                      CostOf(longest, rows, batch.head_dim),
                      (3 * rows + 2 * kTileTokens) * batch.head_dim,
                      [&](float* memory, int64_t piece) {
                        ComputeDq<T>(work, tiles[piece / batch.num_kv_heads],
                                     piece % batch.num_kv_heads, memory);
                      });
}

template <typename T>
ffi::Error AllDkDv(const Work& work, ffi::ThreadPool& pool) {
  const AttentionParams& batch = work.batch;
  const int64_t num_kv_tokens = NumKvTokens(work.params);
  const int64_t num_tiles = (num_kv_tokens + kTileTokens - 1) / kTileTokens;
  int64_t longest = 0;
  for (int64_t s = 0; s < work.num_sequences; ++s) {
    longest = std::max(longest, work.sequences[s].num_rows);
  }
  return ForEachPiece(
      work, pool, num_tiles * batch.num_kv_heads,
      CostOf(longest, kTileTokens * work.group, batch.head_dim),
      (4 * kTileTokens + 2) * batch.head_dim,
      [&](float* memory, int64_t piece) {
        const int64_t first = piece / batch.num_kv_heads * kTileTokens;
        ComputeDkDv<T>(work, first,
                       std::min(kTileTokens, num_kv_tokens - first),
                       piece % batch.num_kv_heads, memory);
      });
}

ffi::Error AttentionBackward(const AttentionBackwardParams& params,
                             ffi::ThreadPool& pool) {
  Work work{params};
  const AttentionParams& batch = params.batch;
  if (batch.num_heads == 0) return ffi::Error::Success();
  const int64_t num_rows = batch.num_heads * batch.num_tokens;
  work.sequences.reset(new (std::nothrow) Sequence[batch.max_num_seqs]);
  work.delta.reset(new (std::nothrow) float[num_rows]);
  if (work.sequences == nullptr || work.delta == nullptr) return NoMemory(work);
  ForEachSequence(batch, BackwardNamesOf(batch.op),
                  [&](const Sequence& sequence) {
                    work.sequences[work.num_sequences++] = sequence;
                  });
  return DispatchFloat(batch.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelFor(pool, batch.num_heads, batch.num_tokens * batch.head_dim,
                [&](int64_t head) { ComputeDelta<T>(work, head); });
    if (params.wants_dq) XLA_OPS_RETURN_IF_ERROR(AllDq<T>(work, pool));
    if (params.wants_dkv) XLA_OPS_RETURN_IF_ERROR(AllDkDv<T>(work, pool));
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_OPS_CPU_HANDLER(flash_attn_varlen_backward, AttentionBackwardBinding(),
                    MakeAttentionBackward<kFlashAttnVarlenBackwardNames>,
                    AttentionBackward);
XLA_OPS_CPU_HANDLER(paged_attention_backward, AttentionBackwardBinding(),
                    MakeAttentionBackward<kPagedAttentionBackwardNames>,
                    AttentionBackward);

}  // namespace xla_ops
