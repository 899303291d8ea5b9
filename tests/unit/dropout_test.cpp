// Dropout: the generator, which probabilities it drops, and what that does to out and lse. That the results agree with
// the formula is checked where every feature is; here the dropped elements themselves are read and counted.
#include "dropout.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "cpu/tile.hpp"
#include "support/model.hpp"

namespace flashspark::test {
namespace {

// Random123's kat_vectors, lines philox4x32 10.
static_assert(philox({0, 0}, {0, 0, 0, 0}) == PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox({0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}) ==
              PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox({0xa4093822, 0x299f31d0}, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}) ==
              PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

// How many of 2^15 draws are dropped.
int64_t dropped_draws(float p) {
  const DropoutLimit limit = dropout_limit(p);
  return limit.keeps ? (1 << kDropoutBits) - int64_t{limit.limit} : int64_t{limit.limit};
}

TEST(Dropout, LimitsRoundToFifteenBits) {
  EXPECT_EQ(dropped_draws(0.5f), 16384);
  EXPECT_EQ(dropped_draws(0.1f), 3277);
  EXPECT_EQ(dropped_draws(0.9f), 29491);
  EXPECT_EQ(dropped_draws(1e-6f), 0);
  EXPECT_EQ(dropped_draws(0x1p-16f), 1);
  EXPECT_EQ(dropped_draws(0.999999f), 32767);
  EXPECT_EQ(dropped_draws(std::nextafterf(1, 0)), 32767);
  // What a kernel compares as floats of 16 bits is never infinite or NaN.
  for (int n = 0; n < 65536; ++n) ASSERT_LE(dropout_limit(static_cast<float>(n) / 65536).limit, 0x4000u) << n;
}

// The sixteen keys of one Philox call: each is dropped as often as p says, and so is each pair as often as p^2 says,
// but for the draws of which another key's bits decide: one in 256 of each.
TEST(Dropout, KeysOfOneDrawAreNearlyIndependent) {
  constexpr int64_t kCalls = 200'000;
  for (const float p : {0.1f, 0.3f, 0.75f}) {
    const Dropout dropout{dropout_limit(p), 1, dropout_key(3, 5)};
    const double exact = static_cast<double>(dropped_draws(p)) / (1 << kDropoutBits);
    std::array<std::array<int64_t, 16>, 16> both{};
    for (int64_t i = 0; i < kCalls; ++i) {
      std::array<bool, 16> drops;
      for (int64_t n = 0; n < 16; ++n) drops[static_cast<size_t>(n)] = dropout.drops(0, 1, i, n / 2 * 8 + n % 2);
      for (size_t n = 0; n < 16; ++n) {
        for (size_t m = 0; drops[n] && m <= n; ++m) both[n][m] += drops[m];
      }
    }
    for (size_t n = 0; n < 16; ++n) {
      for (size_t m = 0; m <= n; ++m) {
        const double expected = n == m ? exact : exact * exact;
        const double sigma = std::sqrt(expected * (1 - expected) / kCalls);
        const double allowed = 5 * sigma + (n == m ? 0 : exact * (1 - exact) / 256);
        EXPECT_NEAR(static_cast<double>(both[n][m]) / kCalls, expected, allowed) << p << " keys " << n << ", " << m;
      }
    }
  }
}

// Scores are all equal, and value j is the unit vector of column j - first: out says which of dv keys a row has kept.
void show_kept_keys(const Problem &p, Sequence &s, int64_t first) {
  std::fill(s.q.begin(), s.q.end(), 0.0f);
  std::fill(s.v.begin(), s.v.end(), 0.0f);
  for (int64_t j = first; j < std::min(s.tk, first + p.dv); ++j) {
    for (int64_t h = 0; h < p.hkv; ++h) s.v[(j * p.hkv + h) * p.dv + j - first] = 1;
  }
}

int64_t random(std::mt19937_64 &rng, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

struct Shape {
  Problem problem;
  Layout layout;
  std::vector<int64_t> first;  // of the keys that show in out, one number a sequence
};

Shape random_shape(uint64_t seed) {
  std::mt19937_64 rng(seed);
  const auto one_in = [&](int64_t n) { return random(rng, 1, n) == 1; };
  Shape shape;
  Problem &p = shape.problem;
  p.hkv = random(rng, 1, 3), p.hq = p.hkv * random(rng, 1, 5);
  p.d = 8 * random(rng, 1, 3), p.dv = 8 * random(rng, 1, 20);
  p.dropout = static_cast<float>(random(rng, 1, 65535)) / 65536;
  p.dropout_seed = rng(), p.dropout_offset = rng();
  const int32_t types[] = {FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT8_E4M3};
  p.q_dtype = p.kv_dtype = types[random(rng, 0, 3)];
  if (one_in(4)) p.window_left = random(rng, 0, 80);
  if (one_in(5)) p.window_right = random(rng, 0, 40);
  if (one_in(6)) p.attention_chunk = random(rng, 1, 90);
  const bool causal = one_in(2);
  for (int64_t count = random(rng, 1, 3); count > 0; --count) {
    p.seqs.push_back(random_sequence(rng, p, random(rng, 1, one_in(2) ? 4 : 60), random(rng, 1, 260)));
    shape.first.push_back(random(rng, 0, p.seqs.back().tk - 1));
    p.seqs.back().causal = causal;
    show_kept_keys(p, p.seqs.back(), shape.first.back());
  }
  Layout &l = shape.layout;
  l.q = one_in(2) ? Kind::kVarlen : Kind::kDense, l.kv = static_cast<Kind>(random(rng, 0, 2));
  l.page_size = random(rng, 1, 70), l.num_threads = static_cast<int32_t>(random(rng, 1, 3));
  l.num_splits = static_cast<int32_t>(random(rng, 0, 4)), l.leftpad = one_in(2) ? random(rng, 1, 50) : 0;
  l.dropout_state = one_in(2), l.seed = seed;
  return shape;
}

// Elements that are kept in one result and dropped in the other.
int64_t mask_differences(const Result &got, const Result &expected) {
  int64_t differences = 0;
  for (size_t b = 0; b < expected.seqs.size(); ++b) {
    for (size_t n = 0; n < expected.seqs[b].out.size(); ++n)
      differences += (got.seqs[b].out[n] != 0) != (expected.seqs[b].out[n] != 0);
  }
  return differences;
}

// What the definition says of the elements that the mask keeps: those that are not 0 without dropout.
int64_t definition_differences(const Shape &shape, const Result &got, const Result &all) {
  const Problem &p = shape.problem;
  const Dropout dropout{dropout_limit(p.dropout), 1, dropout_key(p.dropout_seed, p.dropout_offset)};
  int64_t differences = 0;
  for (size_t b = 0; b < p.seqs.size(); ++b) {
    for (size_t n = 0; n < all.seqs[b].out.size(); ++n) {
      const auto at = static_cast<int64_t>(n);
      const int64_t i = at / p.dv / p.hq, h = at / p.dv % p.hq, j = got.leftpad + shape.first[b] + at % p.dv;
      const bool kept = all.seqs[b].out[n] != 0 && !dropout.drops(static_cast<int64_t>(b), h, i, j);
      differences += (got.seqs[b].out[n] != 0) != kept;
    }
  }
  return differences;
}

TEST(Dropout, EngineDropsExactlyWhatTheOracleDrops) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Shape shape = random_shape(seed);
    shape.layout.implementation = "cpu-reference";
    const Result expected = run(shape.problem, shape.layout);
    ASSERT_EQ(expected.status, FLASHSPARK_OK) << expected.error;
    Problem undropped = shape.problem;
    undropped.dropout = 0;
    const Result all = run(undropped, shape.layout);
    ASSERT_EQ(definition_differences(shape, expected, all), 0) << seed;
    shape.layout.implementation = "cpu-engine";
    for (const cpu::Kernels *kernels : cpu::all_kernels()) {
      cpu::use_kernels(kernels);
      const Result got = run(shape.problem, shape.layout);
      const Result got_all = run(undropped, shape.layout);
      cpu::use_kernels(nullptr);
      ASSERT_EQ(got.status, FLASHSPARK_OK) << got.error;
      ASSERT_EQ(mask_differences(got, expected), 0) << kernels->target << " seed " << seed;
      for (size_t b = 0; b < got.seqs.size(); ++b) ASSERT_EQ(got.seqs[b].lse, got_all.seqs[b].lse) << seed;
    }
  }
}

// One sequence whose out shows every key.
Problem shown(float dropout, int64_t queries, int64_t keys) {
  std::mt19937_64 rng(1);
  Problem p;
  p.hq = 4, p.hkv = 2, p.d = 8, p.dv = keys;
  p.dropout = dropout;
  p.seqs = {random_sequence(rng, p, queries, keys)};
  show_kept_keys(p, p.seqs[0], 0);
  return p;
}

std::vector<float> out_of(const Problem &p) {
  const Result r = run(p, {.implementation = "cpu-engine"});
  EXPECT_EQ(r.status, FLASHSPARK_OK) << r.error;
  return r.seqs[0].out;
}

TEST(Dropout, AsManyAreDroppedAsPSays) {
  for (const int64_t queries : {3, 64}) {  // the streaming kernel and the packed one
    for (const float dropout : {0.001f, 0.1f, 0.5f, 0.9f, 0.999f}) {
      const double p = static_cast<double>(dropped_draws(dropout)) / (1 << kDropoutBits);
      for (uint64_t seed = 0; seed < 5; ++seed) {
        Problem problem = shown(dropout, queries, 512);
        problem.dropout_seed = seed;
        const std::vector<float> out = out_of(problem);
        const auto n = static_cast<double>(out.size());
        const auto dropped = static_cast<double>(std::count(out.begin(), out.end(), 0.0f));
        EXPECT_LE(std::fabs(dropped - n * p), 5 * std::sqrt(n * p * (1 - p))) << dropout << " seed " << seed;
      }
    }
  }
}

TEST(Dropout, TheMeanOverSeedsIsTheResultWithoutIt) {
  constexpr int kSeeds = 400;
  std::mt19937_64 rng(2);
  Problem p;
  p.hq = 2, p.dv = 16;
  p.seqs = {random_sequence(rng, p, 3, 50)};
  const std::vector<float> expected = out_of(p);  // without dropout
  p.dropout = 0.25f;
  std::vector<double> mean(expected.size()), squares(expected.size());
  for (int seed = 0; seed < kSeeds; ++seed) {
    p.dropout_seed = static_cast<uint64_t>(seed);
    const std::vector<float> out = out_of(p);
    for (size_t n = 0; n < out.size(); ++n) {
      mean[n] += out[n] / kSeeds;
      squares[n] += double{out[n]} * out[n] / kSeeds;
    }
  }
  for (size_t n = 0; n < mean.size(); ++n) {
    const double deviation = std::sqrt((squares[n] - mean[n] * mean[n]) / kSeeds);
    EXPECT_GT(deviation, 0);
    EXPECT_LE(std::fabs(mean[n] - expected[n]), 5 * deviation) << n;
  }
}

TEST(Dropout, SeedAndOffsetAloneChooseTheMask) {
  Problem p = shown(0.5f, 5, 128);
  p.dropout_seed = 7, p.dropout_offset = 9;
  const std::vector<float> first = out_of(p);
  EXPECT_EQ(out_of(p), first);
  // Half of the elements of an independent mask agree.
  const auto differs = [&](uint64_t seed, uint64_t offset) {
    p.dropout_seed = seed, p.dropout_offset = offset;
    const std::vector<float> out = out_of(p);
    int64_t different = 0;
    for (size_t n = 0; n < out.size(); ++n) different += (out[n] != 0) != (first[n] != 0);
    const auto all = static_cast<double>(out.size());
    return std::fabs(static_cast<double>(different) - all / 2) <= 5 * std::sqrt(all) / 2;
  };
  EXPECT_TRUE(differs(8, 9));
  EXPECT_TRUE(differs(7, 10));
  EXPECT_TRUE(differs(9, 7));
  EXPECT_TRUE(differs(7 + (uint64_t{1} << 32), 9));
  EXPECT_TRUE(differs(7, 9 + (uint64_t{1} << 32)));
}

// Rows, heads and sequences draw for themselves.
TEST(Dropout, NoTwoRowsShareAMask) {
  Problem p = shown(0.5f, 20, 128);
  p.seqs.push_back(p.seqs[0]);
  const Result r = run(p, {.implementation = "cpu-engine"});
  ASSERT_EQ(r.status, FLASHSPARK_OK) << r.error;
  std::vector<std::vector<float>> rows;
  for (const Rows &seq : r.seqs) {
    for (size_t at = 0; at < seq.out.size(); at += 128) rows.emplace_back(&seq.out[at], &seq.out[at] + 128);
  }
  std::sort(rows.begin(), rows.end());
  EXPECT_EQ(std::adjacent_find(rows.begin(), rows.end()), rows.end());
}

TEST(Dropout, RoundsAtBothEnds) {
  for (const int64_t queries : {4, 64}) {
    const std::vector<float> all = out_of(shown(0, queries, 512));
    const std::vector<float> little = out_of(shown(1e-6f, queries, 512));  // a limit of 0
    for (size_t n = 0; n < all.size(); ++n) ASSERT_FLOAT_EQ(little[n], all[n] / (1 - 1e-6f));
    // One draw of 32768 is kept, and becomes a million times as much.
    const std::vector<float> most = out_of(shown(0.999999f, queries, 512));
    const auto kept = static_cast<double>(std::count_if(most.begin(), most.end(), [](float x) { return x != 0; }));
    const double expected = static_cast<double>(most.size()) / 32768;
    EXPECT_LE(std::fabs(kept - expected), 5 * std::sqrt(expected) + 1);
    for (const float x : most) ASSERT_TRUE(x == 0 || std::fabs(x * 512 * (1 - 0.999999f) - 1) < 1e-5) << x;
  }
}

TEST(Dropout, WithoutItNobodyLooksAtSeedOffsetAndState) {
  std::vector<float> q(8, 1), out(8);
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  p.num_seqs = p.num_heads_q = p.num_heads_kv = p.max_seqlen_q = p.max_seqlen_k = 1;
  p.head_dim = p.head_dim_v = 8;
  p.q = p.k = p.v = {q.data(), 8, 8, 8, FLASHSPARK_FLOAT32, 0};
  p.out = {out.data(), 8, 8, 8, FLASHSPARK_FLOAT32, 0};
  p.dropout_seed = p.dropout_offset = ~uint64_t{0};
  p.dropout_state = reinterpret_cast<const uint64_t *>(reinterpret_cast<const char *>(out.data()) + 1);  // misaligned
  for (const char *implementation : {"cpu-engine", "cpu-reference"}) {
    std::fill(out.begin(), out.end(), 0.0f);
    p.implementation = implementation;
    EXPECT_EQ(flashspark_attention_forward(&p), FLASHSPARK_OK) << flashspark_last_error();
    EXPECT_EQ(out, q) << implementation;
  }
}

}  // namespace
}  // namespace flashspark::test
