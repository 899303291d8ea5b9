// Exact sums of float32 numbers (kernels/backward/exact_sums.cuh) beside integers of any size.
#include "backward/exact_sums.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <boost/multiprecision/cpp_int.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "backward/round.cuh"

namespace flashspark::emulator {
namespace {

using Integer = boost::multiprecision::cpp_int;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A finite number in units of 2^-149.
Integer units(float x) {
  int exponent = 0;
  const auto mantissa = static_cast<int64_t>(std::ldexp(std::frexp(std::fabs(double{x}), &exponent), 53));
  Integer whole = mantissa;
  const int shift = exponent - 53 + 149;
  whole = shift >= 0 ? Integer(whole << shift) : Integer(whole >> -shift);
  return x < 0 ? Integer(-whole) : whole;
}

float nearest(const Integer &sum) {
  Integer size = abs(sum);
  if (size == 0) return 0;
  int shift = std::max(static_cast<int>(msb(size)) - 23, 0);
  const Integer unit = Integer(1) << shift, rest = size % unit, half = unit / 2;
  size /= unit;
  if (shift > 0 && (rest > half || (rest == half && size % 2 == 1))) size += 1;
  const double x = std::ldexp(static_cast<double>(size), shift - 149);  // of 24 bits
  const float result = x > double{std::numeric_limits<float>::max()} ? kInfinity : static_cast<float>(x);
  return sum < 0 ? -result : result;
}

// Two sums, of which the second is used, by the functions that kernels call.
float exact_sum(const std::vector<float> &numbers) {
  std::vector<uint64_t> words(kExactWords * 2);
  float special[2] = {};
  const ExactSums sums{special, words.data(), 2};
  for (const float x : numbers) add_exactly(sums, special + 1, x);
  for (size_t n = 0; n < words.size(); n += 2) EXPECT_EQ(words[n], 0u);
  EXPECT_EQ(special[0], 0);
  return rounded(sums, 1);
}

void check(std::vector<float> numbers, std::mt19937_64 &rng) {
  Integer sum = 0;
  for (const float x : numbers) sum += units(x);
  const float expected = nearest(sum), found = exact_sum(numbers);
  ASSERT_EQ(std::bit_cast<uint32_t>(found), std::bit_cast<uint32_t>(expected)) << found << ", must be " << expected;
  std::shuffle(numbers.begin(), numbers.end(), rng);
  EXPECT_EQ(std::bit_cast<uint32_t>(exact_sum(numbers)), std::bit_cast<uint32_t>(found)) << "in another order";
}

// Any float but infinity and NaN, with exponents from a range.
float any(std::mt19937_64 &rng, uint32_t least, uint32_t most) {
  const auto exponent = static_cast<uint32_t>(least + rng() % (most - least + 1));
  return std::bit_cast<float>(static_cast<uint32_t>(rng()) >> 9 | exponent << 23 |
                              static_cast<uint32_t>(rng() & 1) << 31);
}

TEST(ExactSums, OfOneNumber) {
  std::mt19937_64 rng(1);
  for (uint32_t exponent = 0; exponent < 255; ++exponent) {
    for (const uint32_t mantissa : {0u, 1u, 0x400000u, 0x7fffffu, static_cast<uint32_t>(rng() & 0x7fffff)}) {
      const float x = std::bit_cast<float>(exponent << 23 | mantissa);
      EXPECT_EQ(exact_sum({x}), x);
      EXPECT_EQ(exact_sum({-x}), -x);
    }
  }
  EXPECT_EQ(exact_sum({}), 0);
  EXPECT_EQ(std::bit_cast<uint32_t>(exact_sum({-0.0f})), 0u);
}

TEST(ExactSums, OfAnyNumbers) {
  std::mt19937_64 rng(2);
  for (int n = 0; n < 4000; ++n) {
    const uint32_t least = static_cast<uint32_t>(rng() % 255),
                   most = least + static_cast<uint32_t>(rng() % (255 - least));
    std::vector<float> numbers(1 + rng() % 40);
    for (float &x : numbers) x = any(rng, least, most);
    ASSERT_NO_FATAL_FAILURE(check(numbers, rng)) << "exponents " << least << " to " << most;
  }
}

// All but the last bits cancel, or all.
TEST(ExactSums, OfNumbersThatCancel) {
  std::mt19937_64 rng(3);
  for (int n = 0; n < 4000; ++n) {
    std::vector<float> numbers;
    for (uint64_t pairs = 1 + rng() % 20; pairs > 0; --pairs) {
      numbers.push_back(any(rng, 0, 254));
      numbers.push_back(-numbers.back());
    }
    if (n % 4 != 0) numbers.push_back(any(rng, 0, 60));
    if (n % 4 == 2) numbers.push_back(std::nextafter(-numbers.back(), 0.0f));
    if (n % 4 == 3) numbers[0] = std::nextafter(numbers[0], 0.0f);
    ASSERT_NO_FATAL_FAILURE(check(numbers, rng)) << n;
  }
}

// Halves of a unit, and what is a little more or less.
TEST(ExactSums, TiesGoToEven) {
  std::mt19937_64 rng(4);
  for (uint32_t exponent = 1; exponent < 254; ++exponent) {
    for (const uint32_t mantissa : {0u, 1u, 0x7ffffeu, 0x7fffffu}) {
      const float x = std::bit_cast<float>(exponent << 23 | mantissa);
      const float unit = std::bit_cast<float>(exponent << 23 | 1) - std::bit_cast<float>(exponent << 23);
      for (const float more : {0.0f, 0x1p-149f, -0x1p-149f, unit / 0x1p30f}) {
        ASSERT_NO_FATAL_FAILURE(check({x, unit / 2, more}, rng));
        ASSERT_NO_FATAL_FAILURE(check({-x, -unit / 2, more}, rng));
        ASSERT_NO_FATAL_FAILURE(check({x, unit / 2, unit, -x, more}, rng));
      }
    }
  }
}

TEST(ExactSums, BeyondTheLargestNumber) {
  std::mt19937_64 rng(5);
  const float most = std::numeric_limits<float>::max(), half = 0x1p103f;  // of its unit
  check({most, half}, rng);
  check({most, half, -0x1p-149f}, rng);
  check({most, most, most, -most}, rng);
  check({most, most, -most}, rng);
  check({-most, -most, -most, most}, rng);
  check(std::vector<float>(5000, most), rng);
  check(std::vector<float>(5000, -most), rng);
}

TEST(ExactSums, InfinityAndNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(exact_sum({1, kInfinity, -5}), kInfinity);
  EXPECT_EQ(exact_sum({-kInfinity, 3e38f, 3e38f}), -kInfinity);
  EXPECT_TRUE(std::isnan(exact_sum({kInfinity, 1, -kInfinity})));
  EXPECT_TRUE(std::isnan(exact_sum({nan, 1})));
  EXPECT_TRUE(std::isnan(exact_sum({kInfinity, nan, kInfinity})));
}

// So many of one number as words must hold, by their words.
TEST(ExactSums, WordsHoldManyNumbers) {
  for (const float x : {0x1.fffffep20f, -0x1.fffffep127f, 0x1.0p-149f, -0x1.8p-101f, 0x1.fffffep-99f}) {
    const ExactParts parts = exact_parts(x);
    uint64_t words[kExactWords] = {};
    const int64_t many = int64_t{1} << 35;
    words[parts.word] = static_cast<uint64_t>(parts.low * many);
    if (parts.high != 0) words[parts.word + 1] = static_cast<uint64_t>(parts.high * many);
    const float found = rounded(words), expected = nearest(units(x) * many);
    EXPECT_EQ(found, expected) << x;
  }
}

TEST(ExactSums, OthersElementsAreNotAdded) {
  std::vector<uint64_t> words(kExactWords * 4);
  std::vector<float> memory(8);
  const ExactSums sums{memory.data() + 2, words.data(), 4};
  for (const int at : {0, 1, 6, 7}) {
    add_exactly(sums, memory.data() + at, 1);
    add_exactly(sums, memory.data() + at, kInfinity);
  }
  EXPECT_EQ(words, std::vector<uint64_t>(kExactWords * 4));
  EXPECT_EQ(memory, std::vector<float>(8));
}

}  // namespace
}  // namespace flashspark::emulator
