// The pieces of the Hopper attention kernel (attention_sm90.cuh) that work on
// one tile: copies to shared memory, products, masks, the online softmax, and
// the rows' results.
//
// Boxes. A K or V tile is copied as boxes of `box_tokens` tokens, each at a
// place of its own; a box outside the cache is zero. Contiguous K and V are
// one page, and a tile one box a panel (64 columns). Where pages allow it a
// box holds all panels of its tokens, for small boxes cost the copy engine as
// much time as large ones. Tokens behind the context are zeroed where V would
// otherwise bring its NaN into 0 * V.
//
// Accumulators are as in xla_ops/cc/device/wgmma.cuh: a thread has two rows of
// a warp's sixteen, which it shares with the other three lanes of its quad.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_TILE_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_TILE_CUH_

#include <cuda.h>
#include <math_constants.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/reduce.cuh"
#include "xla_ops/cc/device/softmax.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_items.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

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

// Normalises and writes a warp's 16 rows from `first_row` on, 16 bytes a lane.
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

// Writes a warp's 16 rows from `first_row` on where none sees a token.
template <typename T>
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

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_TILE_CUH_
