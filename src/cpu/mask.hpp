// Every mask as intervals of keys. A query row keeps at most two: what causality, window and chunk leave, and one that
// prefix ranges or R-SWA add. (Ranges that hold the same query overlap there, so their union is one interval.)
#pragma once

#include "problem.hpp"

namespace flashspark::cpu {

struct Interval {
  int64_t begin = 0, end = 0;  // [begin, end)
  bool empty() const { return begin >= end; }
};

// Disjoint and in order; `second` is empty where one interval is enough.
struct RowMask {
  Interval first, second;

  bool covers(int64_t begin, int64_t end) const {
    return (first.begin <= begin && end <= first.end) || (second.begin <= begin && end <= second.end);
  }
};

inline RowMask join(Interval a, Interval b) {
  if (a.empty()) return {b.empty() ? Interval{} : b, {}};
  if (b.empty()) return {a, {}};
  if (b.begin < a.begin) std::swap(a, b);
  if (b.begin > a.end) return {a, b};
  return {{a.begin, std::max(a.end, b.end)}, {}};
}

// The union of the ranges that hold the query at `pos`, clamped to the window where asked.
inline Interval prefix_interval(const Params &p, const Sequence &s, int64_t i) {
  const int64_t pos = s.pos(i);
  Interval u{INT64_MAX, 0};
  if (p.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN) {
    const int32_t *range = p.prefix_ranges + 2 * token_row(p, s, i);
    u = {range[0], int64_t{range[1]} + 1};
  } else {
    for (int64_t r = 0; r < p.num_prefix_ranges; ++r) {
      const int32_t *range = p.prefix_ranges + 2 * (s.index * p.num_prefix_ranges + r);
      if (pos < range[0] || pos > range[1]) continue;
      u = {std::min<int64_t>(u.begin, range[0]), std::max<int64_t>(u.end, int64_t{range[1]} + 1)};
    }
  }
  if (p.prefix_clamp_window && p.window_left >= 0) u.begin = std::max(u.begin, pos - p.window_left);
  return {std::max<int64_t>(u.begin, 0), std::min(u.end, s.seqlen_k)};
}

// The keys that query row i keeps.
inline RowMask row_mask(const Params &p, const Sequence &s, int64_t i) {
  const int64_t pos = s.pos(i);
  if (p.rswa_window > 0) {
    const int64_t end = std::min(pos + 1, s.seqlen_k);
    return join({0, std::min<int64_t>(p.rswa_prefix_lens[s.index], end)},
                {std::max<int64_t>(0, pos - p.rswa_window + 1), end});
  }
  Interval seen{0, s.seqlen_k};
  if (p.window_left >= 0) seen.begin = std::max<int64_t>(0, pos - p.window_left);
  if (s.causal) seen.end = std::min(seen.end, pos + 1);
  if (p.window_right >= 0) seen.end = std::min(seen.end, pos + p.window_right + 1);
  if (p.attention_chunk > 0) {
    const int64_t into = pos % p.attention_chunk;  // rounds towards 0: negative where pos is
    const int64_t begin = pos - into - (into < 0 ? p.attention_chunk : 0);
    seen = {std::max(seen.begin, begin), std::min(seen.end, begin + p.attention_chunk)};
  }
  return join(seen, p.prefix_mode == FLASHSPARK_PREFIX_NONE ? Interval{} : prefix_interval(p, s, i));
}

}  // namespace flashspark::cpu
