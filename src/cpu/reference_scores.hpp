// What the oracle's two halves, forward and backward, say of one score: the formula of flashspark.h.
#pragma once

#include <cmath>

#include "dtype.hpp"
#include "problem.hpp"

namespace flashspark::cpu {

// Whether query row i keeps key j. pos is the query's position on the key axis.
inline bool keep(const Params &p, const Sequence &s, int64_t i, int64_t j) {
  const int64_t pos = s.pos(i);
  if (p.rswa_window > 0) return j <= pos && (j < p.rswa_prefix_lens[s.index] || pos - j < p.rswa_window);

  const bool in_left_window = p.window_left < 0 || pos - j <= p.window_left;
  const bool in_right_window = p.window_right < 0 || j - pos <= p.window_right;
  const auto chunk = [&](int64_t at) { return std::floor(double(at) / double(p.attention_chunk)); };
  const bool in_chunk = p.attention_chunk == 0 || chunk(j) == chunk(pos);
  const bool visible = (!s.causal || j <= pos) && in_left_window && in_right_window && in_chunk;
  if (visible || p.prefix_mode == FLASHSPARK_PREFIX_NONE) return visible;

  if (p.prefix_clamp_window && !in_left_window) return false;
  if (p.prefix_mode == FLASHSPARK_PREFIX_PER_TOKEN) {
    const int32_t *range = p.prefix_ranges + 2 * token_row(p, s, i);
    return j >= range[0] && j <= range[1];
  }
  for (int64_t r = 0; r < p.num_prefix_ranges; ++r) {
    const int32_t *range = p.prefix_ranges + 2 * (s.index * p.num_prefix_ranges + r);
    if (pos >= range[0] && pos <= range[1] && j >= range[0] && j <= range[1]) return true;
  }
  return false;
}

// Row `a` of a tensor times row `b` of another one, as elements from these offsets on.
inline double dot(const flashspark_tensor &a, int64_t a0, const flashspark_tensor &b, int64_t b0, int64_t width) {
  return with_elements(a.data, a.dtype, [=](auto of_a) {
    return with_elements(b.data, b.dtype, [=](auto of_b) {
      double even = 0, odd = 0;  // an addition to one does not wait for that to the other
      int64_t d = 0;
      for (; d + 2 <= width; d += 2) {
        even += double{of_a(a0 + d)} * double{of_b(b0 + d)};
        odd += double{of_a(a0 + d + 1)} * double{of_b(b0 + d + 1)};
      }
      if (d < width) even += double{of_a(a0 + d)} * double{of_b(b0 + d)};
      return even + odd;
    });
  });
}

// Adds `factor` times a row of a tensor, as elements from this offset on.
inline void add_row(double *sums, double factor, const flashspark_tensor &t, int64_t at, int64_t width) {
  with_elements(t.data, t.dtype, [=](auto element) {
    for (int64_t d = 0; d < width; ++d) sums[d] += factor * double{element(at + d)};
  });
}

inline double query_key(const Params &p, const Sequence &s, int64_t i, int64_t j, int64_t h) {
  const int64_t k0 = kv_offset(p, p.k, s, j, h / (p.num_heads_q / p.num_heads_kv));
  return dot(p.q, q_offset(p, p.q, s, i, h), p.k, k0, p.head_dim);
}

inline double capped(const Params &p, double score) {
  return p.softcap > 0 ? p.softcap * std::tanh(score / p.softcap) : score;
}

// What a score gets added by its place.
inline double bias(const Params &p, const Sequence &s, int64_t i, int64_t j, int64_t h) {
  double sum = 0;
  const int64_t distance = s.pos(i) - j;
  if (p.rel_logits != nullptr && distance >= 0 && distance < p.rel_extent) {
    const int64_t at = token_row(p, s, i) * p.rel_token_stride + h * p.rel_head_stride + distance;
    sum += load_as_float(p.rel_logits, at, p.rel_dtype);
  }
  if (p.alibi_slopes != nullptr) sum -= double{alibi_slope(p, s.index, h)} * std::fabs(double(distance));
  return sum;
}

}  // namespace flashspark::cpu
