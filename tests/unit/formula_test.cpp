// Examples small enough to compute by hand. They pin the implementations and the tests' own formula alike.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/model.hpp"

namespace flashspark::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kLn2 = std::log(2.0f);

// One head of width 8. A query is (x, 0, ..), a key (y, 0, ..): the score is x * y. A value is (z, 2z, 0, ..).
Sequence sequence_of(const std::vector<float> &queries, const std::vector<float> &keys,
                     const std::vector<float> &values) {
  Sequence s;
  s.tq = static_cast<int64_t>(queries.size());
  s.tk = static_cast<int64_t>(keys.size());
  const auto rows = [](const std::vector<float> &first, float second) {
    std::vector<float> all(first.size() * 8, 0.0f);
    for (size_t n = 0; n < first.size(); ++n) {
      all[8 * n] = first[n];
      all[8 * n + 1] = first[n] * second;
    }
    return all;
  };
  s.q = rows(queries, 0);
  s.k = rows(keys, 0);
  s.v = rows(values, 2);
  return s;
}

class ByHand : public testing::TestWithParam<const char *> {
 protected:
  // out[i] is the first column of row i, lse[i] its logarithm.
  void expect(const Problem &p, const std::vector<float> &out, const std::vector<float> &lse) {
    const Result r = run(p, {.implementation = GetParam()});
    ASSERT_EQ(r.status, FLASHSPARK_OK) << r.error;
    const Truth t = truth(p, p.seqs[0]);
    for (size_t i = 0; i < out.size(); ++i) {
      check(r.seqs[0].out[8 * i], out[i], "out", i);
      check(r.seqs[0].out[8 * i + 1], 2 * out[i], "out column 1", i);
      check(r.seqs[0].lse[i], lse[i], "lse", i);
      check(static_cast<float>(t.out[8 * i]), out[i], "formula out", i);
      check(static_cast<float>(t.lse[i]), lse[i], "formula lse", i);
    }
  }

 private:
  static void check(float got, float want, const char *what, size_t i) {
    if (std::isinf(want)) {
      EXPECT_EQ(got, want) << what << " row " << i;
    } else {
      EXPECT_NEAR(got, want, 2e-6f * (1 + std::fabs(want))) << what << " row " << i;
    }
  }
};

TEST_P(ByHand, OneKeyGivesItsValue) {
  Problem p;
  p.scale = 0.5f;
  p.seqs = {sequence_of({3}, {4}, {7})};
  expect(p, {7}, {6});  // lse = 0.5 * 3 * 4
}

TEST_P(ByHand, WeightsFollowTheScores) {
  Problem p;
  p.seqs = {sequence_of({1}, {0, kLn2}, {3, 9})};  // weights 1 : 2
  expect(p, {7}, {std::log(3.0f)});
}

TEST_P(ByHand, CausalIsAlignedBottomRight) {
  Problem p;
  p.seqs = {sequence_of({0, 0}, {1, 1, 1, 1}, {1, 2, 3, 4})};
  p.seqs[0].causal = true;
  expect(p, {2, 2.5f}, {std::log(3.0f), std::log(4.0f)});
}

TEST_P(ByHand, RowsWithoutKeysGiveZero) {
  Problem p;
  p.seqs = {sequence_of({0, 0, 0}, {1}, {5})};  // positions -2, -1, 0
  p.seqs[0].causal = true;
  expect(p, {0, 0, 5}, {-kInf, -kInf, 0});
}

TEST_P(ByHand, RowsWithoutKeysKeepTheSinkInLse) {
  Problem p;
  p.sinks = {1.25f};
  p.seqs = {sequence_of({0, 0}, {1}, {5})};
  p.seqs[0].causal = true;
  expect(p, {0, 5 / (1 + std::exp(1.25f))}, {1.25f, std::log(1 + std::exp(1.25f))});
}

TEST_P(ByHand, WindowsAreInclusive) {
  Problem p;
  p.window_left = 1;
  p.window_right = 0;
  p.seqs = {sequence_of({0, 0, 0}, {1, 1, 1}, {2, 4, 8})};
  expect(p, {2, 3, 6}, {0, kLn2, kLn2});
  p.window_left = 0;
  p.window_right = 1;
  expect(p, {3, 6, 8}, {kLn2, kLn2, 0});
}

TEST_P(ByHand, SinkTakesItsShare) {
  Problem p;
  p.sinks = {kLn2};
  p.seqs = {sequence_of({0}, {1, 1}, {4, 8})};  // weights 1 : 1 : 2
  expect(p, {3}, {std::log(4.0f)});
}

TEST_P(ByHand, SoftcapBendsTheScoreBeforeBiases) {
  Problem p;
  p.softcap = 2;
  p.seqs = {sequence_of({3}, {4}, {1})};
  p.seqs[0].alibi = {0.5f};
  p.rel_extent = 1;
  p.seqs[0].rel = {0.75f};
  expect(p, {1}, {2 * std::tanh(6.0f) + 0.75f});
}

TEST_P(ByHand, AlibiFallsWithDistanceOnBothSides) {
  Problem p;
  p.seqs = {sequence_of({0, 0}, {1, 1}, {3, 6})};
  p.seqs[0].alibi = {kLn2};  // one step away: half the weight
  expect(p, {4, 5}, {std::log(1.5f), std::log(1.5f)});
}

TEST_P(ByHand, RelativeBiasBelongsToTheQueryAndLooksBack) {
  Problem p;
  p.rel_extent = 2;
  p.seqs = {sequence_of({0, 0}, {1, 1, 1}, {3, 6, 9})};  // positions 1, 2
  p.seqs[0].rel = {0, kLn2, kLn2, 0};                    // row 0: distance 1 counts double; row 1: distance 0
  expect(p, {(2 * 3 + 6 + 9) / 4.0f, (3 + 6 + 2 * 9) / 4.0f}, {std::log(4.0f), std::log(4.0f)});
}

TEST_P(ByHand, PrefixRangeOpensTheFuture) {
  Problem p;
  p.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  p.seqs = {sequence_of({0, 0, 0, 0}, {1, 1, 1, 1}, {1, 2, 3, 6})};
  p.seqs[0].causal = true;
  p.seqs[0].ranges = {{1, 2}};
  expect(p, {1, 2, 2, 3}, {0, std::log(3.0f), std::log(3.0f), std::log(4.0f)});
}

TEST_P(ByHand, RswaSeesThePrefixAndTheNearKeys) {
  Problem p;
  p.rswa_window = 1;
  p.seqs = {sequence_of({0, 0, 0, 0}, {1, 1, 1, 1}, {2, 4, 6, 8})};
  p.seqs[0].causal = true;
  p.seqs[0].rswa_prefix = 1;
  expect(p, {2, 3, 4, 5}, {0, kLn2, kLn2, kLn2});
}

TEST_P(ByHand, DescalesAndOutputScale) {
  Problem p;
  p.q_dtype = p.kv_dtype = p.out_dtype = FLASHSPARK_FLOAT8_E4M3;
  p.output_scale = 0.5f;
  p.seqs = {sequence_of({2}, {4}, {8})};
  p.seqs[0].q_scale = {0.5f};
  p.seqs[0].k_scale = {0.25f};
  p.seqs[0].v_scale = {2};
  expect(p, {32}, {1});  // lse = 2 * 4 / 8; out = 8 * 2 / 0.5
  p.output_scale = 0.015625f;
  const Result r = run(p, {.implementation = GetParam()});
  EXPECT_EQ(r.seqs[0].out[0], 448) << "8 * 2 * 64 = 1024 saturates";
}

TEST_P(ByHand, ScoresBeyondExpStayFinite) {
  Problem p;
  p.seqs = {sequence_of({100}, {90, -90, 100}, {1, 2, 3})};
  expect(p, {3}, {10000});
}

TEST_P(ByHand, InfiniteBiasMasksItsKey) {
  Problem p;
  p.rel_extent = 3;
  p.seqs = {sequence_of({0}, {1, 1, 1}, {1, 3, 50})};
  p.seqs[0].rel = {-kInf, 0, 0};  // distance 0 is the last key
  expect(p, {2}, {kLn2});
  p.seqs[0].rel = {-kInf, -kInf, -kInf};
  expect(p, {0}, {-kInf});
}

INSTANTIATE_TEST_SUITE_P(Formula, ByHand, testing::Values("cpu-reference", "cpu-engine"),
                         [](const auto &info) { return std::string(info.param).substr(4); });

}  // namespace
}  // namespace flashspark::test
