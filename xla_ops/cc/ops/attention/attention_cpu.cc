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

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
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
constexpr int kLanes = 16;           // partial sums of a dot product
constexpr int kMaxReports = 8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// No distance of a token from a query's position reaches it: lengths are
// 32-bit numbers.
constexpr int64_t kUnbounded = int64_t{1} << 33;

// The KV tokens of a sequence, clamped to what the tensors' shapes allow.
struct KvTokens {
  int64_t first_row;  // contiguous: of token 0, in key and value
  int64_t count;      // L_k
};

// Up to kTileRows query tokens of one sequence.
struct Tile {
  int64_t seq;
  int64_t first_row;  // in query
  int64_t num_rows;
  int64_t first_position;  // KV position of the first row; may be negative
  KvTokens kv;
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
// `end - begin` is at most kTileTokens. `T` is kv_dtype's.
template <typename T>
int64_t Gather(const AttentionParams& params, const Tile& tile, int64_t kv_head,
               int64_t begin, int64_t end, Scratch* scratch) {
  const T* keys = static_cast<const T*>(params.key);
  const T* values = static_cast<const T*>(params.value);
  const int64_t size = params.head_dim;
  int64_t count = 0;
  const auto take = [&](int64_t token, int64_t at) {
    at += kv_head * params.head_stride;
    Widen(keys + at, size, scratch->keys + count * size);
    Widen(values + at, size, scratch->values + count * size);
    scratch->positions[count] = token;
    ++count;
  };
  if (!params.paged) {
    for (int64_t token = begin; token < end; ++token) {
      take(token, (tile.kv.first_row + token) * params.page_stride);
    }
    return count;
  }
  const int32_t* table = params.block_table + tile.seq * params.max_blocks;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t block = table[token / params.page_size];
    if (block < 0 || block >= params.num_blocks) continue;
    take(token, block * params.block_stride +
                    token % params.page_size * params.page_stride);
  }
  return count;
}

int64_t Gather(const AttentionParams& params, const Tile& tile, int64_t kv_head,
               int64_t begin, int64_t end, Scratch* scratch) {
  switch (params.kv_dtype) {
    case DType::kF8E4M3FN:
      return Gather<Float8E4M3FN>(params, tile, kv_head, begin, end, scratch);
    case DType::kF8E5M2:
      return Gather<Float8E5M2>(params, tile, kv_head, begin, end, scratch);
    default:
      return DispatchFloat(params.kv_dtype, [&](auto dtype) {
        return Gather<CpuType<dtype.value>>(params, tile, kv_head, begin, end,
                                            scratch);
      });
  }
}

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

// Scale `index` (0: of keys, 1: of values) of a sequence's KV head.
float KvScale(const AttentionParams& params, const float* scale, int index,
              int64_t seq, int64_t kv_head) {
  if (scale == nullptr) return 1.0f;
  return scale[seq * params.kv_scale_seq_stride[index] +
               kv_head * params.kv_scale_head_stride[index]];
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

  const float scale =
      params.scale * KvScale(params, params.k_scale, 0, tile.seq, kv_head);
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(params.query) + row_offset(row);
    float* query = scratch->query + row * size;
    for (int64_t d = 0; d < size; ++d) query[d] = ToFloat(from[d]) * scale;
    scratch->max[row] = -kInfinity;
    scratch->sum[row] = 0;
  }
  std::fill_n(scratch->out, rows * size, 0.0f);

  const auto reach = [](int64_t window) {
    return window < 0 ? kUnbounded : std::min(window, kUnbounded);
  };
  const int64_t left = reach(params.window_left);
  const int64_t right = reach(params.window_right);
  const float* slopes = params.alibi_slopes;
  if (slopes != nullptr) slopes += tile.seq * params.alibi_seq_stride;

  const int64_t last_position = tile.first_position + tile.num_rows - 1;
  const int64_t end = std::min(last_position + right + 1, tile.kv.count);
  int64_t begin = std::max<int64_t>(tile.first_position - left, 0);
  for (; begin < end; begin += kTileTokens) {
    const int64_t count = Gather(params, tile, kv_head, begin,
                                 std::min(begin + kTileTokens, end), scratch);
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

  const float v_scale = KvScale(params, params.v_scale, 1, tile.seq, kv_head);
  for (int64_t row = 0; row < rows; ++row) {
    const float* sink =
        params.sinks == nullptr ? nullptr : params.sinks + head_of(row);
    WriteRow(params, *scratch, row, sink, v_scale,
             static_cast<T*>(params.out) + row_offset(row),
             params.lse + head_of(row) * params.num_tokens + token_of(row));
  }
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
  Clamper clamper(params, names);
  const int64_t num_seqs = clamper.NumSeqs();
  int64_t row = clamper.QueryRow(0, 0);
  int64_t kv_row = params.paged ? 0 : clamper.KvRow(0, 0);
  WriteEmptyRows(params, 0, row);
  int64_t num_tiles = 0;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    const int64_t end = clamper.QueryRow(seq + 1, row);
    const int64_t kv_end = params.paged ? 0 : clamper.KvRow(seq + 1, kv_row);
    const KvTokens kv = clamper.Tokens(seq, kv_row, kv_end);
    const int64_t num_rows = end - row;
    if (params.debug && params.paged && num_rows > 0) {
      clamper.ReportMaskedBlocks(seq, kv);
    }
    for (int64_t at = 0; at < num_rows; at += kTileRows) {
      tiles[num_tiles++] = {seq, row + at, std::min(kTileRows, num_rows - at),
                            kv.count - num_rows + at, kv};
    }
    row = end;
    kv_row = kv_end;
  }
  WriteEmptyRows(params, row, params.num_tokens);
  return num_tiles;
}

int64_t MaxTiles(const AttentionParams& params) {
  return std::min(params.num_tokens,
                  params.num_tokens / kTileRows + params.max_num_seqs);
}

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
    longest = std::max(longest, tiles[i].kv.count);
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

}  // namespace

XLA_OPS_CPU_HANDLER(flash_attn_varlen, AttentionBinding(),
                    MakeAttention<kFlashAttnVarlenNames>, Attention);
XLA_OPS_CPU_HANDLER(paged_attention, AttentionBinding(),
                    MakeAttention<kPagedAttentionNames>, Attention);

}  // namespace xla_ops
