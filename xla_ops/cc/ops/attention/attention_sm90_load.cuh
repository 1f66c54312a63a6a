// The producer of the Hopper attention kernel (attention_sm90.cuh): copies of
// K and V tiles, from rows or pages, and of query tiles to shared memory.
//
// Boxes. A K or V tile is copied as boxes of `box_tokens` tokens, each at a
// place of its own; a box outside the cache is zero. Contiguous K and V are
// one page, and a tile one box a panel (64 columns). Where pages allow it a
// box holds all panels of its tokens, for small boxes cost the copy engine as
// much time as large ones. Tokens behind the context are zeroed where V would
// otherwise bring its NaN into 0 * V.

#ifndef XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_LOAD_CUH_
#define XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_LOAD_CUH_

#include <cuda.h>

#include <cstdint>

#include "xla_ops/cc/device/mma.cuh"
#include "xla_ops/cc/device/tma.cuh"
#include "xla_ops/cc/device/wgmma.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_scheduler.cuh"
#include "xla_ops/cc/ops/attention/attention_sm90_shape.cuh"
#include "xla_ops/cc/ops/attention/attention_tiles.cuh"

namespace xla_ops {

#if XLA_OPS_HAS_WGMMA

// Where a lane's box of a tile is in the cache.
struct Sm90Box {
  int token;    // in the page
  int block;    // -1: outside the cache, reads zeros
  bool masked;  // tokens of the context in an invalid block
};

__device__ __forceinline__ Sm90Box FindBox(const AttentionArgs& args,
                                           const Sm90Item& item, int token) {
  Sm90Box box = {0, -1, false};
  if (token >= item.rows.kv_len) return box;
  if (!args.paged) {
    box.token = item.rows.kv_start + token;
    box.block = 0;
    return box;
  }
  const int page = args.page_size.Divide(token);
  box.token = token - page * args.page_size.value();
  box.block = args.block_table[item.rows.seq * args.max_blocks + page];
  if (static_cast<uint32_t>(box.block) >= args.num_blocks) {
    box.block = -1;
    box.masked = true;
  }
  return box;
}

// Warp 0: whether some of an item's tokens lie in invalid blocks.
template <typename Shape>
__device__ __forceinline__ bool HasInvalidBlock(const AttentionArgs& args,
                                                const Sm90Item& item) {
  if (!args.paged || item.tile_begin >= item.tile_end) return false;
  const int end = min(item.tile_end * Shape::kTokens, item.rows.kv_len);
  const int last = args.page_size.Divide(end - 1);
  const int* table = args.block_table + item.rows.seq * args.max_blocks;
  bool invalid = false;
#pragma unroll 4
  for (int page = args.page_size.Divide(item.tile_begin * Shape::kTokens) +
                  static_cast<int>(threadIdx.x % 32);
       page <= last; page += 32) {
    invalid |= static_cast<uint32_t>(table[page]) >= args.num_blocks;
  }
  return __any_sync(kFullWarp, invalid);
}

// Warp 0: copies a K or V tile of an item to shared memory. Lane i copies
// box i.
template <typename Shape>
__device__ __forceinline__ void CopyTile(const CUtensorMap* map,
                                         const Sm90Maps& maps, uint32_t barrier,
                                         uint32_t target, const Sm90Item& item,
                                         const Sm90Box& box) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) ArriveExpecting(barrier, Shape::kTileBytes);
  if (lane * maps.box_tokens < Shape::kTokens) {
    target += lane * (maps.box_tokens / kAtomRows) * Shape::kAtomStride;
    const int head = item.kv_head * maps.head_step;
    if constexpr (Shape::kAllPanels) {
      CopyBox(map, barrier, target, 0, 0, head, box.token / kAtomRows,
              box.block);
    } else {
#pragma unroll
      for (int panel = 0; panel < Shape::kPanels; ++panel) {
        CopyBox(map, barrier, target + panel * Shape::kPanelStride,
                panel * kPanelColumns, box.token, head, 0, box.block);
      }
    }
  }
  __syncwarp();
}

// Warp 0: zeros the rows from `row` on of a V tile.
template <typename Shape>
__device__ __forceinline__ void ClearRows(uint32_t tile, int row) {
  const int lane = threadIdx.x % 32;
  constexpr int kPieces = kPanelRowBytes / 16;
  for (int i = row * kPieces + lane; i < Shape::kTokens * kPieces; i += 32) {
    const uint32_t target = tile + i / (kAtomBytes / 16) * Shape::kAtomStride +
                            i % (kAtomBytes / 16) * 16;
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(
                       target + panel * Shape::kPanelStride),
                   "r"(0)
                   : "memory");
    }
  }
  FenceSharedForAsync();
  __syncwarp();
}

// Warps 1 to 3: copies the query tile. Rows past the end are zero.
template <typename T, typename Shape>
__device__ __forceinline__ void CopyQuery(const AttentionArgs& args,
                                          const Sm90Item& item,
                                          uint32_t query) {
  constexpr int kPieces = Shape::kPanels * 8;  // of 16 bytes, of a row
  const T* source = static_cast<const T*>(args.query);
  for (int i = threadIdx.x - 32; i < Shape::kRows * kPieces; i += 96) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const int64_t source_row =
        item.rows.Row(args, item.kv_head, row).Index(args);
    const bool valid = row < item.rows.num_rows && piece * 8 < args.head_dim;
    CopyAsync(query + ((piece / 8) * Shape::kRows + row) * kPanelRowBytes +
                  ((piece % 8) ^ (row % 8)) * 16,
              valid ? source + source_row * args.head_dim + piece * 8 : source,
              valid);
  }
  CommitCopies();
  WaitForCopies();
  FenceSharedForAsync();
}

// Producer, warp 0: takes items, and copies their K and V tiles.
template <typename Shape>
__device__ __forceinline__ void LoadKeysAndValues(
    const Sm90Maps& maps, const AttentionArgs& args,
    const Sm90Barriers<Shape::kStages>& barriers, Sm90Item* items,
    unsigned* masks, uint32_t keys, uint32_t values) {
  constexpr int kStages = Shape::kStages;
  const int lane = threadIdx.x % 32;
  Sm90Segments segments;
  segments.num_seqs = NumSeqs(args);
  Ring<2> slot;
  Ring<kStages> key_ring;
  Ring<kStages> value_ring;
  int tail_parity = 0;
  while (true) {
    Sm90Item item = NextItem<Shape>(args, segments);
    if (item.rows.seq >= 0) item.masked = HasInvalidBlock<Shape>(args, item);
    Wait(barriers.item_empty(slot.stage), slot.parity ^ 1);
    if (lane == 0) {
      items[slot.stage] = item;
      Arrive(barriers.item_full(slot.stage));
    }
    slot.Advance();
    if (item.rows.seq == Sm90Item::kNoMore) return;

    // K runs one tile ahead of V.
    Sm90Box before = {};
    for (int tile = item.tile_end; tile >= item.tile_begin; --tile) {
      // Tile `tile` - 1 of K, then tile `tile` of V.
      Sm90Box box = {};
      if (tile > item.tile_begin) {
        const int first = (tile - 1) * Shape::kTokens;
        box = FindBox(args, item, first + lane * maps.box_tokens);
        Wait(barriers.key_empty(key_ring.stage), key_ring.parity ^ 1);
        if (item.masked) {
          // A bit for each 16 tokens. It arrives with the copies.
          const int bits = maps.box_tokens / 16;
          const unsigned masked = __reduce_or_sync(
              kFullWarp, lane * maps.box_tokens < Shape::kTokens && box.masked
                             ? ((1u << bits) - 1) << lane * bits
                             : 0u);
          if (lane == 0) masks[key_ring.stage] = masked;
        }
        CopyTile<Shape>(&maps.key, maps, barriers.key_full(key_ring.stage),
                        keys + key_ring.stage * Shape::kTileBytes, item, box);
        key_ring.Advance();
      }
      if (tile < item.tile_end) {
        const uint32_t target = values + value_ring.stage * Shape::kTileBytes;
        const uint32_t full = barriers.value_full(value_ring.stage);
        Wait(barriers.value_empty(value_ring.stage), value_ring.parity ^ 1);
        const int left = item.rows.kv_len - tile * Shape::kTokens;
        if (left < Shape::kTokens) {
          CopyTile<Shape>(&maps.value, maps, barriers.value_tail(), target,
                          item, before);
          Wait(barriers.value_tail(), tail_parity);
          tail_parity ^= 1;
          ClearRows<Shape>(target, left);
          if (lane == 0) Arrive(full);
        } else {
          CopyTile<Shape>(&maps.value, maps, full, target, item, before);
        }
        value_ring.Advance();
      }
      before = box;
    }
  }
}

// Producer, warps 1 to 3: copy the query tiles. One lane does where the copy
// engine takes them: rows past the segment's end are then other rows, whose
// results nobody stores.
template <typename T, typename Shape>
__device__ __forceinline__ void LoadQueries(
    const Sm90Maps& maps, const AttentionArgs& args,
    const Sm90Barriers<Shape::kStages>& barriers, const Sm90Item* items,
    uint32_t query) {
  Ring<2> slot;
  bool first = true;
  while (true) {
    Wait(barriers.item_full(slot.stage), slot.parity);
    const Sm90Item item = items[slot.stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) Arrive(barriers.item_empty(slot.stage));
    slot.Advance();
    if (item.rows.seq == Sm90Item::kNoMore) return;
    if (item.tile_begin == item.tile_end) continue;
    // Not by a barrier that is asked again and again: the wait lasts for most
    // of an item, and asking takes the consumers' turns to issue.
    if (!first) {
      SyncNamed(Shape::kQueryEmptyBarrier, Shape::kQueryEmptyThreads);
    }
    first = false;
    if (maps.query_tokens == 0) {
      CopyQuery<T, Shape>(args, item, query);
      Arrive(barriers.query_full());
    } else if (threadIdx.x == 32) {
      ArriveExpecting(barriers.query_full(), Shape::kQueryBytes);
#pragma unroll
      for (int panel = 0; panel < Shape::kPanels; ++panel) {
        CopyBox(&maps.query, barriers.query_full(),
                query + panel * Shape::kRows * kPanelRowBytes,
                panel * kPanelColumns, item.kv_head * args.group.value(),
                item.rows.token, 0, 0);
      }
    }
  }
}

#endif  // XLA_OPS_HAS_WGMMA

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_ATTENTION_ATTENTION_SM90_LOAD_CUH_
