// Properties of the Stream-K decomposition over random batches and the SM counts of many GPUs: the ranges are balanced,
// and every key tile is in exactly one. The kernels' use of it is covered by the other tests.
#include "forward/scheduler/stream_k.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <vector>

namespace flashspark::emulator {
namespace {

struct Batch {
  std::vector<int32_t> tiles;  // key tiles (positions) of each row tile
  int32_t total = 0;
  int32_t of_each = 0;  // key tiles per row tile if all have the same number, else 0
};

Batch draw(std::mt19937 &random) {
  const auto below = [&random](uint32_t n) { return static_cast<int32_t>(random() % n); };
  Batch batch;
  const int32_t seqs = 1 + below(1u << below(9)), units = 1 + below(1u << below(4));
  const int32_t longest = 1 + below(1u << (1 + below(12))), kind = below(4);
  for (int32_t seq = 0; seq < seqs; ++seq) {
    int32_t tiles = 1 + below(static_cast<uint32_t>(longest));
    if (kind == 0) tiles = longest;                 // all alike
    if (kind == 1) tiles = seq == 0 ? longest : 1;  // one long sequence among short ones
    for (int32_t unit = 0; unit < units; ++unit) batch.tiles.push_back(tiles);
  }
  for (const int32_t tiles : batch.tiles) batch.total += tiles;
  const bool alike = std::count(batch.tiles.begin(), batch.tiles.end(), batch.tiles[0]) == std::ssize(batch.tiles);
  batch.of_each = alike ? batch.tiles[0] : 0;
  return batch;
}

// The ranges are contiguous, cover all positions and have even lengths.
void check_ranges(const Batch &batch, const Decomposition &all, const StreamKLimits &limits) {
  ASSERT_EQ(all.total, batch.total + all.tile_start_cost * static_cast<int32_t>(batch.tiles.size()));
  const int32_t most = batch.total < limits.small_problem_tiles ? limits.small_problem_ctas : limits.ctas;
  int32_t longest = 0, used = 0;
  for (int32_t at = 0; at < all.total; ++used) {
    const auto [begin, end] = all.contiguous_range(used);
    ASSERT_EQ(begin, at);
    ASSERT_LT(begin, end);
    ASSERT_EQ(all.cta_of(begin), used);
    ASSERT_EQ(all.cta_of(end - 1), used);
    longest = std::max(longest, end - begin);
    at = end;
  }
  ASSERT_LE(used, most);
  for (int32_t range = used; range < limits.ctas; ++range)
    ASSERT_TRUE(is_empty(all.contiguous_range(range))) << range;  // CTAs without work
  const int32_t wanted = std::min(most, std::max(1, batch.total >> limits.min_tiles_shift));
  const double perfect = static_cast<double>(all.total) / wanted;
  ASSERT_LE(longest, perfect * 1.05 + 1);  // rounding to whole positions
}

// Decomposition into whole row tiles: every tile is in exactly one range, and CTAs beyond the last range are idle.
void check_whole_tiles(const Batch &batch, const Decomposition &all, const StreamKLimits &limits) {
  const auto units = static_cast<int32_t>(batch.tiles.size());
  ASSERT_EQ(all.tile_positions, batch.of_each);
  ASSERT_EQ(all.stride % all.tile_positions, 0);
  std::vector<int32_t> taken(batch.tiles.size());
  for (int32_t range = 0; range < limits.ctas; ++range) {
    const auto [begin, end] = all.range_of(range);
    int32_t count = 0;
    for (int32_t at = begin; at < end; at += all.stride, ++count) {
      ASSERT_EQ(at % all.tile_positions, 0);
      ++taken[static_cast<size_t>(at / all.tile_positions)];
    }
    ASSERT_LE(count * all.tile_positions, all.period);
  }
  ASSERT_EQ(std::count(taken.begin(), taken.end(), 1), units);
}

// The view of next_key_range() and the combine kernel: every position lies in one range, and every partial result has a
// slot of its own, which the combine of its row tile finds.
void check_contributors(const Batch &batch, const Decomposition &all, int32_t most) {
  std::vector<bool> taken(static_cast<size_t>(2 * most));
  int32_t begin = 0;
  for (const int32_t keys : batch.tiles) {
    const int32_t tiles = keys + all.tile_start_cost;
    const Contributors contributors = contributors_of(all, begin, tiles);
    int32_t at = begin;
    for (int32_t n = 0; n < contributors.count; ++n) {
      const int32_t range = contributors.first_cta + n;
      const int32_t end = std::min(begin + tiles, all.contiguous_range(range).end);
      ASSERT_EQ(all.cta_of(at), range);
      ASSERT_LT(at, end);
      const int32_t slot = at == begin ? range : most + range - 1;
      ASSERT_EQ(slot, contributors.partial_slot(n, most));
      if (contributors.count > 1) {
        ASSERT_FALSE(taken[static_cast<size_t>(slot)]);
        taken[static_cast<size_t>(slot)] = true;
      }
      at = end;
    }
    ASSERT_EQ(at, begin + tiles);
    // The combine kernel finds a row tile through the ranges that end in it: all its contributors but possibly the
    // last.
    for (int32_t n = 0; n + 1 < contributors.count; ++n) {
      const int32_t last = all.contiguous_range(contributors.first_cta + n).end - 1;
      ASSERT_TRUE(begin <= last && last < begin + tiles);
    }
    begin += tiles;
  }
}

TEST(StreamK, OfAMillionBatches) {
  const char *text = std::getenv("FLASHSPARK_STREAM_K_CASES");
  const int32_t cases = text != nullptr ? std::atoi(text) : 1000000;
  std::mt19937 random(20261126);
  int32_t whole = 0;
  for (int32_t n = 0; n < cases; ++n) {
    const Batch batch = draw(random);
    constexpr int32_t kSms[] = {48, 70, 84, 132, 170, 188};  // GB10, RTX 50, RTX PRO and H100
    const int32_t most = kSms[random() % 6] * (1 + static_cast<int32_t>(random() % 3));
    const StreamKLimits limits{most, static_cast<int32_t>(random() % 3), most / 2,
                               most * static_cast<int32_t>(random() % 5), static_cast<int32_t>(random() % 4)};
    const Decomposition all = decompose(batch.total, static_cast<int32_t>(batch.tiles.size()), batch.of_each, limits);
    check_ranges(batch, all, limits);
    if (all.stride > 0) check_whole_tiles(batch, all, limits), ++whole;
    if (n % 16 == 0) check_contributors(batch, all, most);
    if (HasFatalFailure()) {
      ADD_FAILURE() << "batch " << n << ": " << batch.tiles.size() << " row tiles, " << batch.total << " positions, "
                    << most << " ctas of at least " << (1 << limits.min_tiles_shift);
      return;
    }
  }
  EXPECT_GT(whole, cases / 100);
}

}  // namespace
}  // namespace flashspark::emulator
