// The backward pass of the CPU: every case of the matrix that has gradients, engine against oracle.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "cases/backward.hpp"
#include "support/use_target.hpp"

namespace flashspark::cases {
namespace {

const std::vector<Case> &matrix() {
  static const std::vector<Case> cases = backward_matrix();
  return cases;
}

class BackwardMatrix : public testing::TestWithParam<size_t> {};

TEST_P(BackwardMatrix, EngineAgreesWithTheOracle) {
  BackwardProblem problem(matrix()[GetParam()]);
  const Gradients expected = problem.run("cpu-reference");  // which knows no targets
  // Some cases on every SIMD target; they differ in most of what there is.
  const auto targets = cpu::all_kernels();
  for (const cpu::Kernels *target : GetParam() % 5 == 0 ? targets : targets.first(1)) {
    const test::UseTarget use(target);
    const Gradients got = problem.run("cpu-engine");
    const GradientComparison c = compare_of("cpu-engine", problem, got, expected);
    EXPECT_TRUE(c.passed()) << target->target << ": " << c.worst << ", ratio " << c.ratio;
  }
}

std::string case_name(const testing::TestParamInfo<size_t> &info) {
  std::string name = std::to_string(info.index) + "_";
  for (const char c : matrix()[info.param].name) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, BackwardMatrix, testing::Range(size_t{0}, matrix().size()), case_name);

TEST(Backward, SomeCasesOfTheMatrixRunOnEveryTarget) {
  EXPECT_GT(matrix().size() / 5, 10u);
}

Case small_case() {
  Case c;
  c.name = "probe";
  c.lens = {{130, 250}, {0, 7}, {7, 3}, {200, 200}};
  c.heads_q = 4, c.heads_kv = 2, c.head_dim = 40, c.head_dim_v = 24;
  c.causal = c.sinks = c.alibi = true;
  c.rel_extent = 60, c.dropout = 0.25f;
  return c;
}

// The comparison itself can fail.
TEST(Backward, TheComparisonSeesAWrongGradient) {
  BackwardProblem problem(small_case());
  const Gradients expected = problem.run("cpu-reference"), good = problem.run("cpu-engine");
  const auto against = [&](const Gradients &got) { return compare_of("cpu-engine", problem, got, expected); };
  ASSERT_TRUE(against(good).passed()) << against(good).worst;
  for (std::vector<float> Gradients::*field :
       {&Gradients::dq, &Gradients::dk, &Gradients::dv, &Gradients::dsinks, &Gradients::drel, &Gradients::dalibi}) {
    ASSERT_FALSE((good.*field).empty());
    Gradients wrong = good;
    float largest = 0;
    for (const float x : good.*field) largest = std::max(largest, std::fabs(x));
    (wrong.*field)[(wrong.*field).size() / 2] += 0.05f * largest;
    EXPECT_FALSE(against(wrong).passed());
    (wrong.*field)[(wrong.*field).size() / 2] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_FALSE(against(wrong).passed());
  }
}

constexpr std::vector<float> Gradients::*kProducts[] = {&Gradients::dq, &Gradients::dk, &Gradients::dv};

// A row with two keys, whose dS have opposite signs, as the keys have: no term takes from another one.
TEST(BackwardMagnitudes, AreTheGradientsWhereNoTermsCancel) {
  Case c;
  c.name = "two keys";
  c.lens = {{1, 2}};
  c.heads_q = c.heads_kv = 2;
  c.softcap = 3;
  c.q_dtype = c.kv_dtype = FLASHSPARK_FLOAT32;
  BackwardProblem problem(c);
  problem.params.dlse = nullptr;
  for (int64_t j = 0; j < 2; ++j) {
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t d = 0; d < c.head_dim; ++d) {
        const float x = std::fabs(problem.forward.get(Role::kK, 0, j, h, d)) * 0.1f;
        problem.forward.set(Role::kK, 0, j, h, d, j == 0 ? x : -x);
      }
    }
  }
  ASSERT_EQ(problem.forward.launch("cpu-reference", 0), FLASHSPARK_OK) << flashspark_last_error();
  const Gradients g = problem.run("cpu-reference"), most = magnitudes(problem);
  for (const auto field : kProducts) {
    ASSERT_EQ((g.*field).size(), (most.*field).size());
    float largest = 0;
    for (const float x : most.*field) largest = std::max(largest, x);
    for (size_t n = 0; n < (g.*field).size(); ++n)
      ASSERT_NEAR(std::fabs((g.*field)[n]), (most.*field)[n], 1e-5f * largest) << n;
  }
}

TEST(BackwardMagnitudes, BoundWhatRoundingTheFactorsMoves) {
  BackwardProblem problem(small_case());
  const Gradients expected = problem.run("cpu-reference"), most = magnitudes(problem);
  for (const auto field : kProducts) {
    ASSERT_EQ((expected.*field).size(), (most.*field).size());
    for (size_t n = 0; n < (most.*field).size(); ++n)
      ASSERT_LE(std::fabs((expected.*field)[n]), 1.01f * (most.*field)[n] + 1e-6f) << n;
    for (const float roundings : {2.0f, -2.0f, 12.0f}) {
      Gradients moved = expected;
      for (size_t n = 0; n < (most.*field).size(); ++n) (moved.*field)[n] += roundings * 0x1p-8f * (most.*field)[n];
      EXPECT_EQ(compare(problem, moved, expected, &most).passed(), roundings < 3) << roundings;
      EXPECT_FALSE(compare(problem, moved, expected).passed());
    }
  }
}

bool same_bits(const Gradients &a, const Gradients &b) {
  return a.dq == b.dq && a.dk == b.dk && a.dv == b.dv && a.dsinks == b.dsinks && a.drel == b.drel &&
         a.dalibi == b.dalibi;
}

TEST(Backward, DeterministicGradientsDoNotDependOnTheThreads) {
  for (const int64_t heads_kv : {1, 4}) {
    Case c = small_case();
    c.heads_kv = heads_kv;
    c.lens = {{700, 900}, {7, 3}};
    BackwardProblem problem(c);
    problem.params.forward.deterministic = 1;
    const Gradients one = problem.run("cpu-engine", 1);
    ASSERT_EQ(one.status, FLASHSPARK_OK) << one.error;
    for (const int threads : {2, 3, 8}) EXPECT_TRUE(same_bits(one, problem.run("cpu-engine", threads))) << threads;
    const GradientComparison against = compare_of("cpu-engine", problem, one, problem.run("cpu-reference"));
    EXPECT_TRUE(against.passed()) << against.worst;
  }
}

// With more threads than heads the keys of a head are shared.
TEST(Backward, SharedHeadsAgreeWithTheOracle) {
  Case c = small_case();
  c.heads_q = 2, c.heads_kv = 1;
  c.lens = {{300, 1300}, {100, 100}};
  BackwardProblem problem(c);
  const GradientComparison against =
      compare_of("cpu-engine", problem, problem.run("cpu-engine", 5), problem.run("cpu-reference"));
  EXPECT_TRUE(against.passed()) << against.worst;
}

TEST(Backward, OnlyWantedGradientsAreWritten) {
  BackwardProblem problem(small_case());
  const Gradients whole = problem.run("cpu-engine", 1);
  const flashspark_attention_backward_params all = problem.params;
  for (int wanted = 0; wanted < 64; ++wanted) {
    problem.params = all;
    if ((wanted & 1) == 0) problem.params.dq.data = nullptr;
    if ((wanted & 2) == 0) problem.params.dk.data = nullptr;
    if ((wanted & 4) == 0) problem.params.dv.data = nullptr;
    if ((wanted & 8) == 0) problem.params.dsinks = nullptr;
    if ((wanted & 16) == 0) problem.params.drel_logits = nullptr;
    if ((wanted & 32) == 0) problem.params.dalibi_slopes = nullptr;
    const Gradients part = problem.run("cpu-engine", 1);
    ASSERT_EQ(part.status, FLASHSPARK_OK) << part.error;
    EXPECT_EQ(part.dq, (wanted & 1) != 0 ? whole.dq : std::vector<float>()) << wanted;
    EXPECT_EQ(part.dk, (wanted & 2) != 0 ? whole.dk : std::vector<float>()) << wanted;
    EXPECT_EQ(part.dv, (wanted & 4) != 0 ? whole.dv : std::vector<float>()) << wanted;
    EXPECT_EQ(part.dsinks, (wanted & 8) != 0 ? whole.dsinks : std::vector<float>()) << wanted;
    EXPECT_EQ(part.drel, (wanted & 16) != 0 ? whole.drel : std::vector<float>()) << wanted;
    EXPECT_EQ(part.dalibi, (wanted & 32) != 0 ? whole.dalibi : std::vector<float>()) << wanted;
  }
}

}  // namespace
}  // namespace flashspark::cases
