// A small kernel with the elements of the real ones: double-buffered cp.async, a swizzle, ldmatrix and mma. It passes
// as it is, and leaving out any element is detected.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.hpp"
#include "guarded.hpp"
#include "ptx/ptx.cuh"

namespace flashspark::emulator {
namespace {

enum class Mistake {
  none,
  no_barrier_after_wait,
  no_barrier_before_refill,
  waits_for_one_group_less,
  no_wait,
  no_empty_group_at_the_end,
  exits_with_a_copy,
  no_zero_fill,
  one_stage_short,
  no_swizzle,
};

constexpr uint32_t kThreads = 128;
constexpr uint32_t kRows = 16;
constexpr uint32_t kColumns = 64;
constexpr uint32_t kTileBytes = kRows * kColumns * 2;
constexpr uint32_t kChunks = kColumns / 8;  // 16-byte chunks per row

// result[warp][column] = the sum over all rows of x (rows x 64), computed as a product with ones. Rows are loaded in
// tiles of 16; the last may be partial.
void column_sums(Mistake mistake, uint32_t rows, const uint16_t *x, float *result) {
  const uint32_t thread = ptx::thread_index();
  const uint32_t lane = thread % 32;
  const uint32_t tiles = (rows + kRows - 1) / kRows;
  const auto address = [&](uint32_t tile, uint32_t row, uint32_t chunk) {
    const uint32_t chunk_slot = mistake == Mistake::no_swizzle ? chunk : chunk ^ row % 8;
    return ptx::shared_memory() + tile % 2 * kTileBytes + row * kColumns * 2 + chunk_slot * 16;
  };
  const auto load = [&](uint32_t tile) {
    const uint32_t row = thread / kChunks;
    const uint32_t chunk = thread % kChunks;
    const bool valid = kRows * tile + row < rows;
    if (!valid && mistake == Mistake::no_zero_fill) return;
    ptx::cp_async_16_or_zero(address(tile, row, chunk), valid ? x + (kRows * tile + row) * kColumns + 8 * chunk : x,
                             valid);
  };
  const uint32_t one = ptx::pack<ptx::Bfloat16>(1.0f, 1.0f);
  const uint32_t ones[4] = {one, one, one, one};
  float sum[kColumns / 8][4] = {};
  load(0);
  ptx::cp_async_commit();
  for (uint32_t tile = 0; tile < tiles; tile++) {
    const bool more = tile + 1 < tiles;
    if (more) load(tile + 1);
    if (more || mistake != Mistake::no_empty_group_at_the_end) ptx::cp_async_commit();
    if (mistake == Mistake::waits_for_one_group_less) {
      ptx::cp_async_wait<2>();
    } else if (mistake != Mistake::no_wait) {
      ptx::cp_async_wait<1>();
    }
    if (mistake != Mistake::no_barrier_after_wait) ptx::cta_barrier();
    for (uint32_t pair = 0; pair < kColumns / 16; pair++) {
      uint32_t part[4];  // columns 16 * pair: rows 0 to 7, then 8 to 15; the same for the next 8 columns
      ptx::ldmatrix_x4_trans(part, address(tile, lane % 16, 2 * pair + lane / 16));
      ptx::mma_m16n8k16<ptx::Bfloat16>(sum[2 * pair], ones, part[0], part[1]);
      ptx::mma_m16n8k16<ptx::Bfloat16>(sum[2 * pair + 1], ones, part[2], part[3]);
    }
    if (mistake != Mistake::no_barrier_before_refill) ptx::cta_barrier();
  }
  if (mistake == Mistake::exits_with_a_copy) {
    load(0);
    ptx::cp_async_commit();
  }
  for (uint32_t i = 0; i < kColumns / 8; i++) {
    if (lane < 4) {
      result[thread / 32 * kColumns + 8 * i + 2 * lane] = sum[i][0];
      result[thread / 32 * kColumns + 8 * i + 2 * lane + 1] = sum[i][1];
    }
  }
}

struct Outcome {
  Counters counters;
  bool right = true;
};

Outcome run(Mistake mistake, uint64_t seed) {
  const uint32_t rows = 40 + seed % 41;
  Guarded<uint16_t> x(rows * kColumns);
  Guarded<float> result(kThreads / 32 * kColumns);
  std::vector<float> expected(kColumns);
  for (uint32_t i = 0; i < x.size(); i++) {
    const auto value = static_cast<float>((i * 37 + seed) % 17) - 8;
    x[i] = static_cast<uint16_t>(ptx::pack<ptx::Bfloat16>(value, 0));
    expected[i % kColumns] += value;
  }
  const uint32_t stages = mistake == Mistake::one_stage_short ? 1 : 2;
  Outcome outcome;
  outcome.counters = launch({{1, 1, 1}, kThreads, stages * kTileBytes, seed},
                            [&] { column_sums(mistake, rows, x.data(), result.data()); });
  for (uint32_t i = 0; i < result.size(); i++) outcome.right &= result[i] == expected[i % kColumns];
  return outcome;
}

TEST(Pipeline, RightAndWithoutFaultUnderManySeeds) {
  for (uint64_t seed = 1; seed <= 200; seed++) {
    const Outcome outcome = run(Mistake::none, seed);
    ASSERT_TRUE(outcome.right) << seed;
    const uint64_t tiles = (40 + seed % 41 + kRows - 1) / kRows;
    ASSERT_EQ(outcome.counters.ldmatrix, tiles * 4 * 4);
    ASSERT_EQ(outcome.counters.mma, tiles * 4 * 8);
    ASSERT_EQ(outcome.counters.barriers, tiles * 2);
    ASSERT_EQ(outcome.counters.cp_async, tiles * kThreads);
    ASSERT_EQ(outcome.counters.bank_conflicts, 0u);
  }
}

TEST(Pipeline, EveryMistakeIsFoundByEverySeed) {
  const std::vector<std::pair<Mistake, std::string>> mistakes = {
      {Mistake::no_barrier_after_wait, ""},  // a race or bytes in flight, depending on which thread runs first
      {Mistake::no_barrier_before_refill, ""},
      {Mistake::waits_for_one_group_less, "copy in flight"},
      {Mistake::no_wait, "copy in flight"},
      {Mistake::no_empty_group_at_the_end, "copy in flight"},
      {Mistake::exits_with_a_copy, "exits with a copy in flight"},
      {Mistake::one_stage_short, "out of bounds"},
  };
  for (const auto &[mistake, text] : mistakes) {
    for (uint64_t seed = 1; seed <= 30; seed++) {
      try {
        run(mistake, seed);
        ADD_FAILURE() << "mistake " << static_cast<int>(mistake) << " went by, seed " << seed;
      } catch (const Fault &f) {
        EXPECT_NE(std::string(f.what()).find(text), std::string::npos) << f.what();
      }
    }
  }
}

TEST(Pipeline, RowsThatAreNotFilledAreFound) {
  // 70 rows: only 6 of the last tile's 16 rows are written; the rest is stale or was never written.
  const uint64_t seed = 30;
  bool found = false;
  try {
    found = !run(Mistake::no_zero_fill, seed).right;
  } catch (const Fault &) {
    found = true;
  }
  EXPECT_TRUE(found);
}

TEST(Banks, WithoutSwizzleEveryRowBeyondTheFirstConflicts) {
  for (uint64_t seed = 1; seed <= 5; seed++) {
    const Outcome outcome = run(Mistake::no_swizzle, seed);
    EXPECT_TRUE(outcome.right);
    EXPECT_EQ(outcome.counters.bank_conflicts, 4 * 7 * outcome.counters.ldmatrix);
  }
}

// Bank conflicts of one store of `bytes` by each lane to address(lane), and of the same loads.
template <class Address>
uint64_t conflicts(uint32_t bytes, Address address) {
  const Counters counters = launch({{1, 1, 1}, 32, 8192, 4}, [&] {
    const ptx::SharedAddress at = ptx::shared_memory() + address(ptx::thread_index());
    // Two of each, so that a lane's second access is not mistaken for another lane's first.
    for (uint32_t i = 0; i < 2; i++) {
      if (bytes == 16) {
        ptx::store_shared_16(at + 4096 * i, {});
      } else {
        ptx::store_shared_4(at + 4096 * i, 0);
      }
    }
    ptx::warp_barrier();
    for (uint32_t i = 0; i < 2; i++) bytes == 16 ? (void)ptx::load_shared_16(at) : (void)ptx::load_shared_4(at);
  });
  return counters.bank_conflicts;
}

TEST(Banks, LoadsAndStores) {
  EXPECT_EQ(conflicts(4, [](uint32_t lane) { return 4 * lane; }), 0u);
  EXPECT_EQ(conflicts(4, [](uint32_t lane) { return 8 * lane; }), 4 * 16u);
  EXPECT_EQ(conflicts(4, [](uint32_t lane) { return 128 * (lane % 32); }), 4 * 31u);
  EXPECT_EQ(conflicts(4, [](uint32_t lane) { return 4 * (lane ^ 5); }), 0u);
  EXPECT_EQ(conflicts(16, [](uint32_t lane) { return 16 * lane; }), 0u);
  EXPECT_EQ(conflicts(16, [](uint32_t lane) { return 128 * lane; }), 4 * 28u);
  EXPECT_EQ(conflicts(16, [](uint32_t lane) { return 128 * lane + 16 * (lane % 8); }), 0u);
  EXPECT_EQ(conflicts(16, [](uint32_t lane) { return 32 * lane; }), 4 * 16u);
}

TEST(Banks, LanesThatShareAWordDoNotConflict) {
  const Counters counters = launch({{1, 1, 1}, 32, 256, 4}, [] {
    if (ptx::thread_index() < 2) ptx::store_shared_4(ptx::shared_memory() + 128 * ptx::thread_index(), 0);
    ptx::warp_barrier();
    ptx::load_shared_4(ptx::shared_memory());
    ptx::load_shared_4(ptx::shared_memory() + 128 * (ptx::thread_index() % 2));
  });
  EXPECT_EQ(counters.bank_conflicts, 2u);  // two words of the stores and two of the last load
}

}  // namespace
}  // namespace flashspark::emulator
