// Attention on Hopper's warpgroup products and bulk copies, for prefill in
// fp16 and bf16. The pipeline is FlashAttention-3's (Shah et al., 2024,
// https://arxiv.org/abs/2407.08608).
//
// A persistent block takes work items one by one from a counter in the
// workspace: a tile of kRows packed query rows (the query heads of one KV head
// folded into rows: packed row r is token r / group, head r % group) of one
// sequence and KV head. Roles of its warpgroups:
//   producer, warp 0      takes items, and copies K and V tiles by TMA
//   producer, warps 1-3   copy the query tile
//   consumers             64 query rows each
// KV tiles are taken from the last to the first, so that those that need a
// mask come first. While a consumer's softmax of one tile runs, its products
// P V of the tile before and, in turns with its neighbours (named barriers),
// theirs keep the tensor cores busy.
//
// Boxes. A K or V tile is copied as boxes of `box_tokens` tokens, each at a
// place of its own; a box outside the cache is zero. Contiguous K and V are
// one page, and a tile one box a panel (64 columns). Where pages allow it a
// box holds all panels of its tokens, for small boxes cost the copy engine as
// much time as large ones. Tokens behind the context are zeroed where V would
// otherwise bring its NaN into 0 * V.
//
// Order of items: sequence, KV head, tiles from the last to the first, so that
// blocks at work share K and V in the L2 cache, and the cheap tiles of a
// causal mask come last.
//
// Tested by tests/gpu/check_kernels.py.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_

#include <cuda.h>
#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/fast_div.h"
#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"

namespace xla_ops {

// kHeadDim is the padded head_dim: 64, 128 or 256. kAllPanelsInBox: a box of K
// or V holds all panels of its tokens, else one.
template <int kHeadDim, bool kAllPanelsInBox>
struct Sm90Shape {
  static constexpr bool kAllPanels = kAllPanelsInBox;
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kTokens = kHeadDim == 256 ? 80 : 128;  // of a KV tile
  static constexpr int kStages = kHeadDim == 64 ? 3 : 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Of a thread: 64 K registers in all.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static constexpr int kPanels = kHeadDim / 64;
  // The bytes in shared memory from 8 tokens of a K or V tile to the 8 below,
  // and from a panel to the one beside it.
  static constexpr int kBelow = kAllPanels ? kPanels * kAtomBytes : kAtomBytes;
  static constexpr int kBeside =
      kAllPanels ? kAtomBytes : kTokens * kPanelRowBytes;
  // Consumers take turns at the tensor cores, but where the copies of small
  // boxes set the pace.
  static constexpr bool kTurns = !kAllPanels || kHeadDim == 256;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;
  // The dynamic part begins at the next multiple of 1024.
  static constexpr int kSharedBytes =
      1024 + kQueryBytes + 2 * kStages * kTileBytes;
};

// AttentionParams as this kernel wants them.
struct Sm90Args {
  const void* query;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;  // null: paged
  const int32_t* seqused_k;     // may be null where contiguous
  const int32_t* block_table;   // null: contiguous
  const int32_t* leftpad_k;     // may be null
  const int32_t* num_seqs;      // may be null
  const float* alibi_slopes;    // may be null
  const float* sinks;           // may be null
  void* out;
  float* lse;
  unsigned* next_item;
  int64_t max_blocks;
  int64_t alibi_seq_stride;
  FastDiv page_size;
  FastDiv group;
  int num_tokens;
  int num_kv_tokens;  // rows of contiguous K; paged: what a table can address
  int num_blocks;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int max_num_seqs;
  int box_tokens;
  // From a KV head to the next in the maps (MakeMap in attention_sm90.cu.cc).
  int head_step;
  int window_left;   // -1: unbounded
  int window_right;  // -1: unbounded
  float scale;       // times log2(e); with soft_cap, over soft_cap
  float soft_cap;    // times log2(e); 0: none
  // Logits need more than a positive factor: soft_cap, ALiBi or scale <= 0.
  bool transform;
};

#if XLA_OPS_HAS_WGMMA

struct Sm90Item {
  int seq;  // -1: rows of no sequence; -2: no more items
  int kv_head;
  int first_token;  // of the segment, a row of the query tensor
  int first_row;    // packed, in the segment
  int num_rows;     // of the tile
  int shift;        // KV position of the segment's token 0: L_k - L_q
  int context;      // L_k
  int kv_row;       // contiguous: the row of KV token 0
  int tile_begin;   // KV tiles [tile_begin, tile_end)
  int tile_end;
};

// The barriers of a stage of K or V, and of the other buffers.
template <int kStages>
struct Sm90Barriers {
  uint64_t item_full[2], item_empty[2];
  uint64_t query_full, query_empty;
  uint64_t key_full[kStages], key_empty[kStages];
  uint64_t value_full[kStages], value_empty[kStages];
  uint64_t tail;
};

// A ring's place: the stage, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Warp 0's walk over the segments (the rows before the first sequence, the
// sequences, the rows after the last), 32 at a time: what this lane's segment
// is, and how many items come before it.
struct Sm90Segments {
  int base = -32;  // segment of lane 0
  int items = 0;   // before lane 0's segment
  int num_seqs = 0;
  int query_start = 0, query_end = 0;  // rows
  int key_start = 0, key_end = 0;      // contiguous K rows
  int items_end = 0;  // up to and with this lane's, in the chunk

  __device__ __forceinline__ static int Tiles(int rows, int tile_rows) {
    return (rows + tile_rows - 1) / tile_rows;
  }

  // The next 32 segments; false past the last.
  __device__ __forceinline__ bool Advance(const Sm90Args& args, int tile_rows) {
    const int lane = threadIdx.x % 32;
    items += __shfl_sync(kFullWarp, items_end, 31);
    const int query_before = __shfl_sync(kFullWarp, query_end, 31);
    const int key_before = __shfl_sync(kFullWarp, key_end, 31);
    base += 32;
    if (base >= num_seqs + 2) return false;
    const int segment = base + lane;
    query_end = args.num_tokens;
    if (segment <= num_seqs) {
      query_end = min(max(args.cu_seqlens_q[segment], 0), args.num_tokens);
    }
    key_end = 0;
    if (args.cu_seqlens_k != nullptr && segment <= num_seqs) {
      key_end = min(max(args.cu_seqlens_k[segment], 0), args.num_kv_tokens);
    }
    // Starts and ends are running maxima, whatever the values.
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int query_other = __shfl_up_sync(kFullWarp, query_end, step);
      const int key_other = __shfl_up_sync(kFullWarp, key_end, step);
      if (lane >= step) {
        query_end = max(query_end, query_other);
        key_end = max(key_end, key_other);
      }
    }
    query_end = max(query_end, query_before);
    key_end = max(key_end, key_before);
    query_start = __shfl_up_sync(kFullWarp, query_end, 1);
    key_start = __shfl_up_sync(kFullWarp, key_end, 1);
    if (lane == 0) {
      query_start = query_before;
      key_start = key_before;
    }
    items_end =
        segment < num_seqs + 2
            ? Tiles((query_end - query_start) * args.group.value(), tile_rows) *
                  args.num_kv_heads
            : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, items_end, step);
      if (lane >= step) items_end += other;
    }
    return true;
  }
};

// Fills in what the KV tokens of sequence `item.seq` are; `keys` of them
// start at contiguous row `key_start`.
__device__ __forceinline__ void FindContext(const Sm90Args& args, int key_start,
                                            int keys, Sm90Item& item) {
  if (item.seq < 0) {
    item.context = item.kv_row = 0;
    return;
  }
  const int capacity = args.num_kv_tokens - key_start;
  int context = args.seqused_k == nullptr
                    ? keys
                    : min(max(args.seqused_k[item.seq], 0), capacity);
  int pad = 0;
  if (args.leftpad_k != nullptr) {
    pad = min(max(args.leftpad_k[item.seq], 0), context);
  }
  item.context = context - pad;
  item.kv_row = key_start + pad;
}

// Which KV tiles the item's rows see.
template <int kTokens>
__device__ __forceinline__ void FindTiles(const Sm90Args& args,
                                          Sm90Item& item) {
  const int first = item.shift + args.group.Divide(item.first_row);
  const int last =
      item.shift + args.group.Divide(item.first_row + item.num_rows - 1);
  int end = item.context;
  if (args.window_right >= 0) end = min(end, last + args.window_right + 1);
  int begin = 0;
  if (args.window_left >= 0) begin = max(0, first - args.window_left);
  item.tile_begin = begin / kTokens;
  item.tile_end = end > begin ? (end + kTokens - 1) / kTokens : item.tile_begin;
}

// Warp 0: takes the next item. All lanes return it.
template <typename Shape>
__device__ __forceinline__ Sm90Item NextItem(const Sm90Args& args,
                                             Sm90Segments& segments) {
  const int lane = threadIdx.x % 32;
  unsigned taken = 0;
  if (lane == 0) taken = atomicAdd(args.next_item, 1u);
  const int index = static_cast<int>(__shfl_sync(kFullWarp, taken, 0));
  Sm90Item item = {};
  while (true) {
    const int behind = __shfl_sync(kFullWarp, segments.items_end, 31);
    if (index - segments.items < behind) break;
    if (!segments.Advance(args, Shape::kRows)) {
      item.seq = -2;
      return item;
    }
  }
  const int local = index - segments.items;
  const unsigned later = __ballot_sync(kFullWarp, local < segments.items_end);
  const int owner = __ffs(later) - 1;
  const int end = __shfl_sync(kFullWarp, segments.items_end, owner);
  const int query_start = __shfl_sync(kFullWarp, segments.query_start, owner);
  const int query_end = __shfl_sync(kFullWarp, segments.query_end, owner);
  const int key_start = __shfl_sync(kFullWarp, segments.key_start, owner);
  const int key_end = __shfl_sync(kFullWarp, segments.key_end, owner);
  const int segment = segments.base + owner;
  const int rows = (query_end - query_start) * args.group.value();
  const int tiles = Sm90Segments::Tiles(rows, Shape::kRows);
  // Counted from the segment's end: the first item is its last tile.
  const int left = end - 1 - local;
  const int tile = left % tiles;
  item.seq = segment >= 1 && segment <= segments.num_seqs ? segment - 1 : -1;
  item.kv_head = args.num_kv_heads - 1 - left / tiles;
  item.first_token = query_start;
  item.first_row = tile * Shape::kRows;
  item.num_rows = min(rows - item.first_row, Shape::kRows);
  FindContext(args, key_start, key_end - key_start, item);
  item.shift = item.context - (query_end - query_start);
  FindTiles<Shape::kTokens>(args, item);
  return item;
}

// Where a lane's box of a tile is in the cache.
struct Sm90Box {
  int token;    // in the page
  int block;    // -1: outside the cache, reads zeros
  bool masked;  // tokens of the context in an invalid block
};

__device__ __forceinline__ Sm90Box FindBox(const Sm90Args& args,
                                           const Sm90Item& item, int token) {
  Sm90Box box = {0, -1, false};
  if (token >= item.context) return box;
  if (args.block_table == nullptr) {
    box.token = item.kv_row + token;
    box.block = 0;
    return box;
  }
  const int page = args.page_size.Divide(token);
  box.token = token - page * args.page_size.value();
  box.block = args.block_table[item.seq * args.max_blocks + page];
  if (static_cast<unsigned>(box.block) >=
      static_cast<unsigned>(args.num_blocks)) {
    box.block = -1;
    box.masked = true;
  }
  return box;
}

// Warp 0: copies a K or V tile of an item to shared memory. Lane i copies
// box i.
template <typename Shape>
__device__ __forceinline__ void CopyTile(const CUtensorMap* map,
                                         uint64_t* barrier, uint32_t target,
                                         const Sm90Args& args,
                                         const Sm90Item& item,
                                         const Sm90Box& box) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) ArriveExpecting(barrier, Shape::kTileBytes);
  if (lane * args.box_tokens < Shape::kTokens) {
    target += lane * (args.box_tokens / kAtomRows) * Shape::kBelow;
    const int head = item.kv_head * args.head_step;
    if constexpr (Shape::kAllPanels) {
      CopyBox(map, barrier, target, 0, 0, head, box.token / kAtomRows,
              box.block);
    } else {
#pragma unroll
      for (int panel = 0; panel < Shape::kPanels; ++panel) {
        CopyBox(map, barrier, target + panel * Shape::kBeside,
                panel * kPanelColumns, box.token, head, 0, box.block);
      }
    }
  }
  __syncwarp();
}

// Warp 0: zeros the rows from `row` on of a V tile.
template <typename Shape>
__device__ __forceinline__ void ClearRows(const Sm90Args& args, uint32_t tile,
                                          int row) {
  const int lane = threadIdx.x % 32;
  constexpr int kPieces = kPanelRowBytes / 16;
  for (int i = row * kPieces + lane; i < Shape::kTokens * kPieces; i += 32) {
    const uint32_t target = tile + i / (kAtomBytes / 16) * Shape::kBelow +
                            i % (kAtomBytes / 16) * 16;
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(
                       target + panel * Shape::kBeside),
                   "r"(0)
                   : "memory");
    }
  }
  FenceSharedForAsync();
  __syncwarp();
}

// Warps 1 to 3: copies the query tile. Rows past the end are zero.
template <typename T, typename Shape>
__device__ __forceinline__ void CopyQuery(const Sm90Args& args,
                                          const Sm90Item& item,
                                          uint32_t query) {
  constexpr int kPieces = Shape::kPanels * 8;  // of 16 bytes, of a row
  const int group = args.group.value();
  for (int i = threadIdx.x - 32; i < Shape::kRows * kPieces; i += 96) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const int packed = item.first_row + row;
    const int token = args.group.Divide(packed);
    const int64_t source_row =
        static_cast<int64_t>(item.first_token + token) * args.num_heads +
        item.kv_head * group + packed - token * group;
    const bool valid = row < item.num_rows && piece * 8 < args.head_dim;
    const T* source = static_cast<const T*>(args.query);
    CopyAsync(query + ((piece / 8) * Shape::kRows + row) * kPanelRowBytes +
                  ((piece % 8) ^ (row % 8)) * 16,
              valid ? source + source_row * args.head_dim + piece * 8 : source,
              valid);
  }
  CommitCopies();
  WaitForCopies();
  FenceSharedForAsync();
}

// What a consumer thread knows of its two rows.
struct Sm90Rows {
  int position[2];
  float slope[2];  // ALiBi, times log2(e)
};

// Turns scores into base-2 logits, where a factor is not enough.
template <int kSize>
__device__ __forceinline__ void TransformScores(const Sm90Args& args,
                                                const Sm90Rows& rows, int token,
                                                float (&scores)[kSize]) {
  const int column = token + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kSize / 4; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float x = scores[4 * n + j] * args.scale;
      if (args.soft_cap != 0.0f) x = SoftCap(x, args.soft_cap);
      const int distance = rows.position[j / 2] - (column + 8 * n + j % 2);
      scores[4 * n + j] =
          x - rows.slope[j / 2] * fabsf(static_cast<float>(distance));
    }
  }
}

// Sets scores of tokens that a row may not see to -inf. Bit b of `masked`:
// tokens 16 b .. 16 b + 15 of the tile lie in an invalid block.
template <int kSize>
__device__ __forceinline__ void MaskScores(const Sm90Args& args,
                                           const Sm90Rows& rows, int context,
                                           int token, unsigned masked,
                                           float (&scores)[kSize]) {
  const int column = token + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    int end = context;
    if (args.window_right >= 0) {
      end = min(end, rows.position[row] + args.window_right + 1);
    }
    int begin = 0;
    if (args.window_left >= 0) begin = rows.position[row] - args.window_left;
    end -= column;
    begin -= column;
#pragma unroll
    for (int n = 0; n < kSize / 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = 8 * n + j;
        const bool seen = c < end && c >= begin && !(masked >> (n / 2) & 1);
        if (!seen) scores[4 * n + 2 * row + j] = -CUDART_INF_F;
      }
    }
  }
}

// Replaces scores by weights exp2(factor * (score - maximum)); `rescale` is
// what the results so far have to be multiplied by.
template <int kSize>
__device__ __forceinline__ void UpdateWeights(float factor,
                                              float (&scores)[kSize],
                                              float (&max)[2], float (&sum)[2],
                                              float (&rescale)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float new_max = max[row];
#pragma unroll
    for (int n = 0; n < kSize / 4; ++n) {
      new_max = fmaxf(
          new_max, fmaxf(scores[4 * n + 2 * row], scores[4 * n + 2 * row + 1]));
    }
    new_max = fmaxf(new_max, __shfl_xor_sync(kFullWarp, new_max, 1));
    new_max = fmaxf(new_max, __shfl_xor_sync(kFullWarp, new_max, 2));
    const float shift = FiniteMax(new_max) * factor;
    rescale[row] = Exp2(max[row] * factor - shift);
    max[row] = new_max;
    float even = 0.0f;
    float odd = 0.0f;
#pragma unroll
    for (int n = 0; n < kSize / 4; ++n) {
      float& x = scores[4 * n + 2 * row];
      float& y = scores[4 * n + 2 * row + 1];
      x = Exp2(fmaf(x, factor, -shift));
      y = Exp2(fmaf(y, factor, -shift));
      even += x;
      odd += y;
    }
    sum[row] = sum[row] * rescale[row] + (even + odd);
  }
}

// Rounds weights to T, as operands of the product with V.
template <typename T, int kSize>
__device__ __forceinline__ void PackWeights(const float (&weights)[kSize],
                                            uint32_t (&packed)[kSize / 8][4]) {
#pragma unroll
  for (int k = 0; k < kSize / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed[k][i] =
          PackPair<T>(weights[8 * k + 2 * i], weights[8 * k + 2 * i + 1]);
    }
  }
}

// Starts scores = Q K^T of the warpgroup's rows.
template <typename T, typename Shape>
__device__ __forceinline__ void StartScores(
    uint32_t query, uint32_t key, float (&scores)[Shape::kTokens / 2]) {
  const uint64_t query_layout = OperandLayout(kAtomBytes, 16);
  const uint64_t key_layout = OperandLayout(Shape::kBelow, 16);
  FenceRegisters(scores);
  FenceProducts();
#pragma unroll
  for (int k = 0; k < Shape::kPanels * 4; ++k) {
    const int panel = k / 4;
    const int step = k % 4 * 32;  // 16 columns within the panel
    MultiplyShared<T>(
        scores,
        OperandAt(query_layout,
                  query + panel * Shape::kRows * kPanelRowBytes + step),
        OperandAt(key_layout, key + panel * Shape::kBeside + step), k > 0);
  }
  CommitProducts();
}

// Starts out += weights V.
template <typename T, typename Shape, int kOut>
__device__ __forceinline__ void StartOutput(
    const uint32_t (&weights)[Shape::kTokens / 16][4], uint32_t value,
    float (&out)[kOut]) {
  const uint64_t layout = OperandLayout(Shape::kBelow, Shape::kBeside);
  FenceRegisters(out);
  FenceProducts();
#pragma unroll
  for (int k = 0; k < Shape::kTokens / 16; ++k) {
    MultiplyRegisters<T>(out, weights[k],
                         OperandAt(layout, value + k * 2 * Shape::kBelow),
                         true);
  }
  CommitProducts();
}

// Transposes a 4x4 matrix of words over the four lanes of a quad: lane t
// begins with column t and ends with row t.
__device__ __forceinline__ void TransposeQuad(uint32_t (&m)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t mine = upper ? m[i] : m[i + step];
      const uint32_t other = __shfl_xor_sync(kFullWarp, mine, step);
      m[i] = upper ? other : m[i];
      m[i + step] = upper ? m[i + step] : other;
    }
  }
}

// Normalises and writes the warpgroup's rows, 16 bytes a lane.
template <typename T, int kOut>
__device__ __forceinline__ void StoreOutput(const Sm90Args& args,
                                            const Sm90Item& item, int first_row,
                                            float factor, const float (&max)[2],
                                            const float (&sum)[2],
                                            const float (&out)[kOut]) {
  const int lane = threadIdx.x % 32;
  const int group = args.group.value();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + 8 * i;
    const int packed_row = item.first_row + row;
    const int step = args.group.Divide(packed_row);
    const int head = item.kv_head * group + packed_row - step * group;
    const int token = item.first_token + step;
    const bool valid = row < item.num_rows;
    float total = sum[i];
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    const bool empty = max[i] == -CUDART_INF_F && !(total != total);
    float scale = 1.0f;
    float top = max[i] * factor;
    if (args.sinks != nullptr && !empty) {
      const float sink = args.sinks[valid ? head : 0] * kLog2E;
      const float new_top = fmaxf(top, sink);
      scale = Exp2(top - new_top);
      total = total * scale + Exp2(sink - new_top);
      top = new_top;
    }
    // A NaN sum has to reach the output.
    scale = empty ? 0.0f : scale / total;
    if (valid && lane % 4 == 0) {
      constexpr float kLn2 = 0.6931471805599453f;
      args.lse[static_cast<int64_t>(head) * args.num_tokens + token] =
          empty ? CUDART_INF_F : (top + log2f(total)) * kLn2;
    }
    T* target =
        static_cast<T*>(args.out) +
        (static_cast<int64_t>(token) * args.num_heads + head) * args.head_dim;
#pragma unroll
    for (int n = 0; n < kOut / 4; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int first = 4 * (n + j) + 2 * i;
        words[j] = PackPair<T>(empty ? 0.0f : out[first] * scale,
                               empty ? 0.0f : out[first + 1] * scale);
      }
      TransposeQuad(words);
      const int column = 8 * (n + lane % 4);
      if (valid && column < args.head_dim) {
        *reinterpret_cast<uint4*>(target + column) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// Writes the warpgroup's rows where none sees a token.
template <typename T, int kHeadDim>
__device__ __forceinline__ void StoreZeros(const Sm90Args& args,
                                           const Sm90Item& item,
                                           int first_row) {
  const int lane = threadIdx.x % 32;
  const int group = args.group.value();
  for (int row = first_row; row < min(first_row + 16, item.num_rows); ++row) {
    const int packed_row = item.first_row + row;
    const int step = args.group.Divide(packed_row);
    const int head = item.kv_head * group + packed_row - step * group;
    const int64_t token = item.first_token + step;
    if (lane == 0)
      args.lse[head * int64_t{args.num_tokens} + token] = CUDART_INF_F;
    if (lane * 8 < args.head_dim) {
      T* target = static_cast<T*>(args.out) +
                  (token * args.num_heads + head) * args.head_dim;
      *reinterpret_cast<uint4*>(target + lane * 8) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Consumer i takes its turn at the tensor cores after consumer i - 1, the
// first one after the last. Barrier 1 + i is consumer i's.
template <typename Shape>
__device__ __forceinline__ void WaitForTurn(int consumer) {
  if constexpr (Shape::kTurns) SyncNamed(1 + consumer, 256);
}

template <typename Shape>
__device__ __forceinline__ void PassTurn(int consumer) {
  if constexpr (Shape::kTurns) {
    ArriveNamed(1 + (consumer + 1) % Shape::kConsumers, 256);
  }
}

// Producer, warp 0.
template <typename Shape>
__device__ __forceinline__ void ProduceTiles(
    const CUtensorMap* key_map, const CUtensorMap* value_map,
    const Sm90Args& args, Sm90Barriers<Shape::kStages>& barriers,
    Sm90Item* items, unsigned* masks, uint32_t keys, uint32_t values) {
  constexpr int kStages = Shape::kStages;
  const int lane = threadIdx.x % 32;
  Sm90Segments segments;
  segments.num_seqs = args.num_seqs == nullptr
                          ? args.max_num_seqs
                          : min(max(*args.num_seqs, 0), args.max_num_seqs);
  Ring<2> slot;
  Ring<kStages> key_ring;
  Ring<kStages> value_ring;
  int tail_parity = 0;
  while (true) {
    const Sm90Item item = NextItem<Shape>(args, segments);
    Wait(&barriers.item_empty[slot.stage], slot.parity ^ 1);
    if (lane == 0) {
      items[slot.stage] = item;
      Arrive(&barriers.item_full[slot.stage]);
    }
    slot.Advance();
    if (item.seq == -2) return;

    // K runs one tile ahead of V.
    Sm90Box before = {};
    for (int tile = item.tile_end; tile >= item.tile_begin; --tile) {
      // Tile `tile` - 1 of K, then tile `tile` of V.
      Sm90Box box = {};
      if (tile > item.tile_begin) {
        const int first = (tile - 1) * Shape::kTokens;
        box = FindBox(args, item, first + lane * args.box_tokens);
        // A bit for each 16 tokens.
        const int bits = args.box_tokens / 16;
        const unsigned masked = __reduce_or_sync(
            kFullWarp, lane * args.box_tokens < Shape::kTokens && box.masked
                           ? ((1u << bits) - 1) << lane * bits
                           : 0u);
        Wait(&barriers.key_empty[key_ring.stage], key_ring.parity ^ 1);
        if (lane == 0) {
          masks[key_ring.stage] = masked;
          Arrive(&barriers.key_full[key_ring.stage]);
        }
        CopyTile<Shape>(key_map, &barriers.key_full[key_ring.stage],
                        keys + key_ring.stage * Shape::kTileBytes, args, item,
                        box);
        key_ring.Advance();
      }
      if (tile < item.tile_end) {
        const uint32_t target = values + value_ring.stage * Shape::kTileBytes;
        uint64_t* full = &barriers.value_full[value_ring.stage];
        Wait(&barriers.value_empty[value_ring.stage], value_ring.parity ^ 1);
        const int left = item.context - tile * Shape::kTokens;
        if (left < Shape::kTokens) {
          CopyTile<Shape>(value_map, &barriers.tail, target, args, item,
                          before);
          Wait(&barriers.tail, tail_parity);
          tail_parity ^= 1;
          ClearRows<Shape>(args, target, left);
          if (lane == 0) Arrive(full);
        } else {
          CopyTile<Shape>(value_map, full, target, args, item, before);
        }
        value_ring.Advance();
      }
      before = box;
    }
  }
}

// Producer, warps 1 to 3.
template <typename T, typename Shape>
__device__ __forceinline__ void ProduceQueries(
    const Sm90Args& args, Sm90Barriers<Shape::kStages>& barriers,
    const Sm90Item* items, uint32_t query) {
  Ring<2> slot;
  int parity = 1;
  while (true) {
    Wait(&barriers.item_full[slot.stage], slot.parity);
    const Sm90Item item = items[slot.stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) Arrive(&barriers.item_empty[slot.stage]);
    slot.Advance();
    if (item.seq == -2) return;
    if (item.tile_begin == item.tile_end) continue;
    Wait(&barriers.query_empty, parity);
    parity ^= 1;
    CopyQuery<T, Shape>(args, item, query);
    Arrive(&barriers.query_full);
  }
}

// A consumer warpgroup.
template <typename T, int kHeadDim, typename Shape>
__device__ __forceinline__ void Consume(const Sm90Args& args,
                                        Sm90Barriers<Shape::kStages>& barriers,
                                        const Sm90Item* items,
                                        const unsigned* masks, uint32_t query,
                                        uint32_t keys, uint32_t values) {
  constexpr int kStages = Shape::kStages;
  constexpr int kTokens = Shape::kTokens;
  const int consumer = threadIdx.x / 128 - 1;
  const int lane = threadIdx.x % 32;
  const int warp_row = consumer * 64 + threadIdx.x % 128 / 32 * 16;
  const bool elected = lane == 0;
  query += consumer * 64 * kPanelRowBytes;
  const float factor = args.transform ? 1.0f : args.scale;

  Ring<2> slot;
  Ring<kStages> key_ring;
  Ring<kStages> value_ring;
  int query_parity = 0;
  // The last consumer gives the first one its first turn.
  if (consumer == Shape::kConsumers - 1) PassTurn<Shape>(consumer);

  while (true) {
    Wait(&barriers.item_full[slot.stage], slot.parity);
    const Sm90Item item = items[slot.stage];
    __syncwarp();
    if (elected) Arrive(&barriers.item_empty[slot.stage]);
    slot.Advance();
    if (item.seq == -2) return;

    if (item.tile_begin == item.tile_end) {
      StoreZeros<T, kHeadDim>(args, item, warp_row);
      continue;
    }

    Sm90Rows rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int packed = item.first_row + warp_row + lane / 4 + 8 * i;
      const int step = args.group.Divide(packed);
      rows.position[i] = item.shift + step;
      rows.slope[i] = 0.0f;
      if (args.alibi_slopes != nullptr) {
        const int head = (item.kv_head - step) * args.group.value() + packed;
        rows.slope[i] =
            args.alibi_slopes[item.seq * args.alibi_seq_stride + head] * kLog2E;
      }
    }
    // Of the warpgroup's first and last row.
    const int first_position =
        item.shift + args.group.Divide(item.first_row + consumer * 64);
    const int last_position =
        item.shift + args.group.Divide(item.first_row + consumer * 64 + 63);

    float max[2] = {-CUDART_INF_F, -CUDART_INF_F};
    float sum[2] = {0.0f, 0.0f};
    float scores[kTokens / 2];
    float rescale[2];
    uint32_t weights[kTokens / 16][4];
    const auto to_weights = [&](int tile, unsigned masked) {
      const int token = tile * kTokens;
      if (args.transform) TransformScores(args, rows, token, scores);
      if (masked != 0 || token + kTokens > item.context ||
          (args.window_right >= 0 &&
           token + kTokens - 1 > first_position + args.window_right) ||
          (args.window_left >= 0 && token < last_position - args.window_left)) {
        MaskScores(args, rows, item.context, token, masked, scores);
      }
      UpdateWeights(factor, scores, max, sum, rescale);
    };
    // Waits for the K tile and starts its product.
    const auto start_scores = [&] {
      StartScores<T, Shape>(query, keys + key_ring.stage * Shape::kTileBytes,
                            scores);
    };
    const auto release_key = [&]() -> unsigned {
      const unsigned masked = masks[key_ring.stage];
      __syncwarp();
      if (elected) Arrive(&barriers.key_empty[key_ring.stage]);
      key_ring.Advance();
      return masked;
    };

    Wait(&barriers.query_full, query_parity);
    query_parity ^= 1;
    float out[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
    Wait(&barriers.key_full[key_ring.stage], key_ring.parity);
    start_scores();
    WaitForProducts<0>();
    FenceRegisters(scores);
    to_weights(item.tile_end - 1, release_key());
    PackWeights<T>(scores, weights);

#pragma unroll 1
    for (int tile = item.tile_end - 2; tile >= item.tile_begin; --tile) {
      Wait(&barriers.key_full[key_ring.stage], key_ring.parity);
      WaitForTurn<Shape>(consumer);
      start_scores();
      Wait(&barriers.value_full[value_ring.stage], value_ring.parity);
      StartOutput<T, Shape>(weights,
                            values + value_ring.stage * Shape::kTileBytes, out);
      PassTurn<Shape>(consumer);
      WaitForProducts<1>();
      FenceRegisters(scores);
      to_weights(tile, release_key());
      WaitForProducts<0>();
      FenceRegisters(out);
      if (elected) Arrive(&barriers.value_empty[value_ring.stage]);
      value_ring.Advance();
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[4 * n + j] *= rescale[j / 2];
      }
      PackWeights<T>(scores, weights);
    }
    if (elected) Arrive(&barriers.query_empty);
    Wait(&barriers.value_full[value_ring.stage], value_ring.parity);
    StartOutput<T, Shape>(weights,
                          values + value_ring.stage * Shape::kTileBytes, out);
    WaitForProducts<0>();
    FenceRegisters(out);
    if (elected) Arrive(&barriers.value_empty[value_ring.stage]);
    value_ring.Advance();
    StoreOutput<T>(args, item, warp_row, factor, max, sum, out);
  }
}

#endif  // XLA_OPS_HAS_WGMMA

template <typename T, int kHeadDim, bool kAllPanels>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim, kAllPanels>::kThreads, 1)
    AttentionSm90Kernel(const __grid_constant__ CUtensorMap key_map,
                        const __grid_constant__ CUtensorMap value_map,
                        const __grid_constant__ Sm90Args args) {
#if XLA_OPS_HAS_WGMMA
  using Shape = Sm90Shape<kHeadDim, kAllPanels>;
  constexpr int kStages = Shape::kStages;
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ Sm90Barriers<kStages> barriers;
  __shared__ Sm90Item items[2];
  __shared__ unsigned masks[kStages];
  const uint32_t query = (SharedAddress(dynamic_shared) + 1023) & ~1023u;
  const uint32_t keys = query + Shape::kQueryBytes;
  const uint32_t values = keys + kStages * Shape::kTileBytes;

  if (threadIdx.x == 0) {
    // Warps arrive, by one lane, but for the query's copies.
    constexpr int kConsumerWarps = 4 * Shape::kConsumers;
    for (int i = 0; i < 2; ++i) {
      InitBarrier(&barriers.item_full[i], 1);
      InitBarrier(&barriers.item_empty[i], 3 + kConsumerWarps);
    }
    InitBarrier(&barriers.query_full, 96);
    InitBarrier(&barriers.query_empty, kConsumerWarps);
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&barriers.key_full[i], 2);  // the mask's, and the copies'
      InitBarrier(&barriers.key_empty[i], kConsumerWarps);
      InitBarrier(&barriers.value_full[i], 1);
      InitBarrier(&barriers.value_empty[i], kConsumerWarps);
    }
    InitBarrier(&barriers.tail, 1);
    FenceBarrierInit();
    PrefetchMap(&key_map);
    PrefetchMap(&value_map);
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    GiveRegisters<Shape::kProducerRegisters>();
    if (threadIdx.x < 32) {
      ProduceTiles<Shape>(&key_map, &value_map, args, barriers, items, masks,
                          keys, values);
    } else {
      ProduceQueries<T, Shape>(args, barriers, items, query);
    }
  } else {
    TakeRegisters<Shape::kConsumerRegisters>();
    Consume<T, kHeadDim, Shape>(args, barriers, items, masks, query, keys,
                                values);
  }
#endif  // XLA_OPS_HAS_WGMMA
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_CUH_
