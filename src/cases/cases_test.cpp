// The yardstick itself: the bound lets rounding pass and nothing else, and layouts do not change the values.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <set>

#include "cases/cases.hpp"

namespace flashspark::cases {
namespace {

Case paged_case(int32_t dtype) {
  Case c;
  c.name = "paged";
  c.lens = {{40, 200}, {1, 1000}, {17, 64}};
  c.heads_q = 4, c.heads_kv = 2;
  c.kv_layout = Layout::kPaged;
  c.causal = true;
  c.q_dtype = c.kv_dtype = c.out_dtype = dtype;
  return c;
}

// Runs the oracle on params that `spoil` has changed and compares with the result for the right ones.
Comparison spoiled(const Case &spec, const std::function<void(Problem &)> &spoil) {
  Problem problem(spec);
  const Result expected = reference(problem);
  EXPECT_EQ(expected.status, FLASHSPARK_OK) << expected.error;
  EXPECT_TRUE(compare(problem, problem.run("cpu-reference"), expected).passed());
  const flashspark_attention_params right = problem.params;
  spoil(problem);
  const Result got = problem.run("cpu-reference");
  EXPECT_EQ(got.status, FLASHSPARK_OK) << got.error;
  problem.params = right;
  return compare(problem, got, expected);
}

class EveryDtype : public testing::TestWithParam<int32_t> {};
INSTANTIATE_TEST_SUITE_P(Dtypes, EveryDtype,
                         testing::Values(FLASHSPARK_FLOAT32, FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16),
                         [](const auto &dtype) { return dtype_name(dtype.param); });

TEST_P(EveryDtype, BoundRefusesAScaleOnePercentOff) {
  for (const bool lse : {true, false}) {
    Case c = paged_case(GetParam());
    c.lse = lse;
    EXPECT_GT(spoiled(c, [](Problem &p) { p.params.softmax_scale *= 1.01f; }).ratio, 1) << lse;
  }
}

TEST_P(EveryDtype, BoundRefusesALostKey) {
  for (const bool lse : {true, false}) {
    Case c = paged_case(GetParam());
    c.lens = {{1, 1000}};
    c.lse = lse;
    EXPECT_GT(spoiled(c, [](Problem &p) { --const_cast<int32_t *>(p.params.seqused_k)[0]; }).ratio, 1) << lse;
  }
}

TEST_P(EveryDtype, BoundRefusesAWrongMask) {
  EXPECT_GT(spoiled(paged_case(GetParam()), [](Problem &p) { p.params.causal = 0; }).ratio, 1);
  Case c = paged_case(GetParam());
  c.window_left = 30;
  EXPECT_GT(spoiled(c, [](Problem &p) { p.params.window_left = 31; }).ratio, 1);
  EXPECT_GT(spoiled(c, [](Problem &p) { p.params.window_left = 29; }).ratio, 1);
}

TEST_P(EveryDtype, BoundRefusesSwappedPages) {
  const auto swap = [](Problem &p) {  // page 11 lies on the diagonal; order does not matter below it
    auto *table = const_cast<int32_t *>(p.params.page_table);
    std::swap(table[0], table[11]);
  };
  EXPECT_GT(spoiled(paged_case(GetParam()), swap).ratio, 1);
}

TEST(Compare, SeesALostSinkInFloat32AndBfloat16) {
  for (const int32_t dtype : {FLASHSPARK_FLOAT32, FLASHSPARK_BFLOAT16}) {
    Case c = paged_case(dtype);
    c.sinks = true;
    EXPECT_GT(spoiled(c, [](Problem &p) { p.params.sinks = nullptr; }).ratio, 1);
  }
}

TEST(Compare, RefusesNanFromPadding) {
  Case c = paged_case(FLASHSPARK_BFLOAT16);
  c.lens = {{1, 999}};  // ends inside a page: the next key is NaN
  c.causal = false;
  EXPECT_FALSE(spoiled(c, [](Problem &p) { ++const_cast<int32_t *>(p.params.seqused_k)[0]; }).nonfinite_match);
}

TEST(Compare, SeesWritesOutsideTheRowsInUse) {
  Case c = paged_case(FLASHSPARK_BFLOAT16);
  c.strided = c.seqused_q = true;
  Problem problem(c);
  const Result expected = reference(problem);
  const auto *rows = static_cast<uint16_t *>(problem.params.out.data);
  const int64_t head_dim = c.head_dim, row_out_of_use = c.lens[0].q * problem.params.out.token_stride;
  for (const int64_t index : {int64_t{-1}, head_dim, row_out_of_use}) {
    const Result got = problem.run("cpu-reference");
    EXPECT_TRUE(compare(problem, got, expected).passed());
    const_cast<uint16_t *>(rows)[index] = 0;
    EXPECT_FALSE(compare(problem, got, expected).untouched) << index;
  }
  const Result got = problem.run("cpu-reference");
  problem.params.lse[c.lens[0].q * problem.params.lse_token_stride] = 0;
  EXPECT_FALSE(compare(problem, got, expected).untouched);
}

TEST(Compare, SeesARowThatWasNotWritten) {
  Problem problem(paged_case(FLASHSPARK_BFLOAT16));
  const Result expected = reference(problem);
  problem.poison();
  EXPECT_FALSE(compare(problem, problem.result(), expected).nonfinite_match);
}

TEST(Problem, LayoutDoesNotChangeTheAttention) {
  Case plain = paged_case(FLASHSPARK_FLOAT32);
  plain.kv_layout = Layout::kVarlen;
  Problem problem(plain);
  const Result expected = problem.run("cpu-reference");
  const std::function<void(Case &)> changes[] = {
      [](Case &c) { c.kv_layout = Layout::kPaged, c.page_size = 48, c.packed_kv = true; },
      [](Case &c) { c.kv_layout = Layout::kPaged, c.cache_order = CacheOrder::kPageHeadToken; },
      [](Case &c) { c.kv_layout = c.q_layout = Layout::kDense, c.kv_batch_index = true; },
      [](Case &c) { c.strided = c.seqused_q = c.seqused_k = true; },
  };
  for (const auto &change : changes) {
    Case c = plain;
    change(c);
    Problem other(c);
    const Result got = other.run("cpu-reference");
    EXPECT_EQ(got.out, expected.out);
    EXPECT_EQ(got.lse, expected.lse);
  }
}

// The mask written in values.cpp against the oracle's: with equal scores lse is the logarithm of the number of keys.
TEST(Problem, KeepsAgreesWithTheOracle) {
  for (Case c : feature_matrix()) {
    const bool biased = c.rel_extent > 0 || c.alibi || c.sinks;
    if (c.group != "mask" && c.group != "edge" && c.group != "layout") continue;
    if (biased) c.rel_extent = 0, c.alibi = c.sinks = false;
    c.softmax_scale = 0;
    c.lse = true;
    Problem problem(c);
    const Result got = problem.run("cpu-reference");
    ASSERT_EQ(got.status, FLASHSPARK_OK) << c.name << ": " << got.error;
    for (int64_t b = 0; b < problem.params.num_seqs; ++b) {
      for (int64_t i = 0; i < problem.seqlen_q(b); ++i) {
        int64_t kept = 0;
        for (int64_t j = 0; j < problem.seqlen_k(b); ++j) kept += problem.keeps(b, i, j);
        const float lse = got.lse[(problem.row_begin(b) + i) * c.heads_q];
        ASSERT_EQ(std::lround(std::exp(lse)), kept) << c.name << " sequence " << b << " row " << i;
      }
    }
  }
}

TEST(Problem, PeakedInputLiftsTheRowMaximumInJumps) {
  Case c = paged_case(FLASHSPARK_FLOAT32);
  c.lens = {{1, 2000}};
  c.causal = false;
  c.input = Input::kPeaked;
  Problem problem(c);
  double maximum = 0;
  int jumps = 0;
  for (int64_t j = 0; j < 2000; ++j) {
    double score = 0;
    for (int64_t d = 0; d < c.head_dim; ++d)
      score += double{problem.get(Role::kQ, 0, 0, 0, d)} * problem.get(Role::kK, 0, j, 0, d);
    score *= problem.params.softmax_scale;
    if (score > maximum + 15) ++jumps;
    maximum = std::max(maximum, score);
  }
  EXPECT_EQ(jumps, 3);
  EXPECT_GT(maximum, 80);
  EXPECT_LT(maximum, problem.score_scale(0, 0, 0));
}

TEST(Lists, NamesAreUniqueAndGroupsArePrefixes) {
  std::set<std::string> names;
  for (const auto &list : {three_guide_checks(), feature_matrix(), bench_cases()}) {
    for (const Case &c : list) {
      EXPECT_TRUE(names.insert(c.name).second) << c.name;
      EXPECT_TRUE(c.group == "bench" || c.name.starts_with(c.group + "/")) << c.name;
    }
  }
}

TEST(Lists, CountsCausalPairsExactly) {
  const Problem problem(three_guide_checks()[0]);
  EXPECT_EQ(problem.num_pairs(), 1024 * 1025 / 2);
  EXPECT_EQ(problem.flops(), 2.0 * 16 * (1024 * 1025 / 2.0) * 256);
  EXPECT_EQ(problem.bytes(), 4.0 * 1024 * 16 * 128 * 2);
}

TEST(Codec, EveryPatternSurvivesARoundTrip) {
  for (const int32_t dtype : {FLASHSPARK_FLOAT16, FLASHSPARK_BFLOAT16, FLASHSPARK_FLOAT8_E4M3}) {
    const uint32_t patterns = dtype == FLASHSPARK_FLOAT8_E4M3 ? 1u << 8 : 1u << 16;
    for (uint32_t bits = 0; bits < patterns; ++bits) {
      uint16_t in = static_cast<uint16_t>(bits), out = 0;
      const float value = load(dtype, &in, 0);
      if (std::isnan(value)) continue;
      store(dtype, &out, 0, value);
      ASSERT_EQ(out, in) << dtype_name(dtype) << " " << bits;
    }
  }
}

TEST(Codec, RoundsToNearestEvenAndSaturatesE4m3) {
  const auto rounded = [](int32_t dtype, float value) {
    uint16_t bits = 0;
    store(dtype, &bits, 0, value);
    return load(dtype, &bits, 0);
  };
  EXPECT_EQ(rounded(FLASHSPARK_BFLOAT16, 1 + 0x1p-8f), 1);
  EXPECT_EQ(rounded(FLASHSPARK_BFLOAT16, 1 + 3 * 0x1p-8f), 1 + 4 * 0x1p-8f);
  EXPECT_EQ(rounded(FLASHSPARK_FLOAT16, 65520), INFINITY);
  EXPECT_EQ(rounded(FLASHSPARK_FLOAT16, 0x1p-25f), 0);
  EXPECT_EQ(rounded(FLASHSPARK_FLOAT8_E4M3, 1e6f), 448);
  EXPECT_EQ(rounded(FLASHSPARK_FLOAT8_E4M3, -INFINITY), -448);
  EXPECT_EQ(rounded(FLASHSPARK_FLOAT8_E4M3, 0x1p-10f), 0);
  EXPECT_EQ(rounded(FLASHSPARK_FLOAT8_E4M3, 3 * 0x1p-10f), 0x1p-8f);
}

}  // namespace
}  // namespace flashspark::cases
