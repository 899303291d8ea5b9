// Every SIMD target that this CPU runs: its conversions on every code and every place where rounding turns, against the
// scalar ones (which dtype_test.cpp pins to the definition of the formats), and the engine's features on it. Cases of
// the matrix run on them in cases_test.cpp and backward_test.cpp.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/features.hpp"
#include "cpu/tile.hpp"
#include "dtype.hpp"
#include "support/features.hpp"
#include "support/use_target.hpp"

namespace flashspark::test {
namespace {

constexpr int32_t kSmallTypes[] = {FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT8_E4M3};

#if defined(__x86_64__)
// Linux lists what it and the CPU offer.
TEST(CpuFeatures, AreThoseThatTheSystemLists) {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line) && !line.starts_with("flags")) continue;
  const auto lists = [words = " " + line + " "](const std::string &names) {
    std::istringstream wanted(names);
    for (std::string name; wanted >> name;) {
      if (words.find(" " + name + " ") == std::string::npos) return false;
    }
    return true;
  };
  ASSERT_TRUE(lists("sse4_2")) << line;
  EXPECT_EQ(cpu::features().avx2, lists("avx avx2 fma bmi2 f16c"));
  const bool avx512 = lists("avx avx2 fma bmi2 f16c avx512f avx512vl avx512dq avx512bw avx512cd");
  EXPECT_EQ(cpu::features().avx512, avx512);
  EXPECT_EQ(cpu::features().avx512_bf16, avx512 && lists("avx512_bf16"));
}
#endif

class Targets : public testing::TestWithParam<const cpu::Kernels *> {};

// The same number, its sign included, or both NaN.
bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

std::vector<unsigned char> all_codes(int32_t dtype) {
  const int64_t count = dtype == FLASHSPARK_FLOAT8_E4M3 ? 256 : 65536;
  std::vector<unsigned char> bytes(count * dtype_size(dtype));
  for (int64_t c = 0; c < count; ++c) {
    if (dtype == FLASHSPARK_FLOAT8_E4M3) {
      bytes[c] = static_cast<unsigned char>(c);
    } else {
      const auto code = static_cast<uint16_t>(c);
      std::memcpy(&bytes[2 * c], &code, 2);
    }
  }
  return bytes;
}

TEST_P(Targets, WidensEveryCode) {
  for (const int32_t dtype : kSmallTypes) {
    const std::vector<unsigned char> codes = all_codes(dtype);
    const auto count = static_cast<int64_t>(codes.size() / dtype_size(dtype));
    for (const int lanes : {4, 8, 16}) {
      std::vector<float> got(count, 12345.0f);
      GetParam()->widen(codes.data(), count, dtype, lanes, got.data());
      for (int64_t c = 0; c < count; ++c) {
        const float want = load_as_float(codes.data(), c, dtype);
        ASSERT_TRUE(same(got[c], want)) << dtype_name(dtype) << " code " << c << " in vectors of " << lanes << " is "
                                        << got[c] << ", not " << want;
      }
    }
  }
}

// Every value of the format, the middle between it and the next, the floats beside both, and what no value is near.
std::vector<float> turning_points(int32_t dtype) {
  const std::vector<unsigned char> codes = all_codes(dtype);
  std::vector<float> points;
  const auto add = [&](float x) {
    for (const float y : {x, std::nextafterf(x, INFINITY), std::nextafterf(x, -INFINITY)}) {
      points.push_back(y);
      points.push_back(-y);
    }
  };
  for (size_t c = 0; c + 1 < codes.size() / dtype_size(dtype) / 2; ++c) {  // those without a sign
    const auto at = static_cast<int64_t>(c);
    const double low = load_as_float(codes.data(), at, dtype), high = load_as_float(codes.data(), at + 1, dtype);
    if (!std::isfinite(low)) break;
    const double next = std::isfinite(high) ? high : 2 * low - load_as_float(codes.data(), at - 1, dtype);
    for (const double x : {low, (low + next) / 2, next}) add(static_cast<float>(x));
  }
  for (uint32_t bits = 0; bits < 0x80000000u; bits += 65521) add(std::bit_cast<float>(bits));  // NaN payloads, too
  for (const uint32_t bits :
       {1u, 0x007fffffu, 0x00800000u, 0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu}) {
    add(std::bit_cast<float>(bits));
  }
  points.resize((points.size() + 7) / 8 * 8, 1.0f);
  return points;
}

TEST_P(Targets, NarrowsToTheNearestEvenCode) {
  for (const int32_t dtype : kSmallTypes) {
    const std::vector<float> points = turning_points(dtype);
    const auto count = static_cast<int64_t>(points.size());
    std::vector<unsigned char> got(count * dtype_size(dtype), 0xee);
    GetParam()->narrow(points.data(), count, dtype, got.data());
    for (int64_t n = 0; n < count; ++n) {
      float cell = 0;  // room for any type
      store_from_float(&cell, 0, dtype, points[n]);
      const float want = load_as_float(&cell, 0, dtype);
      const float result = load_as_float(got.data(), n, dtype);
      ASSERT_TRUE(same(result, want)) << dtype_name(dtype) << " of " << points[n] << " is " << result << ", not "
                                      << want;
    }
  }
}

TEST_P(Targets, FloatsPassThrough) {
  std::vector<float> points = turning_points(FLASHSPARK_BFLOAT16), wide(points.size()), narrow(points.size());
  const auto count = static_cast<int64_t>(points.size());
  for (const int lanes : {4, 8}) {
    GetParam()->widen(points.data(), count, FLASHSPARK_FLOAT32, lanes, wide.data());
    for (int64_t n = 0; n < count; ++n) ASSERT_TRUE(same(wide[n], points[n])) << points[n];
  }
  GetParam()->narrow(points.data(), count, FLASHSPARK_FLOAT32, narrow.data());
  for (int64_t n = 0; n < count; ++n) ASSERT_TRUE(same(narrow[n], points[n])) << points[n];
}

TEST_P(Targets, EveryFeatureAgreesWithTheFormula) {
  const UseTarget use(GetParam());
  EXPECT_STREQ(flashspark_cpu_target(), GetParam()->target);
  for (const Feature &feature : features()) {
    const Problem problem = problem_with(feature, 3);
    for (const auto &[name, layout] : {layouts()[0], layouts()[5], layouts()[6]}) {
      Layout engine = layout;
      engine.implementation = "cpu-engine";
      EXPECT_EQ(difference(problem, run(problem, engine), false), "") << feature.name << " " << name;
    }
  }
}

// What one NaN value makes of a row, in every type of out.
TEST_P(Targets, NanValuesStayNan) {
  const UseTarget use(GetParam());
  for (const int32_t dtype : {FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT8_E4M3}) {
    for (const int64_t queries : {1, 40}) {  // the streaming kernel and the packed one
      for (const int32_t splits : {1, 3}) {
        std::mt19937_64 rng(9);
        Problem p;
        p.q_dtype = p.kv_dtype = p.out_dtype = dtype;
        p.seqs = {random_sequence(rng, p, queries, 60)};
        for (int64_t j = 0; j < 60; ++j) p.seqs[0].v[j * 8 + 3] = NAN;
        const Result r = run(p, {.implementation = "cpu-engine", .num_splits = splits});
        ASSERT_EQ(r.status, FLASHSPARK_OK) << r.error;
        for (size_t n = 0; n < r.seqs[0].out.size(); ++n) {
          ASSERT_EQ(std::isnan(r.seqs[0].out[n]), n % 8 == 3) << dtype_name(dtype) << " " << n;
        }
      }
    }
  }
}

// A score that is NaN reaches its whole row, whether it is one of many or all there are; other rows do not see it.
TEST_P(Targets, NanScoresReachTheirRow) {
  const UseTarget use(GetParam());
  for (const int64_t queries : {1, 40}) {  // the streaming kernel and the packed one
    for (const int64_t keys : {1, 60}) {
      for (const bool all : {false, true}) {
        std::mt19937_64 rng(10);
        Problem p;
        p.seqs = {random_sequence(rng, p, queries, keys)};
        const int64_t row = queries / 2;
        // A NaN query makes every score of its row NaN. One NaN score: q = (x, 0...) against a key whose x is infinite,
        // where x = 0.
        Sequence &s = p.seqs[0];
        if (all) {
          s.q[row * 8] = NAN;
        } else {
          for (int64_t i = 0; i < queries; ++i) s.q[i * 8] = i == row ? 0.0f : -1.0f;
          s.k[(keys / 3) * 8] = INFINITY;
        }
        for (const int32_t splits : {1, 3}) {
          const Result r = run(p, {.implementation = "cpu-engine", .num_splits = splits});
          ASSERT_EQ(r.status, FLASHSPARK_OK) << r.error;
          for (size_t n = 0; n < r.seqs[0].out.size(); ++n) {
            ASSERT_EQ(std::isnan(r.seqs[0].out[n]), static_cast<int64_t>(n) / 8 == row)
                << queries << " queries, " << keys << " keys, all " << all << ", " << splits << " splits: " << n;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Targets, testing::ValuesIn(cpu::all_kernels().begin(), cpu::all_kernels().end()),
                         [](const auto &info) {
                           std::string name = info.param->target;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace flashspark::test
