// NaN and infinity in keys and values that a row's mask drops: what flashspark.h says of each implementation.
#include <gtest/gtest.h>

#include <cmath>

#include "support/model.hpp"

namespace flashspark::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Mask {
  const char *name;
  void (*set)(Problem &);
};
const Mask kMasks[] = {
    {"Causal", [](Problem &p) { p.seqs[0].causal = true; }},
    {"Window", [](Problem &p) { p.window_left = 9, p.window_right = 4; }},
    {"Chunk", [](Problem &p) { p.attention_chunk = 16; }},
    {"Prefix",
     [](Problem &p) {
       p.seqs[0].causal = true, p.window_left = 5;
       p.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
       p.seqs[0].ranges = {{3, 30}, {50, 60}};
     }},
    {"Rswa", [](Problem &p) { p.seqs[0].causal = true, p.rswa_window = 8, p.seqs[0].rswa_prefix = 5; }},
};

// keep[j][i]: may row i see key j? By the formula: with equal scores and one value, that of key j, who is not 0?
std::vector<std::vector<bool>> kept(const Problem &p) {
  Problem one = p;
  one.scale = 0;
  one.d = one.dv = 1;
  Sequence &s = one.seqs[0];
  s.q.assign(s.tq, 0), s.k.assign(s.tk, 0);
  std::vector<std::vector<bool>> keep(s.tk, std::vector<bool>(s.tq));
  for (int64_t j = 0; j < s.tk; ++j) {
    s.v.assign(s.tk, 0);
    s.v[j] = 1;
    const Truth t = truth(one, s);
    for (int64_t i = 0; i < s.tq; ++i) keep[j][i] = t.out[i] != 0;
  }
  return keep;
}

class MaskedNan : public testing::TestWithParam<std::tuple<const char *, Mask, int64_t, float>> {
 protected:
  static constexpr int64_t kKeys = 150;
  static Problem problem(const Mask &mask, int64_t queries) {
    std::mt19937_64 rng(2);
    Problem p;
    p.seqs = {random_sequence(rng, p, queries, kKeys)};
    mask.set(p);
    return p;
  }
};

// A dropped key's number is never seen, whatever the implementation.
TEST_P(MaskedNan, KeysThatARowDropsDoNotReachIt) {
  const auto &[implementation, mask, queries, bad] = GetParam();
  const Problem clean = problem(mask, queries);
  const Result want = run(clean, {.implementation = implementation, .num_splits = 1});
  const auto keep = kept(clean);
  for (const int64_t j : {0, 20, 55, 131, 149}) {
    Problem p = clean;
    p.seqs[0].k[j * p.d + 1] = bad;
    const Result got = run(p, {.implementation = implementation, .num_splits = 1});
    ASSERT_EQ(got.status, FLASHSPARK_OK) << got.error;
    for (int64_t i = 0; i < queries; ++i) {
      if (keep[j][i]) continue;
      for (int64_t c = 0; c < p.dv; ++c) ASSERT_EQ(got.seqs[0].out[i * p.dv + c], want.seqs[0].out[i * p.dv + c]);
      ASSERT_EQ(got.seqs[0].lse[i], want.seqs[0].lse[i]);
    }
  }
}

// A dropped value is never seen by the oracle. The engine may make NaN of it, in its own column alone, and not where it
// lies before or behind all keys that rows of the sequence keep. lse knows no values.
TEST_P(MaskedNan, ValuesThatARowDropsReachItOnlyWhereSaid) {
  const auto &[implementation, mask, queries, bad] = GetParam();
  const bool oracle = std::string(implementation) == "cpu-reference";
  const Problem clean = problem(mask, queries);
  const Result want = run(clean, {.implementation = implementation, .num_splits = 1});
  const auto keep = kept(clean);
  for (const int64_t j : {0, 20, 55, 131, 149}) {
    Problem p = clean;
    p.seqs[0].v[j * p.dv + 1] = bad;
    bool before = false, behind = false;  // some row keeps j or a key before it, or behind it
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t key = 0; key < kKeys && !(before && behind); ++key) {
        if (!keep[key][i]) continue;
        before |= key <= j;
        behind |= key >= j;
      }
    }
    const Result got = run(p, {.implementation = implementation, .num_splits = 1});
    ASSERT_EQ(got.status, FLASHSPARK_OK) << got.error;
    for (int64_t i = 0; i < queries; ++i) {
      ASSERT_EQ(got.seqs[0].lse[i], want.seqs[0].lse[i]);
      if (keep[j][i]) continue;
      for (int64_t c = 0; c < p.dv; ++c) {
        const float x = got.seqs[0].out[i * p.dv + c];
        const bool may_be_nan = !oracle && c == 1 && before && behind;
        if (may_be_nan && std::isnan(x)) continue;
        ASSERT_EQ(x, want.seqs[0].out[i * p.dv + c]) << "key " << j << " row " << i << " column " << c;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, MaskedNan,
                         testing::Combine(testing::Values("cpu-reference", "cpu-engine"), testing::ValuesIn(kMasks),
                                          testing::Values(3, 100),  // the streaming kernel, the packed one
                                          testing::Values(NAN, kInf, -kInf)),
                         [](const auto &info) {
                           const float bad = std::get<3>(info.param);
                           return std::string(std::get<0>(info.param)).substr(4) + "_" + std::get<1>(info.param).name +
                                  "_" + std::to_string(std::get<2>(info.param)) +
                                  (std::isnan(bad) ? "_Nan"
                                   : bad > 0       ? "_Inf"
                                                   : "_MinusInf");
                         });

}  // namespace
}  // namespace flashspark::test
