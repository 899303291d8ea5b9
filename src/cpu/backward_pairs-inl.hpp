// The backward pass of backward-inl.hpp with products of bfloat16 in pairs. Scores and gradients of probabilities are
// sums of exact products, as there. P and dS become bfloat16 for the other three products, as on a GPU.
#if defined(FLASHSPARK_CPU_BACKWARD_PAIRS_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_BACKWARD_PAIRS_INL_HPP_
#undef FLASHSPARK_CPU_BACKWARD_PAIRS_INL_HPP_
#else
#define FLASHSPARK_CPU_BACKWARD_PAIRS_INL_HPP_
#endif

#include <cstring>

#include "cpu/backward-inl.hpp"
#include "cpu/pairs-inl.hpp"

#if HWY_TARGET == HWY_AVX3
HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

inline HWY_ATTR bool takes_pairs(const BackwardParams &b) {
  for (const flashspark_tensor *x : {&b.forward.q, &b.forward.k, &b.forward.v, &b.dout}) {
    if (x->dtype != FLASHSPARK_BFLOAT16) return false;
  }
  return true;
}

// The scratch memory of a pair of tiles. `.._pairs`: words of two rows; the others of two columns.
struct PairMemory : ScoreMemory {
  int64_t row_pitch, row_pitch_v;   // of rows of words of columns
  Word *key_panels, *value_panels;  // as pack_keys() leaves words, both transposed
  Word *key_pairs;                  // (kBackwardKeys / 2, pitch), without NaN and infinity
  Word *q, *dout;                   // (rows, row_pitch | row_pitch_v)
  Word *q_pairs, *dout_pairs;       // (rows / 2, pitch | pitch_v)
  Word *ds;                         // (rows, kWordPitch)
  static constexpr int64_t kWordPitch = backward_pitch(kBackwardKeys / 2);
  // P and dS in words of two rows take the memory of scores and gradients.
  static constexpr int64_t kPairPitch = 2 * kScorePitch;

  HWY_ATTR explicit PairMemory(const BackwardTile &t) : ScoreMemory(t) {
    const int64_t d = t.p->forward.head_dim, d_v = t.p->forward.head_dim_v, rows = backward_rows(d, d_v);
    const auto take = [&](int64_t words) HWY_ATTR { return reinterpret_cast<Word *>(take_floats(rest, words)); };
    row_pitch = backward_pitch(d / 2), row_pitch_v = backward_pitch(d_v / 2);
    key_panels = take(kBackwardKeys * d / 2), value_panels = take(kBackwardKeys * d_v / 2);
    key_pairs = take(kBackwardKeys / 2 * pitch);
    q = take(rows * row_pitch), dout = take(rows * row_pitch_v);
    q_pairs = take(rows / 2 * pitch), dout_pairs = take(rows / 2 * pitch_v);
    ds = take(rows * kWordPitch);
  }
  Word *p_pairs() const { return reinterpret_cast<Word *>(scores); }
  Word *ds_pairs() const { return reinterpret_cast<Word *>(gradients); }
};

// Words of two rows of `width` elements. kFinite: zeros in place of NaN and infinities.
template <bool kFinite, int kStep>
HWY_INLINE HWY_ATTR void pair_columns(const uint16_t *first, const uint16_t *second, int64_t width, Word *to) {
  const hn::FixedTag<Word, kStep> d;
  const hn::Rebind<uint16_t, decltype(d)> half;
  const auto load = [&](const uint16_t *from) HWY_ATTR {
    const auto x = hn::LoadU(half, from);
    if constexpr (!kFinite) return hn::PromoteTo(d, x);
    const auto exponent = hn::Set(half, 0x7f80);
    return hn::PromoteTo(d, hn::IfThenZeroElse(hn::Eq(hn::And(x, exponent), exponent), x));
  };
  for (int64_t n = 0; n < width; n += kStep)
    hn::StoreU(hn::Or(load(first + n), hn::ShiftLeft<16>(load(second + n))), d, to + n);
}
template <bool kFinite>
HWY_INLINE HWY_ATTR void pair_rows(const uint16_t *first, const uint16_t *second, int64_t width, Word *to) {
  if (width % 16 == 0) return pair_columns<kFinite, 16>(first, second, width, to);
  pair_columns<kFinite, 8>(first, second, width, to);
}

// Rows of q or dout as they are, and in pairs. Rows past the last repeat it.
template <bool kFinite>
HWY_ATTR void load_pairs(const BackwardTile &t, const flashspark_tensor &tensor, int64_t width, int64_t rows, Word *to,
                         int64_t row_pitch, Word *pairs, int64_t pitch) {
  const auto *const data = static_cast<const uint16_t *>(tensor.data);
  for (int64_t r = 0; r < rows; r += 2, pairs += pitch) {
    const uint16_t *const first = data + row_offset(t, tensor, r), *const second = data + row_offset(t, tensor, r + 1);
    std::memcpy(to + r * row_pitch, first, static_cast<size_t>(width) * sizeof(uint16_t));
    std::memcpy(to + (r + 1) * row_pitch, second, static_cast<size_t>(width) * sizeof(uint16_t));
    pair_rows<kFinite>(first, second, width, pairs);
  }
}

inline HWY_ATTR void begin_pairs(const BackwardTile &t) {
  const Params &p = t.p->forward;
  const PairMemory m(t);
  const char *keys[kBackwardKeys], *values[kBackwardKeys];
  tile_addresses(t, p.k, keys);
  tile_addresses(t, p.v, values);
  // Two elements of a key are transposed as one.
  pack_keys<F32>(p.head_dim / 2, t.count, keys, reinterpret_cast<float *>(m.key_panels));
  pack_keys<F32>(p.head_dim_v / 2, t.count, values, reinterpret_cast<float *>(m.value_panels));
  const uint16_t zeros[kMaxHeadDim] = {};  // behind the last key: its ds is 0
  for (int64_t n = 0; n < t.count; n += 2) {
    const auto *const first = reinterpret_cast<const uint16_t *>(keys[n]);
    const auto *const second = n + 1 < t.count ? reinterpret_cast<const uint16_t *>(keys[n + 1]) : zeros;
    pair_rows<true>(first, second, p.head_dim, m.key_pairs + n / 2 * m.pitch);
  }
  clear_sums(t, m);
}

// to (rows, keys) = factor times rows times the columns that `panels` hold, as multiply_panels().
inline HWY_ATTR void multiply_pair_panels(const BackwardTile &t, const BackwardRows &w, const Word *rows, int64_t pitch,
                                          int64_t words, const Word *panels, float factor, float *to) {
  for (int64_t n = 0; n < t.count; n += kPanel) {
    for (int64_t g = 0; g < w.groups; ++g) {
      if (w.ranges[g].begin >= n + kPanel || w.ranges[g].end <= n) continue;
      multiply_pairs<false, false>(rows + g * kRowGroup * pitch, pitch, panels + n * words, kPanel, words, factor,
                                   to + g * kRowGroup * kScorePitch + n, kScorePitch);
    }
  }
}

// to (keys, width) += scores^T times rows, both in words of two rows, as multiply_transposed().
inline HWY_ATTR void multiply_pairs_transposed(const BackwardTile &t, const BackwardRows &w, const Word *scores,
                                               const Word *rows, int64_t pitch, int64_t width, float *to) {
  for_seen_rows(t, w, width, [&](int64_t x, int64_t n, int64_t begin, int64_t end) HWY_ATTR {
    multiply_pairs<true, true>(scores + begin / 2 * PairMemory::kPairPitch + n, PairMemory::kPairPitch,
                               rows + begin / 2 * pitch + x, pitch, (end + 1) / 2 - begin / 2, 1.0f, to + n * pitch + x,
                               pitch);
  });
}

// dq (rows, width) += ds times the keys.
inline HWY_ATTR void multiply_pair_queries(const BackwardTile &t, const BackwardRows &w, const PairMemory &m) {
  const int64_t width = t.p->forward.head_dim, pitch = backward_width(width);
  for (int64_t x = 0; x < width; x += kPanel) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const GroupRange &range = w.ranges[g];
      if (range.begin >= range.end) continue;
      const int64_t begin = range.begin / 2, end = (range.end + 1) / 2;
      if (g + 1 < w.groups) prefetch_sums(t.dq + (t.rows.row0 + (g + 1) * kRowGroup) * pitch + x, pitch);
      multiply_pairs<true, false>(m.ds + g * kRowGroup * PairMemory::kWordPitch + begin, PairMemory::kWordPitch,
                                  m.key_pairs + begin * m.pitch + x, m.pitch, end - begin, 1.0f,
                                  t.dq + (t.rows.row0 + g * kRowGroup) * pitch + x, pitch);
    }
  }
}

// P and dS as the products take them.
inline HWY_ATTR void narrow_group(const BackwardTile &t, const PairMemory &m, int64_t group) {
  const int64_t columns = t.columns();
  for (int64_t r = group * kRowGroup; r < (group + 1) * kRowGroup; r += 2) {
    float *const s = m.scores + r * kScorePitch, *const g = m.gradients + r * kScorePitch;
    narrow_two_rows(s, s + kScorePitch, columns, m.p_pairs() + r * kScorePitch, nullptr, 0);
    narrow_two_rows(g, g + kScorePitch, columns, m.ds_pairs() + r * kScorePitch, m.ds + r * PairMemory::kWordPitch,
                    PairMemory::kWordPitch);
  }
}

inline HWY_ATTR void add_pairs(const BackwardTile &t) {
  const BackwardParams &b = *t.p;
  const Params &p = b.forward;
  const PairMemory m(t);
  BackwardRows w;
  find_ranges(t, w);
  load_pairs<true>(t, p.q, p.head_dim, w.rows, m.q, m.row_pitch, m.q_pairs, m.pitch);
  load_pairs<false>(t, b.dout, p.head_dim_v, w.rows, m.dout, m.row_pitch_v, m.dout_pairs, m.pitch_v);
  multiply_pair_panels(t, w, m.q, m.row_pitch, p.head_dim / 2, m.key_panels, p.softmax_scale, m.scores);
  multiply_pair_panels(t, w, m.dout, m.row_pitch_v, p.head_dim_v / 2, m.value_panels, 1.0f, m.gradients);
  modify_scores(t, w, m);
  for (int64_t g = 0; g < w.groups; ++g) {
    if (w.ranges[g].begin < w.ranges[g].end) differentiate_group(t, w, m, g);
  }
  unmodify_scores(t, w, m);
  for (int64_t g = 0; g < w.groups; ++g) {
    if (w.ranges[g].begin < w.ranges[g].end) narrow_group(t, m, g);
  }
  if (b.dv.data != nullptr) multiply_pairs_transposed(t, w, m.p_pairs(), m.dout_pairs, m.pitch_v, p.head_dim_v, m.dv);
  if (b.dk.data != nullptr) multiply_pairs_transposed(t, w, m.ds_pairs(), m.q_pairs, m.pitch, p.head_dim, m.dk);
  if (t.dq != nullptr) multiply_pair_queries(t, w, m);
}

// The kernels of a CPU with such products: these for bfloat16, the others for everything else.
inline HWY_ATTR void begin_keys_or_pairs(const BackwardTile &t) {
  takes_pairs(*t.p) ? begin_pairs(t) : begin_keys(t);
}
inline HWY_ATTR void add_rows_or_pairs(const BackwardTile &t) {
  takes_pairs(*t.p) ? add_pairs(t) : add_rows(t);
}
inline HWY_ATTR void end_keys_or_pairs(const BackwardTile &t) {
  if (!takes_pairs(*t.p)) return end_keys(t);
  const PairMemory m(t);
  store_keys(t, m, t.p->forward.softmax_scale);
}
inline HWY_ATTR void dot_rows_or_pairs(const void *const *a, const void *const *b, int64_t width, int32_t dtype,
                                       float *dots) {
  dtype == FLASHSPARK_BFLOAT16 ? dot_pairs(a, b, width / 2, dots) : dot_rows(a, b, width, dtype, dots);
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // HWY_TARGET == HWY_AVX3
#endif
