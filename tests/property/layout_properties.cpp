// Results must not depend on layout, pages, padding, order, neighbouring sequences, splits or threads.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "support/arbitrary.hpp"

namespace flashspark::test {
namespace {

void require(const std::string &verdict) {
  if (!verdict.empty()) RC_FAIL(verdict);
}

bool identical(const Result &a, const Result &b) {
  if (a.status != FLASHSPARK_OK || b.status != FLASHSPARK_OK || a.seqs.size() != b.seqs.size()) return false;
  for (size_t n = 0; n < a.seqs.size(); ++n) {
    if (a.seqs[n].out != b.seqs[n].out || a.seqs[n].lse != b.seqs[n].lse) return false;
  }
  return true;
}

RC_GTEST_PROP(Formula, EngineAgreesForAnyProblemInAnyLayout, ()) {
  const Problem p = arbitrary_problem({.dropout = true});
  require(difference(p, run(p, arbitrary_layout()), false));
}

RC_GTEST_PROP(Formula, OracleAgreesForAnyProblemInAnyLayout, ()) {
  const Problem p = arbitrary_problem({.dropout = true, .longest_k = 70});
  Layout layout = arbitrary_layout();
  layout.implementation = "cpu-reference";
  require(difference(p, run(p, layout), true));
}

// Row maxima jump by up to 30, as in real activations; the error bound of random data must still hold.
RC_GTEST_PROP(Formula, PeakedScoresHoldTheSameBound, ()) {
  Problem p = arbitrary_problem({.biases = false});
  make_peaked(p);
  require(difference(p, run(p, arbitrary_layout()), false));
}

RC_GTEST_PROP(Layouts, PageSizeAndPageOrderDoNotMatter, ()) {
  const Problem p = arbitrary_problem();
  const auto paged = [&] {
    return run(p, {.kv = Kind::kPaged,
                   .page_size = *rc::gen::inRange<int64_t>(1, 60) * *rc::gen::element<int64_t>(1, 16),
                   .seed = *rc::gen::arbitrary<uint64_t>()});
  };
  const Result a = paged(), b = paged();
  require(difference(p, a, b));
  require(difference(p, a, run(p, {})));
}

RC_GTEST_PROP(Layouts, StridedEqualsContiguous, ()) {
  const Problem p = arbitrary_problem();
  Layout strided = arbitrary_layout(), plain;
  plain.q = strided.q;
  plain.kv = strided.kv;
  plain.page_size = strided.page_size;
  require(difference(p, run(p, strided), run(p, plain)));
}

// What is dropped follows the numbers of sequence, head, query token and key, and nothing else. Left padding counts as
// keys, so both layouts have as much.
RC_GTEST_PROP(Layouts, DropoutDoesNotSeeThem, ()) {
  const Problem p = arbitrary_problem({.dropout = true});
  Layout a = arbitrary_layout(), b = arbitrary_layout();
  if (a.kv == Kind::kVarlen || b.kv == Kind::kVarlen) a.leftpad = 0;
  b.leftpad = a.leftpad;
  require(difference(p, run(p, a), run(p, b)));
}

// Unused rows, page-table entries past the end and unused pages hold NaN or anything else; the result is bitwise the
// same.
RC_GTEST_PROP(Layouts, PaddingGarbageAndNanInUnusedMemoryChangeNothing, ()) {
  const Problem p = arbitrary_problem();
  Layout layout = arbitrary_layout();
  layout.slack = 1 + *rc::gen::inRange<int64_t>(0, 4);
  layout.deterministic = 1;
  const Result with_nan = run(p, layout);
  layout.poison = 0x3c;
  const Result with_numbers = run(p, layout);
  layout.poison = 0x77;
  RC_ASSERT(identical(with_nan, with_numbers));
  RC_ASSERT(identical(with_nan, run(p, layout)));
  layout.slack = 0;
  require(difference(p, with_nan, run(p, layout)));
}

RC_GTEST_PROP(Batch, OrderDoesNotMatter, ()) {
  const Problem p = arbitrary_problem();
  std::vector<size_t> order(p.seqs.size());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 rng(*rc::gen::arbitrary<uint64_t>());
  std::shuffle(order.begin(), order.end(), rng);
  Problem shuffled = p;
  for (size_t n = 0; n < order.size(); ++n) shuffled.seqs[n] = p.seqs[order[n]];
  const Layout layout = arbitrary_layout();
  const Result whole = run(p, layout), other = run(shuffled, layout);
  Result sorted = whole;
  RC_ASSERT(other.seqs.size() == order.size());
  for (size_t n = 0; n < order.size(); ++n) sorted.seqs[order[n]] = other.seqs[n];
  require(difference(p, whole, sorted));
}

RC_GTEST_PROP(Batch, VarlenEqualsOneSequenceAtATime, ()) {
  const Problem p = arbitrary_problem();
  const Result whole = run(p, {});
  Result single = whole;
  RC_ASSERT(whole.status == FLASHSPARK_OK);
  for (size_t n = 0; n < p.seqs.size(); ++n) {
    Problem alone = p;
    alone.seqs = {p.seqs[n]};
    const Result one = run(alone, {.q = Kind::kDense, .kv = Kind::kDense});
    RC_ASSERT(one.status == FLASHSPARK_OK);
    single.seqs[n] = one.seqs[0];
  }
  require(difference(p, whole, single));
}

RC_GTEST_PROP(Batch, DeterministicMeansBitIdentical, ()) {
  const Problem p = arbitrary_problem({.dropout = true});
  Layout layout = arbitrary_layout();
  layout.deterministic = 1;
  layout.num_threads = 1;
  const Result once = run(p, layout);
  layout.num_threads = 3;
  RC_ASSERT(identical(once, run(p, layout)));
}

RC_GTEST_PROP(Splits, NumSplitsDoesNotMatter, ()) {
  const Problem p = arbitrary_problem({.dropout = true, .longest_k = 400});
  Layout layout = arbitrary_layout();
  layout.num_splits = 1;
  const Result whole = run(p, layout);
  layout.num_splits = *rc::gen::inRange(2, 40);
  require(difference(p, whole, run(p, layout)));
}

// Combines the results over parts of the keys by their lse.
Result combined(const Problem &whole, const std::vector<Result> &parts) {
  Result r = parts[0];
  for (size_t b = 0; b < whole.seqs.size(); ++b) {
    for (int64_t row = 0; row < whole.seqs[b].tq * whole.hq; ++row) {
      double top = -INFINITY, total = 0;
      for (const Result &part : parts) top = std::fmax(top, part.seqs[b].lse[row]);
      for (const Result &part : parts) total += top == -INFINITY ? 0 : std::exp(part.seqs[b].lse[row] - top);
      r.seqs[b].lse[row] = static_cast<float>(top + std::log(total));
      for (int64_t c = 0; c < whole.dv; ++c) {
        double sum = 0;
        for (const Result &part : parts) {
          if (total > 0) sum += std::exp(part.seqs[b].lse[row] - top) / total * part.seqs[b].out[row * whole.dv + c];
        }
        r.seqs[b].out[row * whole.dv + c] = static_cast<float>(sum);
      }
    }
  }
  return r;
}

// Keys [from, to) of every sequence; the bounds are in thousandths of its length.
Problem keys_between(const Problem &p, int64_t from, int64_t to) {
  Problem part = p;
  for (Sequence &s : part.seqs) {
    const int64_t first = s.tk * from / 1000, last = s.tk * to / 1000;
    s.k = {s.k.begin() + first * p.hkv * p.d, s.k.begin() + last * p.hkv * p.d};
    s.v = {s.v.begin() + first * p.hkv * p.dv, s.v.begin() + last * p.hkv * p.dv};
    s.tk = last - first;
  }
  return part;
}

RC_GTEST_PROP(Splits, AnySplitOfTheKeysMergesByLse, ()) {
  Problem p = arbitrary_problem({.masks = false, .biases = false, .longest_k = 300});
  if (*rc::gen::arbitrary<bool>()) p.softcap = 3;
  std::vector<int64_t> cuts = *rc::gen::container<std::vector<int64_t>>(rc::gen::inRange<int64_t>(0, 1001));
  cuts.resize(std::min<size_t>(cuts.size(), 4));
  cuts.push_back(0);
  cuts.push_back(1000);
  std::sort(cuts.begin(), cuts.end());
  std::vector<Result> parts;
  for (size_t n = 0; n + 1 < cuts.size(); ++n) {
    parts.push_back(run(keys_between(p, cuts[n], cuts[n + 1]), arbitrary_layout()));
    RC_ASSERT(parts.back().status == FLASHSPARK_OK);
  }
  require(difference(p, run(p, {}), combined(p, parts)));
}

// Cascade inference: an unmasked common prefix combined with the causal remainder.
RC_GTEST_PROP(Splits, PrefixAndCausalSuffixMergeByLse, ()) {
  Problem p = arbitrary_problem({.masks = false, .biases = false});
  Problem prefix = p, suffix = p;
  for (size_t b = 0; b < p.seqs.size(); ++b) {
    Sequence &s = p.seqs[b];
    const int64_t cut = *rc::gen::inRange<int64_t>(0, std::max<int64_t>(s.tk - s.tq, 0) + 1);
    prefix.seqs[b].k.resize(cut * p.hkv * p.d);
    prefix.seqs[b].v.resize(cut * p.hkv * p.dv);
    prefix.seqs[b].tk = cut;
    suffix.seqs[b].k.erase(suffix.seqs[b].k.begin(), suffix.seqs[b].k.begin() + cut * p.hkv * p.d);
    suffix.seqs[b].v.erase(suffix.seqs[b].v.begin(), suffix.seqs[b].v.begin() + cut * p.hkv * p.dv);
    suffix.seqs[b].tk -= cut;
    s.causal = suffix.seqs[b].causal = true;
  }
  const std::vector<Result> parts = {run(prefix, {}), run(suffix, {.kv = Kind::kPaged})};
  RC_ASSERT(parts[0].status == FLASHSPARK_OK && parts[1].status == FLASHSPARK_OK);
  require(difference(p, run(p, {}), combined(p, parts)));
}

}  // namespace
}  // namespace flashspark::test
