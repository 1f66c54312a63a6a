// CPU kernel and handler of xla_ops.paged_attention.
//
// A piece of work is a tile of up to kTileRows query tokens of one sequence
// and the query heads that share one KV head. It walks the KV tokens that
// any of its rows sees, kTileTokens at a time: gathers them through the
// block table into fp32 scratch, once for all rows, then updates each row's
// running maximum, sum and accumulator (online softmax). Pieces are spread
// over XLA's threads.
//
// Tokens in blocks that do not exist are left out when gathering, so no
// later step meets a mask other than "from .. to" of the row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <new>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/parallel.h"
#include "xla_ops/cc/core/registry.h"
#include "xla_ops/cc/ops/attention/attention.h"
#include "xla_ops/cc/ops/attention/attention_checks.h"

namespace xla_ops {
namespace {

constexpr int64_t kTileRows = 16;    // query tokens
constexpr int64_t kTileTokens = 32;  // KV tokens
constexpr int kLanes = 16;           // partial sums of a dot product
constexpr int kMaxReports = 8;

// A sequence, clamped to what the tensors' shapes allow.
struct Sequence {
  int64_t first_row;  // in query
  int64_t num_rows;
  int64_t context;  // KV tokens
};

// Up to kTileRows query tokens of one sequence.
struct Tile {
  int64_t seq;
  int64_t first_row;  // in query
  int64_t num_rows;
  int64_t first_position;  // KV position of the first row; may be negative
  int64_t context;
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

template <typename T>
void Widen(const T* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = ToFloat(from[i]);
}

// a.b; `size` is a multiple of 8. Partial sums vectorise; the compiler must
// not reorder a single one.
float Dot(const float* a, const float* b, int64_t size) {
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

// Gathers the tokens of [begin, end) that exist and returns how many.
// `end - begin` is at most kTileTokens.
template <typename T>
int64_t Gather(const AttentionParams& params, int64_t seq, int64_t kv_head,
               int64_t begin, int64_t end, Scratch* scratch) {
  const int32_t* table = params.block_tables + seq * params.max_blocks;
  const T* keys = static_cast<const T*>(params.key_cache);
  const T* values = static_cast<const T*>(params.value_cache);
  const int64_t size = params.head_dim;
  int64_t count = 0;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t block = table[token / params.page_size];
    if (block < 0 || block >= params.num_blocks) continue;
    const int64_t at = block * params.block_stride +
                       token % params.page_size * params.page_stride +
                       kv_head * params.head_stride;
    Widen(keys + at, size, scratch->keys + count * size);
    Widen(values + at, size, scratch->values + count * size);
    scratch->positions[count] = token;
    ++count;
  }
  return count;
}

// Takes gathered tokens [from, to) into row `row` of the tile.
void Attend(const AttentionParams& params, int64_t row, int64_t from,
            int64_t to, Scratch* scratch) {
  const int64_t size = params.head_dim;
  const float* query = scratch->query + row * size;
  float* out = scratch->out + row * size;
  float tile_max = -std::numeric_limits<float>::infinity();
  for (int64_t t = from; t < to; ++t) {
    float logit = Dot(query, scratch->keys + t * size, size);
    if (params.soft_cap > 0) {
      logit = params.soft_cap * std::tanh(logit / params.soft_cap);
    }
    scratch->weights[t] = logit;
    tile_max = std::max(tile_max, logit);
  }
  // A row whose logits are all -inf has no maximum to subtract.
  const float max = std::max(scratch->max[row], tile_max);
  const float base =
      max == -std::numeric_limits<float>::infinity() ? 0.0f : max;
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

template <typename T>
void AttendTile(const AttentionParams& params, const Tile& tile,
                int64_t kv_head, Scratch* scratch) {
  const int64_t size = params.head_dim;
  const int64_t group = params.num_heads / params.num_kv_heads;
  const int64_t rows = tile.num_rows * group;  // token-major, then head
  const auto row_offset = [&](int64_t row) {
    return ((tile.first_row + row / group) * params.num_heads +
            kv_head * group + row % group) *
           size;
  };

  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(params.query) + row_offset(row);
    float* query = scratch->query + row * size;
    for (int64_t d = 0; d < size; ++d) {
      query[d] = ToFloat(from[d]) * params.scale;
    }
    scratch->max[row] = -std::numeric_limits<float>::infinity();
    scratch->sum[row] = 0;
  }
  std::fill_n(scratch->out, rows * size, 0.0f);

  const int64_t window = params.sliding_window > 0
                             ? params.sliding_window
                             : std::numeric_limits<int64_t>::max();
  // The first token that the query at KV position `position` >= 0 sees.
  const auto window_begin = [&](int64_t position) {
    return window > position ? int64_t{0} : position - window + 1;
  };
  const int64_t last_position = tile.first_position + tile.num_rows - 1;
  const int64_t end = std::min(last_position + 1, tile.context);
  int64_t begin = window_begin(std::max<int64_t>(tile.first_position, 0));
  for (; begin < end; begin += kTileTokens) {
    const int64_t count =
        Gather<T>(params, tile.seq, kv_head, begin,
                  std::min(begin + kTileTokens, end), scratch);
    const int64_t* positions = scratch->positions;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = tile.first_position + row / group;
      if (position < 0) continue;
      // Positions ascend: what the row sees is a run of them.
      const int64_t from = std::lower_bound(positions, positions + count,
                                            window_begin(position)) -
                           positions;
      const int64_t to =
          std::upper_bound(positions, positions + count, position) - positions;
      if (from < to) Attend(params, row, from, to, scratch);
    }
  }

  for (int64_t row = 0; row < rows; ++row) {
    T* to = static_cast<T*>(params.out) + row_offset(row);
    const float sum = scratch->sum[row];
    // No token seen, or none with a finite logit: zero.
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
    const float* out = scratch->out + row * size;
    for (int64_t d = 0; d < size; ++d) {
      to[d] = FromFloat<T>(out[d] * inverse);
    }
  }
}

// Sequence `seq`, which begins where the one before it, clamped, ended.
Sequence ClampSequence(const AttentionParams& params, int64_t seq,
                       int64_t first_row) {
  Sequence sequence;
  sequence.first_row = first_row;
  sequence.num_rows = std::clamp<int64_t>(params.query_start_loc[seq + 1],
                                          first_row, params.num_tokens) -
                      first_row;
  sequence.context = std::clamp<int64_t>(params.context_lens[seq], 0,
                                         params.max_blocks * params.page_size);
  return sequence;
}

void ReportMaskedBlocks(const AttentionParams& params, int64_t seq,
                        const Sequence& sequence, int* reports) {
  if (sequence.num_rows == 0 || params.page_size == 0) return;
  const int64_t pages =
      (sequence.context + params.page_size - 1) / params.page_size;
  for (int64_t page = 0; page < pages && *reports < kMaxReports; ++page) {
    const int64_t block = params.block_tables[seq * params.max_blocks + page];
    if (block >= 0 && block < params.num_blocks) continue;
    ++*reports;
    std::fprintf(
        stderr,
        "xla_ops: paged_attention: block_tables[%lld, %lld] must be from 0 "
        "to %lld, got %lld; masked\n",
        static_cast<long long>(seq), static_cast<long long>(page),
        static_cast<long long>(params.num_blocks - 1),
        static_cast<long long>(block));
  }
}

// Cuts the sequences into tiles, writes zeros to the rows of none and
// returns the number of tiles. `tiles` has room for MaxTiles.
int64_t MakeTiles(const AttentionParams& params, Tile* tiles) {
  const int64_t num_seqs =
      std::clamp<int64_t>(*params.num_seqs, 0, params.max_num_seqs);
  const int64_t row_bytes =
      params.num_heads * params.head_dim * SizeOf(params.dtype);
  const auto clear_rows = [&](int64_t begin, int64_t end) {
    std::fill_n(static_cast<char*>(params.out) + begin * row_bytes,
                (end - begin) * row_bytes, char{0});
  };
  int64_t row =
      std::clamp<int64_t>(params.query_start_loc[0], 0, params.num_tokens);
  clear_rows(0, row);
  int64_t num_tiles = 0;
  int reports = 0;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    const Sequence sequence = ClampSequence(params, seq, row);
    if (params.debug) ReportMaskedBlocks(params, seq, sequence, &reports);
    for (int64_t at = 0; at < sequence.num_rows; at += kTileRows) {
      tiles[num_tiles++] = {
          seq, row + at, std::min(kTileRows, sequence.num_rows - at),
          sequence.context - sequence.num_rows + at, sequence.context};
    }
    row += sequence.num_rows;
  }
  clear_rows(row, params.num_tokens);
  return num_tiles;
}

int64_t MaxTiles(const AttentionParams& params) {
  return std::min(params.num_tokens,
                  params.num_tokens / kTileRows + params.max_num_seqs);
}

ffi::Error Attention(const AttentionParams& params,
                          ffi::ThreadPool& pool) {
  const ffi::Error no_memory(ffi::ErrorCode::kResourceExhausted,
                             "paged_attention: out of host memory");
  std::unique_ptr<Tile[]> tiles(new (std::nothrow) Tile[MaxTiles(params)]);
  if (tiles == nullptr) return no_memory;
  const int64_t num_tiles = MakeTiles(params, tiles.get());
  if (num_tiles == 0) return ffi::Error::Success();

  const int64_t group = params.num_heads / params.num_kv_heads;
  const int64_t tile_rows = std::min(kTileRows, params.num_tokens) * group;
  const int64_t floats = Scratch::Floats(tile_rows, params.head_dim);
  // An estimate: a tile's rows see half of the longest context.
  int64_t longest = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    longest = std::max(longest, tiles[i].context);
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

ffi::Error AttentionCpu(
    ffi::AnyBuffer query, ffi::AnyBuffer key_cache, ffi::AnyBuffer value_cache,
    ffi::AnyBuffer context_lens, ffi::AnyBuffer block_tables,
    ffi::AnyBuffer query_start_loc, ffi::AnyBuffer num_seqs,
    ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
    AttentionAttrs attrs, ffi::ThreadPool pool) {
  AttentionParams params;
  XLA_OPS_RETURN_IF_ERROR(MakeAttentionParams(
      query, key_cache, value_cache, context_lens, block_tables,
      query_start_loc, num_seqs, out, workspace, attrs, &params));
  if (params.num_tokens == 0 || params.num_heads == 0) {
    return ffi::Error::Success();
  }
  return Attention(params, pool);
}

}  // namespace
}  // namespace xla_ops

extern "C" XLA_OPS_EXPORT XLA_FFI_Error* xla_ops_attention_cpu(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xla_ops_attention_cpu, xla_ops::AttentionCpu,
    xla_ops::AttentionBinding().Ctx<xla::ffi::ThreadPool>());

XLA_OPS_EXPORT_HANDLERS({"xla_ops.paged_attention",
                         "Host",
                         {nullptr, nullptr, nullptr,
                          xla_ops_attention_cpu}})
