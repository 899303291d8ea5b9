// The shared case lists: every case of the matrix, engine against oracle on every SIMD target, and a table of what the
// matrix covers.
#include "cases/cases.hpp"

#include <gtest/gtest.h>

#include <set>

#include "support/use_target.hpp"

namespace flashspark::cases {
namespace {

class FeatureMatrix : public testing::TestWithParam<Case> {};

TEST_P(FeatureMatrix, EngineAgreesWithTheOracle) {
  Problem problem(GetParam());
  const Result expected = reference(problem);  // which knows no targets
  for (const cpu::Kernels *target : cpu::all_kernels()) {
    const test::UseTarget use(target);
    const Result got = problem.run("cpu-engine");
    ASSERT_EQ(got.status, FLASHSPARK_OK) << target->target << ": " << got.error;
    const Comparison c = compare(problem, got, expected);
    EXPECT_TRUE(c.passed()) << target->target << ": max error " << c.max_error << ", bound " << c.bound << ", ratio "
                            << c.ratio << ", lse max error " << c.lse_max_error << ", bound " << c.lse_bound
                            << ", nonfinite match " << c.nonfinite_match << ", untouched " << c.untouched;
  }
}

std::string case_name(const testing::TestParamInfo<Case> &info) {
  std::string name = std::to_string(info.index) + "_";
  for (const char c : info.param.name) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, FeatureMatrix, testing::ValuesIn(feature_matrix()), case_name);

TEST(Cases, NamesAreUnique) {
  std::set<std::string> names;
  for (const auto &list : {three_guide_checks(), feature_matrix(), bench_cases(), decode_cases(DecodeGrid::kFull)}) {
    for (const Case &c : list) EXPECT_TRUE(names.insert(c.name).second) << c.name;
  }
}

// The comparison itself can fail: one wrong element, a NaN, a write out of bounds.
TEST(Cases, TheComparisonSeesAWrongResult) {
  Case spec;
  spec.name = "probe";
  spec.lens = {{5, 40}};
  spec.head_dim = 16;
  Problem problem(spec);
  const Result good = problem.run("cpu-engine"), expected = reference(problem);
  ASSERT_TRUE(compare(problem, good, expected).passed());
  Result wrong = good;
  wrong.out[17] += 0.05f;
  EXPECT_FALSE(compare(problem, wrong, expected).passed());
  wrong = good;
  wrong.out[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(compare(problem, wrong, expected).passed());
  wrong = good;
  wrong.lse[2] += 0.01f;
  EXPECT_FALSE(compare(problem, wrong, expected).passed());
}

}  // namespace
}  // namespace flashspark::cases
