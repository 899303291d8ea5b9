// Every feature alone, in every layout, by every implementation, against the formula.
#include <gtest/gtest.h>

#include "support/features.hpp"

namespace flashspark::test {
namespace {

using Case = std::tuple<const char *, Feature, std::pair<const char *, Layout>>;

class Implementations : public testing::TestWithParam<Case> {};

TEST_P(Implementations, AgreesWithTheFormula) {
  const auto &[implementation, feature, named_layout] = GetParam();
  const Problem problem = problem_with(feature, 7);
  Layout layout = named_layout.second;
  layout.implementation = implementation;
  const bool oracle = std::string(implementation) == "cpu-reference";
  EXPECT_EQ(difference(problem, run(problem, layout), oracle), "");
}

std::string case_name(const testing::TestParamInfo<Case> &info) {
  const auto &[implementation, feature, layout] = info.param;
  return std::string(implementation).substr(4) + "_" + feature.name + "_" + layout.first;
}

INSTANTIATE_TEST_SUITE_P(Features, Implementations,
                         testing::Combine(testing::Values("cpu-reference", "cpu-engine"), testing::ValuesIn(features()),
                                          testing::ValuesIn(layouts())),
                         case_name);

// Split over KV, one thread or many, with masks: still the formula.
TEST(Splits, EverySplitCountAgreesWithTheFormula) {
  for (const Feature &feature : features()) {
    const Problem problem = problem_with(feature, 11);
    for (int32_t splits : {1, 2, 3, 7}) {
      const Layout layout{.kv = Kind::kPaged, .implementation = "cpu-engine", .num_splits = splits};
      EXPECT_EQ(difference(problem, run(problem, layout), false), "") << feature.name << " splits " << splits;
    }
  }
}

// Long enough that every tile size has full tiles, ragged ends and skipped tiles.
TEST(Sizes, LongSequencesAgreeWithTheFormula) {
  std::mt19937_64 rng(5);
  for (const bool causal : {false, true}) {
    for (const int64_t window : {-1, 100}) {
      Problem p;
      p.hq = 2;
      p.d = 64;
      p.dv = 32;
      p.scale = 0.125f;
      p.window_left = window;
      for (const auto &[tq, tk] : {std::pair<int, int>{1, 1029}, {257, 515}, {300, 40}, {130, 130}}) {
        p.seqs.push_back(random_sequence(rng, p, tq, tk));
        p.seqs.back().causal = causal;
      }
      for (const Kind kind : {Kind::kVarlen, Kind::kPaged}) {
        const Result result = run(p, {.kv = kind, .page_size = 112, .implementation = "cpu-engine"});
        EXPECT_EQ(difference(p, result, false), "") << "causal " << causal << " window " << window;
      }
    }
  }
}

}  // namespace
}  // namespace flashspark::test
