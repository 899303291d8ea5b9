// Cases that must reduce to simpler ones: repeated heads, last rows, and limits of scale, softcap, window, sinks and
// bias.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "support/arbitrary.hpp"

namespace flashspark::test {
namespace {

void require(const std::string &verdict) {
  if (!verdict.empty()) RC_FAIL(verdict);
}

constexpr float kInf = std::numeric_limits<float>::infinity();

// Requires that `other` gives the same result as `p` in the same layout.
void same(const Problem &p, const Problem &other) {
  const Layout layout = arbitrary_layout();
  require(difference(p, run(p, layout), run(other, layout)));
}

RC_GTEST_PROP(Heads, GqaEqualsRepeatedHeads, ()) {
  const Problem p = arbitrary_problem();
  const int64_t group = p.hq / p.hkv;
  Problem repeated = p;
  repeated.hkv = p.hq;
  const auto spread = [&](const std::vector<float> &from, int64_t width) {
    std::vector<float> to;
    for (size_t row = 0; row < from.size() / (p.hkv * width); ++row) {
      for (int64_t h = 0; h < p.hq; ++h) {
        const auto begin = from.begin() + (row * p.hkv + h / group) * width;
        to.insert(to.end(), begin, begin + width);
      }
    }
    return to;
  };
  for (Sequence &s : repeated.seqs) {
    s.k = spread(s.k, p.d);
    s.v = spread(s.v, p.dv);
    for (auto *scale : {&s.q_scale, &s.k_scale, &s.v_scale}) *scale = spread(*scale, 1);
  }
  same(p, repeated);
}

// Decoding the last n queries gives the last n rows of the full result, for any mask.
RC_GTEST_PROP(Rows, CausalWithAppendedQueriesEqualsTheLastRows, ()) {
  const Problem p = arbitrary_problem();
  Problem tail = p;
  const Result whole = run(p, arbitrary_layout());
  RC_ASSERT(whole.status == FLASHSPARK_OK);
  Result expected = whole;
  for (size_t b = 0; b < p.seqs.size(); ++b) {
    const int64_t drop = *rc::gen::inRange<int64_t>(0, p.seqs[b].tq + 1);
    Sequence &s = tail.seqs[b];
    const auto shorten = [&](auto &values, int64_t width) {
      if (!values.empty()) values.erase(values.begin(), values.begin() + drop * width);
    };
    s.tq -= drop;
    shorten(s.q, p.hq * p.d);
    shorten(s.rel, p.hq * p.rel_extent);
    shorten(expected.seqs[b].out, p.hq * p.dv);
    shorten(expected.seqs[b].lse, p.hq);
  }
  require(difference(tail, expected, run(tail, arbitrary_layout())));
}

// With equal scores the output is the mean of the visible values, and the lse counts them.
RC_GTEST_PROP(Limits, ScaleZeroAveragesTheVisibleValues, ()) {
  Problem p = arbitrary_problem({.biases = false, .dtypes = false});
  p.scale = 0;
  const Result r = run(p, arbitrary_layout());
  RC_ASSERT(r.status == FLASHSPARK_OK);
  Problem doubled = p;  // other queries, same result: scores do not matter
  for (Sequence &s : doubled.seqs) {
    for (float &x : s.q) x = 3 - 2 * x;
  }
  require(difference(p, r, run(doubled, arbitrary_layout())));
  for (const Rows &rows : r.seqs) {
    for (const float lse : rows.lse) {
      const double count = std::exp(double{lse});
      RC_ASSERT(std::fabs(count - std::round(count)) < 1e-3);
    }
  }
}

RC_GTEST_PROP(Limits, HugeSoftcapIsNoSoftcap, ()) {
  Problem p = arbitrary_problem();
  p.softcap = 0;
  Problem capped = p;
  capped.softcap = 1e6f;
  same(p, capped);
}

RC_GTEST_PROP(Limits, TinySoftcapFlattensTheScores, ()) {
  Problem p = arbitrary_problem({.biases = false, .dtypes = false});
  Problem flat = p;
  p.scale = 0;
  flat.softcap = 1e-9f;
  same(p, flat);
}

RC_GTEST_PROP(Limits, AWideWindowIsOpen, ()) {
  Problem p = arbitrary_problem();
  if (p.rswa_window > 0) p.rswa_window = 0;
  p.window_left = p.window_right = -1;
  Problem windowed = p;
  windowed.window_left = 1000;
  windowed.window_right = *rc::gen::element<int64_t>(-1, 1000, INT32_MAX);
  same(p, windowed);
}

RC_GTEST_PROP(Limits, AChunkLongerThanTheKeysIsNoChunk, ()) {
  Problem p = arbitrary_problem();
  p.rswa_window = 0;
  p.attention_chunk = 0;
  // Query rows before the first key lie in an earlier chunk than that key.
  for (const Sequence &s : p.seqs) RC_PRE(s.tq <= s.tk);
  Problem chunked = p;
  chunked.attention_chunk = *rc::gen::element<int64_t>(150, 1000, INT32_MAX);
  same(p, chunked);
}

// With a chunk size of one, each query sees its own key only.
RC_GTEST_PROP(Limits, ChunksOfOneAreAWindowOfNone, ()) {
  Problem p = arbitrary_problem({.masks = false});
  Problem chunked = p;
  p.window_left = p.window_right = 0;
  chunked.attention_chunk = 1;
  same(p, chunked);
}

RC_GTEST_PROP(Limits, NoLookingAheadIsCausal, ()) {
  Problem p = arbitrary_problem({.masks = false});
  Problem windowed = p;
  windowed.window_right = 0;
  for (Sequence &s : p.seqs) s.causal = true;
  same(p, windowed);
}

RC_GTEST_PROP(Limits, WindowZeroCopiesTheOwnValue, ()) {
  Problem p = arbitrary_problem({.masks = false, .biases = false});
  p.window_left = p.window_right = 0;
  const Result r = run(p, arbitrary_layout());
  RC_ASSERT(r.status == FLASHSPARK_OK);
  for (size_t b = 0; b < p.seqs.size(); ++b) {
    const Sequence &s = p.seqs[b];
    for (int64_t i = 0; i < s.tq; ++i) {
      for (int64_t h = 0; h < p.hq; ++h) {
        const int64_t g = h / (p.hq / p.hkv);
        const float scale = p.kv_dtype == FLASHSPARK_FLOAT8_E4M3 ? s.v_scale[g] : 1;
        for (int64_t c = 0; c < p.dv; ++c) {
          const float own = s.pos(i) < 0 ? 0 : s.v[(s.pos(i) * p.hkv + g) * p.dv + c] * scale;
          RC_ASSERT(std::fabs(r.seqs[b].out[(i * p.hq + h) * p.dv + c] - own) <= 1e-5f * std::fabs(own));
        }
      }
    }
  }
}

RC_GTEST_PROP(Limits, SinkAtMinusInfinityIsNoSink, ()) {
  Problem p = arbitrary_problem();
  p.sinks.clear();
  Problem with_sinks = p;
  with_sinks.sinks.assign(p.hq, -kInf);
  same(p, with_sinks);
}

RC_GTEST_PROP(Limits, AHugeSinkTakesEverything, ()) {
  Problem p = arbitrary_problem();
  p.sinks.assign(p.hq, 1e4f);
  const Result r = run(p, arbitrary_layout());
  RC_ASSERT(r.status == FLASHSPARK_OK);
  for (const Rows &rows : r.seqs) {
    for (const float x : rows.out) RC_ASSERT(x == 0.0f);
    for (const float x : rows.lse) RC_ASSERT(x == 1e4f);
  }
}

RC_GTEST_PROP(Limits, ZeroBiasesAreNoBiases, ()) {
  Problem p = arbitrary_problem();
  p.rel_extent = 0;
  for (Sequence &s : p.seqs) s.alibi.clear();
  Problem biased = p;
  biased.rel_extent = 7;
  for (Sequence &s : biased.seqs) {
    s.rel.assign(s.tq * p.hq * 7, 0);
    s.alibi.assign(p.hq, 0);
  }
  same(p, biased);
}

RC_GTEST_PROP(Limits, UnitDescalesAreNoDescales, ()) {
  Problem p = arbitrary_problem();
  Problem scaled = p;
  for (Sequence &s : p.seqs) s.q_scale = s.k_scale = s.v_scale = {};
  for (Sequence &s : scaled.seqs) s.q_scale = s.k_scale = s.v_scale = std::vector<float>(p.hkv, 1.0f);
  same(p, scaled);
}

RC_GTEST_PROP(Limits, AWideRswaWindowIsCausal, ()) {
  Problem p = arbitrary_problem({.masks = false});
  for (Sequence &s : p.seqs) s.causal = true;
  Problem rswa = p;
  rswa.rswa_window = 1000;
  same(p, rswa);
}

RC_GTEST_PROP(Limits, APrefixRangeOverEverythingIsBidirectional, ()) {
  Problem p = arbitrary_problem({.masks = false});
  for (Sequence &s : p.seqs) {
    const int64_t rows = std::min(s.tq, s.tk);  // only queries that have a key at their position
    s.q.erase(s.q.begin(), s.q.begin() + (s.tq - rows) * p.hq * p.d);
    if (!s.rel.empty()) s.rel.erase(s.rel.begin(), s.rel.begin() + (s.tq - rows) * p.hq * p.rel_extent);
    s.tq = rows;
  }
  Problem prefix = p;
  prefix.prefix_mode = FLASHSPARK_PREFIX_PER_SEQ;
  for (Sequence &s : prefix.seqs) {
    s.causal = true;
    s.ranges = {{0, static_cast<int32_t>(s.tk)}};
  }
  same(p, prefix);
}

}  // namespace
}  // namespace flashspark::test
