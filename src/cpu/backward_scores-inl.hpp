// The backward pass between its products: scores become probabilities, and products of dout and v become gradients of
// scores.
#if defined(FLASHSPARK_CPU_BACKWARD_SCORES_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_BACKWARD_SCORES_INL_HPP_
#undef FLASHSPARK_CPU_BACKWARD_SCORES_INL_HPP_
#else
#define FLASHSPARK_CPU_BACKWARD_SCORES_INL_HPP_
#endif

#include "cpu/backward_tile.hpp"
#include "cpu/packed-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

// `floats` of the scratch memory from `next` on.
inline HWY_ATTR float *take_floats(float *&next, int64_t floats) {
  float *const taken = next;
  next += (floats + kPitchPad - 1) / kPitchPad * kPitchPad;
  return taken;
}

// The part of a pair of tiles' scratch memory that is the same whatever multiplies: scores, and sums for the keys.
// Columns between a width and its pitch hold anything: what products make of them is not read.
struct ScoreMemory {
  int64_t pitch, pitch_v;                          // of rows of head_dim and of head_dim_v
  float *dk, *dv;                                  // (kBackwardKeys, pitch | pitch_v)
  float *scores, *gradients, *cap_slopes, *given;  // (rows, kScorePitch)
  float *kept;                                     // (kRowGroup, kBackwardKeys): what dropout multiplies with
  float *rest;                                     // what follows is free

  HWY_ATTR explicit ScoreMemory(const BackwardTile &t) {
    const int64_t d = t.p->forward.head_dim, d_v = t.p->forward.head_dim_v, rows = backward_rows(d, d_v);
    pitch = backward_pitch(d), pitch_v = backward_pitch(d_v);
    rest = t.scratch;
    dk = take_floats(rest, kBackwardKeys * pitch), dv = take_floats(rest, kBackwardKeys * pitch_v);
    scores = take_floats(rest, rows * kScorePitch), gradients = take_floats(rest, rows * kScorePitch);
    cap_slopes = take_floats(rest, rows * kScorePitch), given = take_floats(rest, rows * kScorePitch);
    kept = take_floats(rest, kRowGroup * kBackwardKeys);
  }
};

struct BackwardMemory : ScoreMemory {
  float *key_panels, *value_panels;  // as pack_keys() leaves them: both transposed
  float *keys;                       // (kBackwardKeys, pitch), without NaN and infinity
  float *q, *dout;                   // (rows, pitch | pitch_v): q times softmax_scale

  HWY_ATTR explicit BackwardMemory(const BackwardTile &t) : ScoreMemory(t) {
    const int64_t d = t.p->forward.head_dim, d_v = t.p->forward.head_dim_v, rows = backward_rows(d, d_v);
    key_panels = take_floats(rest, kBackwardKeys * d), value_panels = take_floats(rest, kBackwardKeys * d_v);
    keys = take_floats(rest, kBackwardKeys * pitch);
    q = take_floats(rest, rows * pitch), dout = take_floats(rest, rows * pitch_v);
  }
};

// What is known of the rows of a pair of tiles.
struct BackwardRows {
  int64_t groups, rows;  // whole groups
  RowMask masks[kBackwardRows];
  GroupRange ranges[kBackwardRows / kRowGroup];
};

// Offsets of the keys whose scores are computed for a group: whole panels.
HWY_INLINE int64_t panel_begin(const GroupRange &range) {
  return range.begin / kPanel * kPanel;
}
HWY_INLINE int64_t panel_end(const GroupRange &range) {
  return (range.end + kPanel - 1) / kPanel * kPanel;
}

// softcap * tanh(score / softcap), and its derivative. Whole vectors.
inline HWY_ATTR void cap_with_slopes(float softcap, int64_t count, float *s, float *slopes) {
  const DN d;
  const VN one = hn::Set(d, 1.0f), inverse = hn::Set(d, 1.0f / softcap), factor = hn::Set(d, softcap);
  for (int64_t n = 0; n < count; n += kLanes) {
    const VN tanh = tanh_of(d, hn::Mul(hn::LoadU(d, s + n), inverse));
    hn::StoreU(hn::Mul(tanh, factor), d, s + n);
    hn::StoreU(hn::NegMulAdd(tanh, tanh, one), d, slopes + n);
  }
}

// The rows and keys that hold all scores of a pair of tiles.
struct Bounds {
  int64_t first, last, begin, end;
  bool empty() const { return first >= last; }
};
inline HWY_ATTR Bounds bounds_of(const BackwardTile &t, const BackwardRows &w) {
  Bounds b{w.rows, 0, t.count, 0};
  for (int64_t g = 0; g < w.groups; ++g) {
    const GroupRange &range = w.ranges[g];
    if (range.begin >= range.end) continue;
    const int64_t from = panel_begin(range), to = HWY_MIN(panel_end(range), t.count);
    b.first = HWY_MIN(b.first, g * kRowGroup);
    b.last = HWY_MAX(b.last, (g + 1) * kRowGroup);
    b.begin = HWY_MIN(b.begin, from);
    b.end = HWY_MAX(b.end, to);
  }
  b.last = HWY_MIN(b.last, static_cast<int64_t>(t.rows.rows));  // not rows that only fill the last group
  return b;
}

// What is added to scores of natural units, and done to them: softcap, biases, the user's functions, lists.
inline HWY_ATTR void modify_scores(const BackwardTile &t, const BackwardRows &w, const ScoreMemory &m) {
  const Params &p = t.p->forward;
  for (int64_t r = 0; has_score_terms(p) && r < t.rows.rows; ++r) {
    const GroupRange &range = w.ranges[r / kRowGroup];
    if (range.begin >= range.end) continue;
    const int64_t from = panel_begin(range), to = panel_end(range), at = r * kScorePitch + from;
    if (p.softcap > 0) cap_with_slopes(p.softcap, to - from, m.scores + at, m.cap_slopes + at);
    add_biases(t.rows, r, t.key + from, HWY_MIN(to, t.count) - from, m.scores + at, 1);
  }
  if (t.rows.functions == nullptr) return;
  const Bounds b = bounds_of(t, w);
  if (b.empty()) return;
  float *const s = m.scores + b.first * kScorePitch + b.begin;
  if (t.function_gradients != nullptr) {
    for (int64_t r = b.first; r < b.last; ++r) {
      for (int64_t n = b.begin; n < b.end; ++n) m.given[r * kScorePitch + n] = m.scores[r * kScorePitch + n];
    }
  }
  apply_functions(t.rows, b.first, b.last - b.first, t.key + b.begin, b.end - b.begin, s, kScorePitch, 1);
}

// One row: scores s[0, count) become p z, and products g[0, count) become ds. Whole vectors.
template <bool kDropout>
HWY_INLINE HWY_ATTR void differentiate_row(int64_t count, float lse, float common, const float *kept, float *s,
                                           float *g) {
  const DN d;
  const VN vlse = hn::Set(d, lse), vcommon = hn::Set(d, common), log2e = hn::Set(d, kLog2e), zero = hn::Zero(d);
  const VN dropped = hn::Set(d, kMinusInfinity);  // by a mask: also in a row whose lse is NaN
  for (int64_t n = 0; n < count; n += kLanes) {
    const VN score = hn::LoadU(d, s + n);
    const VN p = hn::IfThenZeroElse(hn::Eq(score, dropped), exp2_nonpositive(d, hn::Mul(hn::Sub(score, vlse), log2e)));
    VN weight = p, product = hn::LoadU(d, g + n);
    if constexpr (kDropout) {
      const VN z = hn::LoadU(d, kept + n);
      weight = hn::Mul(p, z);
      product = hn::IfThenZeroElse(hn::Eq(z, zero), hn::Mul(product, z));
    }
    hn::StoreU(weight, d, s + n);
    hn::StoreU(hn::IfThenZeroElse(hn::Eq(p, zero), hn::Mul(p, hn::Add(product, vcommon))), d, g + n);
  }
}

HWY_INLINE HWY_ATTR void clear(float *x, int64_t count) {
  for (int64_t n = 0; n < count; ++n) x[n] = 0;
}

// All scores of a row group: masks, then differentiate_row(). Keys outside the group's panels get zeros, since the
// products for dk and dv read whole rows.
inline HWY_ATTR void differentiate_group(const BackwardTile &t, const BackwardRows &w, const ScoreMemory &m,
                                         int64_t group) {
  const Tile &rows = t.rows;
  const int64_t from = panel_begin(w.ranges[group]), to = panel_end(w.ranges[group]), count = to - from;
  const int64_t known = HWY_MIN(to, t.count) - from, columns = t.columns();
  const bool dropout = rows.dropout.any() || rows.dropout.scale != 1.0f;
  if (dropout) {
    for (int64_t n = 0; n < kRowGroup * kBackwardKeys; ++n) m.kept[n] = rows.dropout.scale;
    if (rows.dropout.any()) drop_row_group<kBackwardKeys>(rows, group * kRowGroup, t.key + from, count, m.kept);
  }
  for (int64_t n = 0; n < kRowGroup; ++n) {
    const int64_t r = group * kRowGroup + n;
    float *const s = m.scores + r * kScorePitch, *const g = m.gradients + r * kScorePitch;
    const float lse = r < rows.rows ? t.p->forward.lse[lse_offset(t.p->forward, rows.s, rows.token(r), rows.head(r))]
                                    : kMinusInfinity;
    if (lse == kMinusInfinity) {  // rows without keys, and those that only fill the group
      clear(s, columns);
      clear(g, columns);
      continue;
    }
    clear(s, from), clear(s + to, columns - to);
    clear(g, from), clear(g + to, columns - to);
    if (!w.masks[r].covers(t.key + from, t.key + from + known))
      apply_mask(w.masks[r], t.key + from, known, s + from, 1);
    for (int64_t j = from + known; j < to; ++j) s[j] = kMinusInfinity;
    const float common = t.common[rows.row0 + r];
    if (dropout) {
      differentiate_row<true>(count, lse, common, m.kept + n * kBackwardKeys, s + from, g + from);
    } else {
      differentiate_row<false>(count, lse, common, nullptr, s + from, g + from);
    }
  }
}

// From gradients of modified scores to those of products of q and k, one modification after the other; what each of
// them depends on gets its part.
inline HWY_ATTR void unmodify_scores(const BackwardTile &t, const BackwardRows &w, const ScoreMemory &m) {
  const Params &p = t.p->forward;
  if (t.function_gradients != nullptr) {
    const Bounds b = bounds_of(t, w);
    const int64_t at = b.first * kScorePitch + b.begin;
    if (!b.empty()) {
      // Of groups that see nothing, between others, an earlier tile may have left gradients.
      for (int64_t r = b.first; r < b.last; ++r) {
        const GroupRange &range = w.ranges[r / kRowGroup];
        if (range.begin >= range.end) clear(m.gradients + r * kScorePitch + b.begin, b.end - b.begin);
      }
      apply_function_gradients(t, b.first, b.last - b.first, t.key + b.begin, b.end - b.begin, m.given + at,
                               m.gradients + at);
    }
  }
  for (int64_t r = 0; r < t.rows.rows; ++r) {
    const GroupRange &range = w.ranges[r / kRowGroup];
    if (range.begin >= range.end) continue;
    float *const g = m.gradients + r * kScorePitch;
    const int64_t i = t.rows.token(r), h = t.rows.head(r), pos = t.rows.s.pos(i);
    if (t.p->drel_logits != nullptr) {
      const int64_t base = token_row(p, t.rows.s, i) * p.rel_token_stride + h * p.rel_head_stride;
      const int64_t first = HWY_MAX(pos - p.rel_extent + 1, t.key), last = HWY_MIN(pos, t.key + t.count - 1);
      for (int64_t j = first; j <= last; ++j) t.p->drel_logits[base + pos - j] = g[j - t.key];
    }
    if (t.slopes != nullptr) {
      float sum = 0;
      for (int64_t n = range.begin; n < range.end; ++n) {
        const int64_t distance = pos - t.key - n;
        sum -= g[n] * static_cast<float>(distance < 0 ? -distance : distance);
      }
      t.slopes[h - t.rows.h_kv * t.rows.group] += sum;
    }
    if (p.softcap > 0) {
      const float *const slopes = m.cap_slopes + r * kScorePitch;
      for (int64_t n = range.begin; n < range.end; ++n) g[n] = g[n] == 0 ? 0 : g[n] * slopes[n];
    }
  }
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
