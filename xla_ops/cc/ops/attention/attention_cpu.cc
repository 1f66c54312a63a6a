// CPU kernel and handlers of attention.
//
// A piece of work is a tile of up to kTileRows query tokens of one sequence
// and the query heads that share one KV head. It walks the KV tokens that
// any of its rows sees, kTileTokens at a time: gathers them through the
// block table, or from their rows, into fp32 scratch, once for all rows,
// then updates each row's running maximum, sum and accumulator (online
// softmax). Pieces are spread over XLA's threads.
//
// Tokens in blocks that do not exist are left out when gathering, so no
// later step meets a mask other than "from .. to" of the row.

#include "xla_ops/cc/ops/attention/attention_cpu.h"

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
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"

namespace xla_ops {
namespace {

constexpr int64_t kTileRows = 16;    // query tokens
constexpr int64_t kTileTokens = 32;  // KV tokens
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Up to kTileRows query tokens of one sequence.
struct Tile {
  Sequence sequence;
  int64_t first_row;  // in query
  int64_t num_rows;
  int64_t first_position;  // KV position of the first row; may be negative
};

// One thread's memory, carved out of one array of floats.
struct Scratch {
  static int64_t Floats(int64_t rows, int64_t head_dim) {
    return rows * (2 * head_dim + 2) + kTileTokens * (2 * head_dim + 1);
  }
  Scratch(float* base, int64_t rows, int64_t head_dim)
      : query(base),
        out(query + rows * head_dim),
        max(out + rows * head_dim),
        sum(max + rows),
        keys(sum + rows),
        values(keys + kTileTokens * head_dim),
        weights(values + kTileTokens * head_dim) {}

  float* query;    // [rows, head_dim], scaled
  float* out;      // [rows, head_dim], not yet divided by sum
  float* max;      // [rows]
  float* sum;      // [rows]
  float* keys;     // [kTileTokens, head_dim]
  float* values;   // [kTileTokens, head_dim]
  float* weights;  // [kTileTokens]
  int64_t positions[kTileTokens];
};

// Takes gathered tokens [from, to) into row `row` of the tile, whose query
// is at KV position `position`.
void Attend(const AttentionParams& params, int64_t row, int64_t position,
            float alibi_slope, int64_t from, int64_t to, Scratch* scratch) {
  const int64_t size = params.head_dim;
  const float* query = scratch->query + row * size;
  float* out = scratch->out + row * size;
  float tile_max = -kInfinity;
  for (int64_t t = from; t < to; ++t) {
    float logit = Dot(query, scratch->keys + t * size, size);
    if (params.soft_cap > 0) {
      logit = params.soft_cap * std::tanh(logit / params.soft_cap);
    }
    if (alibi_slope != 0) {
      const int64_t distance = std::abs(position - scratch->positions[t]);
      logit -= alibi_slope * static_cast<float>(distance);
    }
    scratch->weights[t] = logit;
    tile_max = std::max(tile_max, logit);
  }
  // A row whose logits are all -inf has no maximum to subtract.
  const float max = std::max(scratch->max[row], tile_max);
  const float base = max == -kInfinity ? 0.0f : max;
  const float rescale = std::exp(scratch->max[row] - base);
  scratch->max[row] = max;
  scratch->sum[row] *= rescale;
  for (int64_t d = 0; d < size; ++d) out[d] *= rescale;
  for (int64_t t = from; t < to; ++t) {
    const float weight = std::exp(scratch->weights[t] - base);
    scratch->sum[row] += weight;
    const float* value = scratch->values + t * size;
    for (int64_t d = 0; d < size; ++d) out[d] += weight * value[d];
  }
}

// Divides row `row` by its denominator, to which a sink of the row's head
// belongs, and writes it and its lse.
template <typename T>
void WriteRow(const AttentionParams& params, const Scratch& scratch,
              int64_t row, const float* sink, float v_scale, T* out,
              float* lse) {
  const int64_t size = params.head_dim;
  float max = scratch.max[row];
  float denominator = scratch.sum[row];
  // No token seen, or none whose weight is above zero.
  if (denominator == 0) {
    std::fill_n(out, size, FromFloat<T>(0));
    *lse = kInfinity;
    return;
  }
  float factor = v_scale;
  if (sink != nullptr) {
    const float top = std::max(max, *sink);
    const float rescale = std::exp(max - top);
    denominator = denominator * rescale + std::exp(*sink - top);
    factor *= rescale;
    max = top;
  }
  factor /= denominator;
  const float* from = scratch.out + row * size;
  for (int64_t d = 0; d < size; ++d) out[d] = FromFloat<T>(from[d] * factor);
  *lse = max + std::log(denominator);
}

template <typename T>
void AttendTile(const AttentionParams& params, const Tile& tile,
                int64_t kv_head, Scratch* scratch) {
  const int64_t size = params.head_dim;
  const int64_t group = params.num_heads / params.num_kv_heads;
  const int64_t rows = tile.num_rows * group;  // token-major, then head
  const auto head_of = [&](int64_t row) {
    return kv_head * group + row % group;
  };
  const auto token_of = [&](int64_t row) {
    return tile.first_row + row / group;
  };
  const auto row_offset = [&](int64_t row) {
    return (token_of(row) * params.num_heads + head_of(row)) * size;
  };

  const float scale = params.scale * KvScale(params, params.k_scale, 0,
                                             tile.sequence.index, kv_head);
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(params.query) + row_offset(row);
    float* query = scratch->query + row * size;
    for (int64_t d = 0; d < size; ++d) query[d] = ToFloat(from[d]) * scale;
    scratch->max[row] = -kInfinity;
    scratch->sum[row] = 0;
  }
  std::fill_n(scratch->out, rows * size, 0.0f);

  const int64_t left = Reach(params.window_left);
  const int64_t right = Reach(params.window_right);
  const float* slopes = params.alibi_slopes;
  if (slopes != nullptr)
    slopes += tile.sequence.index * params.alibi_seq_stride;

  const int64_t last_position = tile.first_position + tile.num_rows - 1;
  const int64_t end =
      std::min(last_position + right + 1, tile.sequence.kv.count);
  int64_t begin = std::max<int64_t>(tile.first_position - left, 0);
  for (; begin < end; begin += kTileTokens) {
    const int64_t count =
        GatherTokens(params, tile.sequence, kv_head, begin,
                     std::min(begin + kTileTokens, end), scratch->keys,
                     scratch->values, scratch->positions);
    const int64_t* positions = scratch->positions;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = tile.first_position + row / group;
      // Positions ascend: what the row sees is a run of them.
      const int64_t from =
          std::lower_bound(positions, positions + count, position - left) -
          positions;
      const int64_t to =
          std::upper_bound(positions, positions + count, position + right) -
          positions;
      if (from >= to) continue;
      Attend(params, row, position,
             slopes == nullptr ? 0.0f : slopes[head_of(row)], from, to,
             scratch);
    }
  }

  const float v_scale =
      KvScale(params, params.v_scale, 1, tile.sequence.index, kv_head);
  for (int64_t row = 0; row < rows; ++row) {
    const float* sink =
        params.sinks == nullptr ? nullptr : params.sinks + head_of(row);
    WriteRow(params, *scratch, row, sink, v_scale,
             static_cast<T*>(params.out) + row_offset(row),
             params.lse + head_of(row) * params.num_tokens + token_of(row));
  }
}

// Rows [begin, end), which are no sequence's.
void WriteEmptyRows(const AttentionParams& params, int64_t begin, int64_t end) {
  const int64_t row_bytes =
      params.num_heads * params.head_dim * SizeOf(params.dtype);
  std::fill_n(static_cast<char*>(params.out) + begin * row_bytes,
              (end - begin) * row_bytes, char{0});
  for (int64_t head = 0; head < params.num_heads; ++head) {
    std::fill_n(params.lse + head * params.num_tokens + begin, end - begin,
                kInfinity);
  }
}

// Cuts the sequences into tiles, writes the rows of none and returns the
// number of tiles. `tiles` has room for MaxTiles.
int64_t MakeTiles(const AttentionParams& params, const AttentionNames& names,
                  Tile* tiles) {
  int64_t row = 0;
  int64_t num_tiles = 0;
  ForEachSequence(params, names, [&](const Sequence& sequence) {
    WriteEmptyRows(params, row, sequence.first_row);
    for (int64_t at = 0; at < sequence.num_rows; at += kTileRows) {
      tiles[num_tiles++] = {sequence, sequence.first_row + at,
                            std::min(kTileRows, sequence.num_rows - at),
                            sequence.PositionOf(at)};
    }
    row = sequence.first_row + sequence.num_rows;
  });
  WriteEmptyRows(params, row, params.num_tokens);
  return num_tiles;
}

int64_t MaxTiles(const AttentionParams& params) {
  return std::min(params.num_tokens,
                  params.num_tokens / kTileRows + params.max_num_seqs);
}

}  // namespace

ffi::Error Attention(const AttentionParams& params, ffi::ThreadPool& pool) {
  if (params.num_tokens == 0 || params.num_heads == 0) {
    return ffi::Error::Success();
  }
  const AttentionNames& names = NamesOf(params.op);
  const ffi::Error no_memory(ffi::ErrorCode::kResourceExhausted,
                             std::string(names.op) + ": out of host memory");
  std::unique_ptr<Tile[]> tiles(new (std::nothrow) Tile[MaxTiles(params)]);
  if (tiles == nullptr) return no_memory;
  const int64_t num_tiles = MakeTiles(params, names, tiles.get());
  if (num_tiles == 0) return ffi::Error::Success();

  const int64_t group = params.num_heads / params.num_kv_heads;
  const int64_t tile_rows = std::min(kTileRows, params.num_tokens) * group;
  const int64_t floats = Scratch::Floats(tile_rows, params.head_dim);
  // An estimate: a tile's rows see half of the longest sequence.
  int64_t longest = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    longest = std::max(longest, tiles[i].sequence.kv.count);
  }
  const int64_t pieces = num_tiles * params.num_kv_heads;
  const int64_t cost = (longest / 2 + 1) *
                       std::min(tile_rows, int64_t{1} << 20) * params.head_dim;
  const int workers = NumWorkers(pool, pieces, cost);
  std::unique_ptr<float[]> memory(new (std::nothrow) float[workers * floats]);
  if (memory == nullptr) return no_memory;

  DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    ParallelForWithWorker(pool, pieces, cost, [&](int worker, int64_t piece) {
      Scratch scratch(memory.get() + worker * floats, tile_rows,
                      params.head_dim);
      AttendTile<T>(params, tiles[piece / params.num_kv_heads],
                    piece % params.num_kv_heads, &scratch);
    });
  });
  return ffi::Error::Success();
}

XLA_OPS_CPU_HANDLER(flash_attn_varlen, AttentionBinding(),
                    MakeAttention<kFlashAttnVarlenNames>, Attention);
XLA_OPS_CPU_HANDLER(paged_attention, AttentionBinding(),
                    MakeAttention<kPagedAttentionNames>, Attention);

}  // namespace xla_ops
