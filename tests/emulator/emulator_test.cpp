// Tests each emulated instruction against the PTX manual or an independent implementation.
#include "emulator.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "guarded.hpp"
#include "ptx/ptx.cuh"

namespace flashspark::emulator {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

uint32_t lane_index() {
  return ptx::thread_index() % 32;
}

// x rounded to `bits` significant bits, with steps no smaller than `smallest_step`; ties to even, by the C library's
// rounding.
double rounded(double x, int bits, double smallest_step) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = 0;
  std::frexp(x, &exponent);
  const double step = std::max(std::ldexp(1.0, exponent - bits), smallest_step);
  return std::nearbyint(x / step) * step;
}

// Floats of all magnitudes, and values at which conversions typically go wrong.
std::vector<float> many_floats() {
  std::mt19937 random(7);
  std::vector<float> values = {0.0f,  -0.0f,    kInfinity, -kInfinity, 1.0f,
                               -1.0f, 65504.0f, 65519.9f,  65520.0f,   -65536.0f};
  for (int i = 0; i < 200000; i++) values.push_back(std::bit_cast<float>(static_cast<uint32_t>(random())));
  // Values in the range of fp16, and exact ties of both formats.
  for (int i = 0; i < 200000; i++) {
    const uint32_t word = static_cast<uint32_t>(random());
    const uint32_t exponent = 127 - 26 + word % 43;
    values.push_back(std::bit_cast<float>((word & 0x807fffff) | exponent << 23));
    values.push_back(std::bit_cast<float>((word & 0x807ff000) | 0x1000 | exponent << 23));
    values.push_back(std::bit_cast<float>((word & 0x807f8000) | 0x8000 | exponent << 23));
  }
  return values;
}

TEST(Conversion, PackBfloat16) {
  for (const float x : many_floats()) {
    const uint32_t word = ptx::pack<ptx::Bfloat16>(x, -x);
    if (std::isnan(x)) {
      ASSERT_EQ(word, 0x7fff7fffu);
      continue;
    }
    double expected = rounded(x, 8, 0x1p-133);
    if (std::fabs(expected) >= 0x1p128) expected = std::copysign(kInfinity, expected);
    const float low = std::bit_cast<float>(word << 16);
    const float high = std::bit_cast<float>(word & 0xffff0000);
    ASSERT_EQ(low, expected) << x;
    ASSERT_EQ(high, -expected) << x;
    ASSERT_EQ(std::signbit(low), std::signbit(x));
  }
}

TEST(Conversion, PackFloat16) {
  for (const float x : many_floats()) {
    const uint32_t word = ptx::pack<ptx::Float16>(x, -x);
    if (std::isnan(x)) {
      ASSERT_EQ(word, 0x7fff7fffu);
      continue;
    }
    double expected = rounded(x, 11, 0x1p-24);
    if (std::fabs(expected) >= 65536) expected = std::copysign(kInfinity, expected);
    const auto low = std::bit_cast<_Float16>(static_cast<uint16_t>(word));
    const auto high = std::bit_cast<_Float16>(static_cast<uint16_t>(word >> 16));
    ASSERT_EQ(static_cast<float>(low), expected) << x;
    ASSERT_EQ(static_cast<float>(high), -expected) << x;
    ASSERT_EQ((word & 0x8000) != 0, std::signbit(x));
  }
}

TEST(Conversion, EveryCodeToFloat) {
  for (uint32_t code = 0; code < 65536; code++) {
    const auto bits = static_cast<uint16_t>(code);
    const float brain = ptx::to_float(ptx::Bfloat16{bits});
    ASSERT_EQ(std::bit_cast<uint32_t>(brain), code << 16);
    const float half = ptx::to_float(ptx::Float16{bits});
    const auto expected = static_cast<float>(std::bit_cast<_Float16>(bits));
    ASSERT_TRUE(half == expected || (std::isnan(half) && std::isnan(expected))) << code;
    ASSERT_EQ(std::signbit(half), (code & 0x8000) != 0);
  }
}

TEST(Arithmetic, Exp2AndLog2) {
  EXPECT_EQ(ptx::exp2_approx(-kInfinity), 0.0f);
  EXPECT_EQ(ptx::exp2_approx(kInfinity), kInfinity);
  EXPECT_EQ(ptx::exp2_approx(-126.0f), 0x1p-126f);
  EXPECT_EQ(ptx::exp2_approx(-127.0f), 0.0f);  // 2^-127 is subnormal
  EXPECT_EQ(ptx::exp2_approx(128.0f), kInfinity);
  EXPECT_TRUE(std::isnan(ptx::exp2_approx(kNan)));
  EXPECT_EQ(ptx::log2_approx(0.0f), -kInfinity);
  EXPECT_EQ(ptx::log2_approx(0x1p-127f), -kInfinity);  // subnormals are flushed to 0
  EXPECT_EQ(ptx::log2_approx(0x1p-126f), -126.0f);
  EXPECT_EQ(ptx::log2_approx(kInfinity), kInfinity);
  EXPECT_TRUE(std::isnan(ptx::log2_approx(-1.0f)));
  for (float x = -125.9f; x < 127.9f; x += 0.0113f) {
    const double expected = std::exp2(static_cast<double>(x));
    ASSERT_NEAR(ptx::exp2_approx(x), expected, expected * 0x1p-22);
    ASSERT_NEAR(ptx::log2_approx(static_cast<float>(expected)), x, 0x1p-16);
  }
}

TEST(Arithmetic, Integers) {
  EXPECT_EQ(ptx::multiply_high(0xffffffff, 0xffffffff), 0xfffffffeu);
  EXPECT_EQ(ptx::multiply_high(0x10000, 0x10000), 1u);
  EXPECT_EQ(ptx::lowest_bit(0x80000000), 31u);
  EXPECT_EQ(ptx::lowest_bit(0x50), 4u);
  EXPECT_EQ(ptx::as_word(1.0f), 0x3f800000u);
  EXPECT_EQ(ptx::as_float(0xc0000000), -2.0f);
}

TEST(Launch, EveryThreadOfEveryCtaOnce) {
  std::vector<int> runs(3 * 2 * 4 * 96);
  std::set<uint32_t> first_ctas;
  for (uint64_t seed = 0; seed < 20; seed++) {
    std::fill(runs.begin(), runs.end(), 0);
    uint32_t first_cta = 0xffffffff;
    launch({{3, 2, 4}, 96, 0, seed}, [&] {
      const uint32_t cta = ptx::cta_x() + 3 * (ptx::cta_y() + 2 * ptx::cta_z());
      if (first_cta == 0xffffffff) first_cta = cta;
      runs[cta * 96 + ptx::thread_index()]++;
    });
    for (const int count : runs) ASSERT_EQ(count, 1);
    first_ctas.insert(first_cta);
  }
  EXPECT_GT(first_ctas.size(), 5u);  // the seed determines the order
}

TEST(Launch, SameSeedSameRun) {
  const auto trace = [](uint64_t seed) {
    std::vector<uint32_t> order;
    launch({{2, 1, 1}, 128, 0, seed}, [&] {
      for (int i = 0; i < 3; i++) {
        order.push_back(ptx::thread_index());
        ptx::warp_barrier();
      }
    });
    return order;
  };
  EXPECT_EQ(trace(5), trace(5));
  EXPECT_NE(trace(5), trace(6));
}

TEST(Launch, RefusesWhatNoDeviceTakes) {
  EXPECT_THROW(launch({{1, 1, 1}, 33, 0, 1}, [] {}), std::invalid_argument);
  EXPECT_THROW(launch({{0, 1, 1}, 32, 0, 1}, [] {}), std::invalid_argument);
}

TEST(Warp, ShufflesVotesAndReductions) {
  const Counters counters = launch({{1, 1, 1}, 64, 0, 3}, [] {
    const uint32_t lane = lane_index();
    const uint32_t warp = ptx::thread_index() / 32;
    const auto mine = static_cast<int32_t>(100 * warp + lane);
    for (const uint32_t mask : {1u, 2u, 4u, 8u, 16u, 31u}) {
      EXPECT_EQ(ptx::shuffle_xor(static_cast<float>(mine), mask), static_cast<float>(100 * warp + (lane ^ mask)));
    }
    // Each lane may read from a different lane.
    EXPECT_EQ(ptx::shuffle(mine, (5 * lane + 3) % 32), static_cast<int32_t>(100 * warp + (5 * lane + 3) % 32));
    for (const uint32_t delta : {1u, 4u, 31u}) {
      EXPECT_EQ(ptx::shuffle_up(mine, delta), lane >= delta ? mine - static_cast<int32_t>(delta) : mine);
    }
    EXPECT_EQ(ptx::ballot(lane % 3 == warp), warp == 0 ? 0x49249249u : 0x92492492u);
    EXPECT_EQ(ptx::any(lane == 17 && warp == 1), warp == 1);
    // The comparison is signed.
    EXPECT_EQ(ptx::reduce_min(static_cast<int32_t>(lane) - 7 - static_cast<int32_t>(warp)),
              -7 - static_cast<int32_t>(warp));
    EXPECT_EQ(ptx::reduce_max(-mine), -static_cast<int32_t>(100 * warp));
    EXPECT_EQ(ptx::reduce_add(0xf0000000u + lane), 32 * 31 / 2) << "modulo 2^32";
    EXPECT_EQ(ptx::uniform(-5 - static_cast<int32_t>(warp)), -5 - static_cast<int32_t>(warp));
  });
  EXPECT_EQ(counters.shuffles, 2u * (6 + 1 + 3 + 2 + 3 + 1));
}

// The PTX manual's formulas for element i of a lane's fragment of mma.m16n8k16, transcribed literally.
struct MatrixPosition {
  uint32_t row, column;
};
MatrixPosition position_a(uint32_t lane, uint32_t i) {
  const uint32_t group = lane >> 2;
  const uint32_t thread_in_group = lane % 4;
  return {(i < 2 || (4 <= i && i < 6)) ? group : group + 8, thread_in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
MatrixPosition position_b(uint32_t lane, uint32_t i) {
  return {(lane % 4) * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2};
}
MatrixPosition position_d(uint32_t lane, uint32_t i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)};
}

template <class Element>
void check_product(uint64_t seed, bool whole) {
  std::mt19937_64 random(seed);
  // With integers every sum is exact in any order.
  const auto draw = [&] {
    const float x = whole ? static_cast<float>(static_cast<int>(random() % 31) - 15)
                          : std::ldexp(static_cast<float>(static_cast<int>(random() % 511) - 255), -7);
    return ptx::to_float(Element{static_cast<uint16_t>(ptx::pack<Element>(x, 0))});
  };
  float a[16][16], b[16][8], d[16][8], result[16][8];
  for (auto &row : a) {
    for (float &x : row) x = draw();
  }
  for (auto &row : b) {
    for (float &x : row) x = draw();
  }
  for (auto &row : d) {
    for (float &x : row) x = draw();
  }
  const Counters counters = launch({{1, 1, 1}, 32, 0, seed}, [&] {
    const uint32_t lane = lane_index();
    const auto at_a = [&](uint32_t i) { return a[position_a(lane, i).row][position_a(lane, i).column]; };
    const auto at_b = [&](uint32_t i) { return b[position_b(lane, i).row][position_b(lane, i).column]; };
    uint32_t part[4];
    for (uint32_t i = 0; i < 4; i++) part[i] = ptx::pack<Element>(at_a(2 * i), at_a(2 * i + 1));
    float sum[4];
    for (uint32_t i = 0; i < 4; i++) sum[i] = d[position_d(lane, i).row][position_d(lane, i).column];
    ptx::mma_m16n8k16<Element>(sum, part, ptx::pack<Element>(at_b(0), at_b(1)), ptx::pack<Element>(at_b(2), at_b(3)));
    for (uint32_t i = 0; i < 4; i++) result[position_d(lane, i).row][position_d(lane, i).column] = sum[i];
  });
  EXPECT_EQ(counters.mma, 1u);
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      double expected = d[row][column];
      double size = std::fabs(expected);
      for (int k = 0; k < 16; k++) {
        expected += static_cast<double>(a[row][k]) * b[k][column];
        size += std::fabs(static_cast<double>(a[row][k]) * b[k][column]);
      }
      ASSERT_NEAR(result[row][column], expected, whole ? 0 : size * 0x1p-20) << row << ' ' << column;
    }
  }
}

TEST(Mma, NaiveProductByTheManualsTables) {
  for (uint64_t seed = 1; seed <= 20; seed++) {
    for (const bool whole : {true, false}) {
      check_product<ptx::Bfloat16>(seed, whole);
      check_product<ptx::Float16>(seed, whole);
    }
  }
}

TEST(Mma, OrderOfTheSumIsTheSeeds) {
  std::set<float> results;
  for (uint64_t seed = 1; seed <= 100; seed++) {
    launch({{1, 1, 1}, 32, 0, seed}, [&] {
      // Row 0 of A is 1, 2^-24, 2^-24, ...: the order of summation decides which of them survive rounding.
      const uint32_t lane = lane_index();
      const uint32_t tiny = ptx::pack<ptx::Bfloat16>(0x1p-24f, 0x1p-24f);
      const uint32_t first = ptx::pack<ptx::Bfloat16>(lane == 0 ? 1.0f : 0x1p-24f, 0x1p-24f);
      const uint32_t ones = ptx::pack<ptx::Bfloat16>(1.0f, 1.0f);
      float sum[4] = {};
      ptx::mma_m16n8k16<ptx::Bfloat16>(sum, {first, 0, tiny, 0}, ones, ones);
      if (lane == 0) results.insert(sum[0]);
    });
  }
  EXPECT_GT(results.size(), 4u);
}

TEST(Ldmatrix, RowsAnywhereBothWays) {
  for (uint64_t seed = 1; seed <= 20; seed++) {
    std::mt19937 random(static_cast<uint32_t>(seed));
    // 64 rows of 16 bytes hold random values; each of the 32 lanes addresses any one of them.
    std::vector<uint16_t> numbers(64 * 8);
    for (uint16_t &x : numbers) x = static_cast<uint16_t>(random());
    uint32_t row_of[32];
    for (uint32_t &row : row_of) row = random() % 64;
    launch({{1, 1, 1}, 32, 1024, seed}, [&] {
      const uint32_t lane = lane_index();
      for (uint32_t word = lane; word < 256; word += 32) {
        ptx::store_shared_4(ptx::shared_memory() + 4 * word, numbers[2 * word] | uint32_t{numbers[2 * word + 1]} << 16);
      }
      ptx::warp_barrier();
      uint32_t plain[4];
      uint32_t transposed[4];
      ptx::ldmatrix_x4(plain, ptx::shared_memory() + 16 * row_of[lane]);
      ptx::ldmatrix_x4_trans(transposed, ptx::shared_memory() + 16 * row_of[lane]);
      for (uint32_t m = 0; m < 4; m++) {
        const auto element = [&](uint32_t row, uint32_t column) { return numbers[row_of[8 * m + row] * 8 + column]; };
        // "Each thread holds two elements of row lane / 4"; with .trans the roles of rows and columns are exchanged.
        for (uint32_t i = 0; i < 2; i++) {
          EXPECT_EQ(plain[m] >> 16 * i & 0xffff, element(lane / 4, 2 * (lane % 4) + i));
          EXPECT_EQ(transposed[m] >> 16 * i & 0xffff, element(2 * (lane % 4) + i, lane / 4));
        }
      }
    });
  }
}

TEST(Shared, LoadsAndStores) {
  launch({{1, 1, 1}, 32, 512, 1}, [] {
    const uint32_t lane = lane_index();
    const ptx::SharedAddress at = ptx::shared_memory() + 16 * lane;
    EXPECT_EQ(ptx::shared_memory() % 1024, 0u);
    ptx::Vector16 words;
    for (uint32_t n = 0; n < 4; ++n) words.word[n] = lane + n;
    ptx::store_shared_16(at, words);
    ptx::store_shared_4(at + 8, 77);
    ptx::cta_barrier();
    const ptx::Vector16 next = ptx::load_shared_16(ptx::shared_memory() + 16 * ((lane + 1) % 32));
    EXPECT_EQ(next.word[0], (lane + 1) % 32);
    EXPECT_EQ(next.word[2], 77u);
    EXPECT_EQ(ptx::load_shared_4(at + 12), lane + 3);
  });
}

TEST(CpAsync, GroupsZeroFillAndCounts) {
  for (uint64_t seed = 1; seed <= 20; seed++) {
    Guarded<uint32_t> source(32 * 8);
    for (uint32_t i = 0; i < source.size(); i++) source[i] = 1000 + i;
    const Counters counters = launch({{1, 1, 1}, 32, 32 * 48, seed}, [&] {
      const uint32_t lane = lane_index();
      const ptx::SharedAddress at = ptx::shared_memory() + 48 * lane;
      ptx::cp_async_16(at, &source[8 * lane]);
      ptx::cp_async_commit();
      ptx::cp_async_16_or_zero(at + 16, &source[8 * lane + 4], lane % 2 == 0);
      ptx::cp_async_commit();
      ptx::cp_async_commit();  // empty groups count
      ptx::cp_async_16_or_zero(at + 32, nullptr, false);
      ptx::cp_async_commit();
      ptx::cp_async_wait<7>();  // more than were committed
      ptx::cp_async_wait<3>();
      EXPECT_EQ(ptx::load_shared_4(at + 4), 1001 + 8 * lane);
      ptx::cp_async_wait<2>();
      EXPECT_EQ(ptx::load_shared_4(at + 28), lane % 2 == 0 ? 1007 + 8 * lane : 0);
      ptx::cp_async_wait<0>();
      const ptx::Vector16 zero = ptx::load_shared_16(at + 32);
      EXPECT_EQ(zero.word[0] | zero.word[1] | zero.word[2] | zero.word[3], 0u);
    });
    EXPECT_EQ(counters.cp_async, 96u);
    EXPECT_EQ(counters.cp_async_zero, 48u);
  }
}

}  // namespace
}  // namespace flashspark::emulator
