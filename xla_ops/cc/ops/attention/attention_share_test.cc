// Tests how decode's work is shared out, with the sums of the sequences before
// made one after the other here.

#include "xla_ops/cc/ops/attention/attention_share.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

constexpr int kTileTokens = 64;

struct Batch {
  std::vector<ShareNeed> needs;
  int slots;

  int Chunk() const {
    int64_t total = 0;
    for (const ShareNeed& need : needs) {
      total += int64_t{need.tiles} * need.kv_tiles;
    }
    return ShareChunk(total, slots);
  }

  int Pieces(const ShareNeed& need) const {
    return PiecesOf(need.kv_tiles, kTileTokens, Chunk());
  }

  // Items of the first `count` sequences.
  ShareSums Before(size_t count) const {
    ShareSums sums = {0, 0};
    for (size_t i = 0; i < count; ++i) {
      const ShareSums items = ItemsOf(needs[i], Pieces(needs[i]));
      sums.cut += items.cut;
      sums.whole += items.whole;
    }
    return sums;
  }
};

Batch Sequences(const std::vector<int>& kv_tiles, int slots) {
  Batch batch = {{}, slots};
  for (const int tiles : kv_tiles) batch.needs.push_back({1, tiles});
  return batch;
}

// Every piece of every query tile is some item's, and no other's.
void ExpectAllOnce(const Batch& batch) {
  const ShareSums all = batch.Before(batch.needs.size());
  EXPECT_TRUE(all.cut <= std::max(0, batch.slots));
  std::vector<std::vector<int>> seen;
  for (const ShareNeed& need : batch.needs) {
    seen.emplace_back(static_cast<size_t>(need.tiles) * batch.Pieces(need));
  }
  std::vector<int> slots(all.cut);
  for (int index = 0; index < all.cut + all.whole + 3; ++index) {
    int takers = 0;
    for (size_t i = 0; i < batch.needs.size(); ++i) {
      const ShareNeed& need = batch.needs[i];
      const ShareSums before = batch.Before(i);
      const int pieces = batch.Pieces(need);
      ShareItem item;
      if (!TakeItem(index, all, before, need, pieces, &item)) continue;
      ++takers;
      EXPECT_EQ(item.pieces, pieces);
      if (pieces > 1) {
        ++slots[item.slot];
        EXPECT_EQ(item.slot, index);
      } else {
        EXPECT_EQ(item.slot, -1);
      }
      ++seen[i][item.tile * pieces + item.piece];
    }
    EXPECT_EQ(takers, index < all.cut + all.whole ? 1 : 0);
  }
  for (const auto& pieces : seen) {
    EXPECT_TRUE(std::all_of(pieces.begin(), pieces.end(),
                            [](int count) { return count == 1; }));
  }
  EXPECT_TRUE(std::all_of(slots.begin(), slots.end(),
                          [](int count) { return count == 1; }));
}

// No piece of a long sequence has twice the chunk, unless there would be more
// of them than may be, and none is shorter than the chunk.
void ExpectBalanced(const Batch& batch) {
  const int64_t chunk = batch.Chunk();
  for (const ShareNeed& need : batch.needs) {
    const int pieces = batch.Pieces(need);
    if (need.kv_tiles * kTileTokens <= kShareLongTokens) {
      EXPECT_EQ(pieces, 1);
    } else {
      EXPECT_TRUE(need.kv_tiles / pieces < 2 * chunk ||
                  pieces == MostPieces(need.kv_tiles * kTileTokens));
    }
    EXPECT_TRUE(pieces == 1 || need.kv_tiles / pieces >= chunk);
  }
}

XLA_OPS_TEST(EveryPieceIsSomeItemsAndNoOthers) {
  std::mt19937 random(1);
  const auto draw = [&](int below) {
    return static_cast<int>(random() % below);
  };
  for (int i = 0; i < 200; ++i) {
    Batch batch = {{}, draw(4) == 0 ? draw(3) : draw(70)};
    const int count = 1 + draw(20);
    for (int s = 0; s < count; ++s) {
      const int longest = draw(5) == 0 ? 400 : 20;
      batch.needs.push_back({draw(4) == 0 ? draw(4) : 1, draw(longest)});
    }
    ExpectAllOnce(batch);
    ExpectBalanced(batch);
  }
}

XLA_OPS_TEST(EqualSequencesStayWhole) {
  for (const int kv_tiles : {1, 16, 65, 512}) {
    const Batch batch = Sequences(std::vector<int>(64, kv_tiles), 64);
    EXPECT_EQ(batch.Pieces(batch.needs[0]), 1);
  }
  // Unless they are few.
  EXPECT_EQ(Sequences(std::vector<int>(8, 80), 64).Pieces({1, 80}), 8);
  EXPECT_EQ(Sequences(std::vector<int>(32, 80), 64).Pieces({1, 80}), 2);
  EXPECT_EQ(Sequences(std::vector<int>(33, 80), 64).Pieces({1, 80}), 1);
  EXPECT_EQ(Sequences({512}, 64).Pieces({1, 512}), 64);
}

XLA_OPS_TEST(ShortSequencesStayWhole) {
  EXPECT_EQ(Sequences({64}, 64).Pieces({1, 64}), 1);
  EXPECT_EQ(Sequences({65}, 64).Pieces({1, 65}), 32);
  EXPECT_EQ(PiecesOf(32, 128, 1), 1);
  EXPECT_EQ(PiecesOf(33, 128, 1), 32);
}

XLA_OPS_TEST(OneLongSequenceIsCutAmongShortOnes) {
  std::vector<int> kv_tiles(64, 16);
  kv_tiles[40] = 512;
  const Batch batch = Sequences(kv_tiles, 64);
  EXPECT_EQ(batch.Chunk(), 24);
  const int pieces = batch.Pieces({1, 512});
  EXPECT_EQ(pieces, 21);
  EXPECT_EQ(batch.Pieces({1, 16}), 1);
  // Its pieces come first.
  ShareItem item;
  const ShareSums all = batch.Before(64);
  EXPECT_TRUE(
      TakeItem(0, all, batch.Before(40), batch.needs[40], pieces, &item));
  EXPECT_TRUE(TakeItem(pieces, all, batch.Before(0), batch.needs[0], 1, &item));
  ExpectAllOnce(batch);
}

XLA_OPS_TEST(WithoutSlotsNothingIsCut) {
  for (const int slots : {0, 1}) {
    const Batch batch = Sequences({1000, 1}, slots);
    EXPECT_EQ(batch.Pieces({1, 1000}), 1);
    ExpectAllOnce(batch);
  }
}

XLA_OPS_TEST(PiecesGrowAsTheRootOfTheLength) {
  EXPECT_EQ(MostPieces(0), 1);
  EXPECT_EQ(MostPieces(15), 1);
  EXPECT_EQ(MostPieces(1024), 16);
  EXPECT_EQ(MostPieces(4096), 32);
  EXPECT_EQ(MostPieces(16384), 64);
  EXPECT_EQ(MostPieces(32768), 64);
  EXPECT_EQ(MostPieces(65536), 128);
  EXPECT_EQ(MostPieces(UINT32_MAX), 2 << 13);
  EXPECT_EQ(PiecesOf(512, 64, 1), 64);
  EXPECT_EQ(PiecesOf(512, 64, 16), 32);
}

XLA_OPS_TEST(SumsMayBeLarge) {
  EXPECT_EQ(ShareChunk(0, 64), 1);
  EXPECT_EQ(ShareChunk(1520, 64), 24);
  EXPECT_EQ(ShareChunk(1536, 64), 24);
  EXPECT_EQ(ShareChunk(INT32_MAX - 64, 64), 33554431);
  // Nothing is cut beyond.
  EXPECT_EQ(ShareChunk(INT32_MAX, 64), INT32_MAX);
  EXPECT_EQ(ShareChunk(int64_t{1} << 60, 64), INT32_MAX);
  EXPECT_EQ(PiecesOf(INT32_MAX / kTileTokens, kTileTokens, INT32_MAX), 1);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
