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

  ShareLoads Loads() const {
    ShareLoads loads = {0, 0};
    for (const ShareNeed& need : needs) loads.all += LoadOf(need);
    const int long_tiles = LongTiles(loads.all, slots, kTileTokens);
    for (const ShareNeed& need : needs) {
      if (need.kv_tiles > long_tiles) loads.cut += LoadOf(need);
    }
    return loads;
  }

  ShareRules Rules() const {
    const ShareLoads loads = Loads();
    const int long_tiles = LongTiles(loads.all, slots, kTileTokens);
    int others = 0;
    for (const ShareNeed& need : needs) {
      if (need.kv_tiles <= long_tiles) others += need.tiles;
    }
    return {long_tiles, ShareChunk(loads, others, slots), kTileTokens};
  }

  int Pieces(const ShareNeed& need) const {
    return Rules().Pieces(need.kv_tiles);
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

  bool IsPiecesFirst() const {
    return PiecesFirst(Loads(), Rules().chunk, Before(needs.size()).whole);
  }

  bool Take(int index, size_t sequence, ShareItem* item) const {
    return TakeItem(index, IsPiecesFirst(), Before(needs.size()),
                    Before(sequence), needs[sequence], Pieces(needs[sequence]),
                    item);
  }
};

Batch Sequences(const std::vector<int>& kv_tiles, int slots) {
  Batch batch = {{}, slots};
  for (const int tiles : kv_tiles) batch.needs.push_back({1, tiles});
  return batch;
}

bool AllOnce(const std::vector<int>& counts) {
  return std::all_of(counts.begin(), counts.end(),
                     [](int count) { return count == 1; });
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
  const int first_slot = batch.IsPiecesFirst() ? 0 : all.whole;
  for (int index = 0; index < all.cut + all.whole + 3; ++index) {
    int takers = 0;
    for (size_t i = 0; i < batch.needs.size(); ++i) {
      ShareItem item;
      if (!batch.Take(index, i, &item)) continue;
      ++takers;
      const int pieces = batch.Pieces(batch.needs[i]);
      EXPECT_EQ(item.pieces, pieces);
      if (pieces > 1) {
        ++slots[item.slot];
        // So the kernel that combines them finds a slot's item.
        EXPECT_EQ(item.slot, index - first_slot);
      } else {
        EXPECT_EQ(item.slot, -1);
      }
      ++seen[i][item.tile * pieces + item.piece];
    }
    EXPECT_EQ(takers, index < all.cut + all.whole ? 1 : 0);
  }
  for (const auto& pieces : seen) EXPECT_TRUE(AllOnce(pieces));
  EXPECT_TRUE(AllOnce(slots));
}

// Long sequences' pieces are as short as the slots allow, unless there would be
// more of them than may be.
void ExpectBalanced(const Batch& batch) {
  const ShareRules rules = batch.Rules();
  EXPECT_TRUE(rules.long_tiles >= kShareLongTokens / kTileTokens);
  for (const ShareNeed& need : batch.needs) {
    const int pieces = rules.Pieces(need.kv_tiles);
    if (need.kv_tiles <= rules.long_tiles) {
      EXPECT_EQ(pieces, 1);
    } else {
      EXPECT_TRUE(need.kv_tiles / pieces < 2 * int64_t{rules.chunk} ||
                  pieces == MostPieces(need.kv_tiles * kTileTokens));
    }
    EXPECT_TRUE(pieces == 1 || need.kv_tiles / pieces >= rules.chunk);
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
    for (const int count : {33, 48, 64, 200}) {
      const Batch batch = Sequences(std::vector<int>(count, kv_tiles), 64);
      EXPECT_EQ(batch.Pieces(batch.needs[0]), 1);
    }
  }
  // Unless they are few.
  EXPECT_EQ(Sequences(std::vector<int>(8, 80), 64).Pieces({1, 80}), 8);
  EXPECT_EQ(Sequences(std::vector<int>(32, 80), 64).Pieces({1, 80}), 2);
  EXPECT_EQ(Sequences({512}, 64).Pieces({1, 512}), 64);
}

XLA_OPS_TEST(ShortSequencesStayWhole) {
  EXPECT_EQ(Sequences({64}, 64).Pieces({1, 64}), 1);
  EXPECT_EQ(Sequences({65}, 64).Pieces({1, 65}), 32);
  EXPECT_EQ(LongTiles(0, 64, 64), 64);
  EXPECT_EQ(LongTiles(0, 64, 128), 32);
}

XLA_OPS_TEST(NoPieceIsSmallerThanWhatStaysWhole) {
  std::vector<int> kv_tiles(64, 16);
  kv_tiles[40] = 512;
  const Batch batch = Sequences(kv_tiles, 48);
  EXPECT_EQ(batch.Rules().chunk, 32);  // not 11, by the long one alone
  EXPECT_EQ(batch.Pieces({1, 512}), 16);
  EXPECT_EQ(batch.Pieces({1, 16}), 1);
  ShareItem item;
  EXPECT_TRUE(batch.Take(0, 40, &item));
  EXPECT_EQ(item.slot, 0);
  EXPECT_TRUE(batch.Take(16, 0, &item));
  ExpectAllOnce(batch);
  // Where the others are as short as its pieces there are as many as may be.
  std::fill(kv_tiles.begin(), kv_tiles.end(), 1);
  kv_tiles[40] = 512;
  EXPECT_EQ(Sequences(kv_tiles, 48).Pieces({1, 512}), 46);
}

XLA_OPS_TEST(LargePiecesComeFirst) {
  std::vector<int> kv_tiles(64, 16);
  std::fill(kv_tiles.begin() + 40, kv_tiles.end(), 128);
  const Batch batch = Sequences(kv_tiles, 64);
  EXPECT_EQ(batch.Pieces({1, 128}), 2);
  ShareItem item;
  EXPECT_TRUE(batch.Take(0, 40, &item));
  EXPECT_TRUE(batch.Take(48, 0, &item));
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
  EXPECT_EQ(Sequences({128}, 384).Pieces({1, 128}), 32);
}

XLA_OPS_TEST(SumsMayBeLarge) {
  EXPECT_EQ(LongTiles(1 << 28, 64, 64), (1 << 28) / 48);
  EXPECT_EQ(ShareChunk({0, 0}, 0, 64), 1);
  EXPECT_EQ(ShareChunk({1520, 1520}, 0, 64), 24);
  EXPECT_EQ(ShareChunk({1536, 1536}, 0, 64), 24);
  EXPECT_EQ(ShareChunk({INT32_MAX - 64, INT32_MAX - 64}, 0, 64), 33554431);
  // Nothing is cut beyond.
  EXPECT_EQ(LongTiles(int64_t{1} << 60, 64, 64), INT32_MAX);
  EXPECT_EQ(ShareChunk({INT32_MAX, 0}, 1, 64), INT32_MAX);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
