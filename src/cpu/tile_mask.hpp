// Which keys the tokens of a tile keep, for both directions of the engine.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/functions.hpp"
#include "cpu/mask.hpp"

namespace flashspark::cpu {

// The masks of a tile's tokens, and the union of the keys that they keep, or a part of it.
struct TileMask {
  std::vector<RowMask> masks;
  std::vector<Interval> spans;

  void set_masks(const Params &p, const Sequence &s, int64_t first, int64_t last) {
    masks.clear();
    for (int64_t i = first; i <= last; ++i) masks.push_back(row_mask(p, s, i));
  }

  // `h_kv`: whose block lists hold.
  void set_tokens(const Params &p, const Sequence &s, int64_t h_kv, int64_t first, int64_t last) {
    set_masks(p, s, first, last);
    spans.clear();
    for (const RowMask &mask : masks) {
      if (!mask.first.empty()) spans.push_back(mask.first);
      if (!mask.second.empty()) spans.push_back(mask.second);
    }
    const auto before = [](const Interval &a, const Interval &b) { return a.begin < b.begin; };
    if (!std::is_sorted(spans.begin(), spans.end(), before)) std::sort(spans.begin(), spans.end(), before);
    size_t kept = 0;
    for (const Interval &span : spans) {
      if (kept > 0 && span.begin <= spans[kept - 1].end) {
        spans[kept - 1].end = std::max(spans[kept - 1].end, span.end);
      } else {
        spans[kept++] = span;
      }
    }
    spans.resize(kept);
    if (!has_block_lists(p)) return;
    const int64_t group = p.num_heads_q / p.num_heads_kv;
    spans = intersection(spans, listed_keys(p, s, h_kv * group, h_kv * group + group - 1, first, last));
  }

  int64_t num_keys() const {
    int64_t sum = 0;
    for (const Interval &span : spans) sum += span.end - span.begin;
    return sum;
  }

  // Reduces the union to its keys number [begin, end).
  void clip(int64_t begin, int64_t end) {
    int64_t seen = 0;
    size_t kept = 0;
    for (const Interval span : spans) {
      const int64_t length = span.end - span.begin;
      const Interval part{span.begin + std::clamp<int64_t>(begin - seen, 0, length),
                          span.begin + std::clamp<int64_t>(end - seen, 0, length)};
      seen += length;
      if (!part.empty()) spans[kept++] = part;
    }
    spans.resize(kept);
  }
};

inline TileMask &thread_mask() {
  thread_local TileMask mask;
  return mask;
}

}  // namespace flashspark::cpu
