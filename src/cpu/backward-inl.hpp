// The backward pass of one tile of keys and, one after the other, the tiles of query rows that see them. Five products
// of the engine's one kind: q k^T and dout v^T, then with the scores between them p^T dout, ds^T q and ds k.
#if defined(FLASHSPARK_CPU_BACKWARD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_BACKWARD_INL_HPP_
#undef FLASHSPARK_CPU_BACKWARD_INL_HPP_
#else
#define FLASHSPARK_CPU_BACKWARD_INL_HPP_
#endif

#include "cpu/backward_scores-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

// c[6][kPanel] += a[6][depth] * b[depth][kPanel], where b is a part of longer rows; a as multiply_strided() has it.
template <bool kTransposed>
HWY_NOINLINE HWY_ATTR void multiply_rows(const float *HWY_RESTRICT a, int64_t a_stride, const float *HWY_RESTRICT b,
                                         int64_t b_stride, int64_t depth, float *HWY_RESTRICT c, int64_t c_stride) {
  multiply_strided<true, kTransposed>(a, a_stride, b, b_stride, depth, c, c_stride);
}

// The rows' addresses of the tile's keys in k or v. `to` has room for whole panels.
inline HWY_ATTR void tile_addresses(const BackwardTile &t, const flashspark_tensor &tensor, const char **to) {
  const int64_t size = static_cast<int64_t>(dtype_size(tensor.dtype));
  const char *row =
      static_cast<const char *>(tensor.data) + kv_offset(t.p->forward, tensor, t.rows.s, t.key, t.rows.h_kv) * size;
  for (int64_t n = 0; n < t.count; ++n) to[n] = row + n * tensor.token_stride * size;
}

// Of all keys that products write to: whole row groups.
inline HWY_ATTR void clear_sums(const BackwardTile &t, const ScoreMemory &m) {
  const int64_t keys = (t.count + kRowGroup - 1) / kRowGroup * kRowGroup;
  clear(m.dk, keys * m.pitch);
  clear(m.dv, keys * m.pitch_v);
}

inline HWY_ATTR void begin_keys(const BackwardTile &t) {
  const Params &p = t.p->forward;
  const BackwardMemory m(t);
  const char *keys[kBackwardKeys], *values[kBackwardKeys];
  tile_addresses(t, p.k, keys);
  tile_addresses(t, p.v, values);
  const hn::CappedTag<float, 8> d;
  const auto pack = [&](auto type) HWY_ATTR {
    using Type = decltype(type);
    pack_keys<Type>(p.head_dim, t.count, keys, m.key_panels);
    pack_keys<Type>(p.head_dim_v, t.count, values, m.value_panels);
    for (int64_t n = 0; n < t.count; ++n) {
      const auto *from = reinterpret_cast<const typename Type::Element *>(keys[n]);
      // A key that is not finite makes its rows NaN by their scores. Rows that do not keep it multiply it by 0.
      for (int64_t x = 0; x < p.head_dim; x += static_cast<int64_t>(hn::Lanes(d))) {
        const auto value = widen(d, type, from + x);
        hn::StoreU(hn::IfThenElseZero(hn::IsFinite(value), value), d, m.keys + n * m.pitch + x);
      }
    }
  };
  with_type(p.k.dtype, pack);
  clear_sums(t, m);
}

// Of row r of q or dout, in elements. Rows past the last are the last one again.
inline HWY_ATTR int64_t row_offset(const BackwardTile &t, const flashspark_tensor &tensor, int64_t r) {
  const int64_t real = r < t.rows.rows ? r : t.rows.rows - 1;
  return q_offset(t.p->forward, tensor, t.rows.s, t.rows.token(real), t.rows.head(real));
}

// Rows of q or dout as floats times `scale`. Rows past the last repeat it. Returns whether all are finite.
inline HWY_ATTR bool load_rows(const BackwardTile &t, const flashspark_tensor &tensor, int64_t width, int64_t rows,
                               float scale, float *to, int64_t pitch) {
  const hn::CappedTag<float, 8> d;
  const auto vscale = hn::Set(d, scale);
  auto zeros = hn::Zero(d);  // NaN where something is not finite
  const auto copy = [&](auto type) HWY_ATTR {
    using Type = decltype(type);
    for (int64_t r = 0; r < rows; ++r, to += pitch) {
      const auto *from = static_cast<const typename Type::Element *>(tensor.data) + row_offset(t, tensor, r);
      for (int64_t n = 0; n < width; n += static_cast<int64_t>(hn::Lanes(d))) {
        const auto x = hn::Mul(widen(d, type, from + n), vscale);
        hn::StoreU(x, d, to + n);
        zeros = hn::Add(zeros, hn::Sub(x, x));
      }
    }
  };
  with_type(tensor.dtype, copy);
  return sum_of(d, zeros) == 0;
}

// Rows whose q is not finite make their own keys NaN by ds, and must not reach the keys that their masks drop.
inline HWY_ATTR void remove_nonfinite(int64_t rows, int64_t width, float *x, int64_t pitch) {
  const hn::CappedTag<float, 8> d;
  for (int64_t r = 0; r < rows; ++r, x += pitch) {
    for (int64_t n = 0; n < width; n += static_cast<int64_t>(hn::Lanes(d))) {
      const auto value = hn::LoadU(d, x + n);
      hn::StoreU(hn::IfThenElseZero(hn::IsFinite(value), value), d, x + n);
    }
  }
}

inline HWY_ATTR void find_ranges(const BackwardTile &t, BackwardRows &w) {
  w.groups = (t.rows.rows + kRowGroup - 1) / kRowGroup;
  w.rows = w.groups * kRowGroup;
  for (int64_t r = 0; r < w.rows; ++r) w.masks[r] = t.rows.mask(r < t.rows.rows ? r : t.rows.rows - 1);
  for (int64_t g = 0; g < w.groups; ++g) w.ranges[g] = group_range(w.masks + g * kRowGroup, t.key, t.count);
}

// to (rows, keys) = rows times the columns that `panels` hold. Panel outside, rows inside: the panel stays in L1.
inline HWY_ATTR void multiply_panels(const BackwardTile &t, const BackwardRows &w, const float *rows, int64_t pitch,
                                     int64_t width, const float *panels, float *to) {
  for (int64_t n = 0; n < t.count; n += kPanel) {
    for (int64_t g = 0; g < w.groups; ++g) {
      if (w.ranges[g].begin >= n + kPanel || w.ranges[g].end <= n) continue;
      multiply<false>(rows + g * kRowGroup * pitch, pitch, panels + n * width, width,
                      to + g * kRowGroup * kScorePitch + n, kScorePitch);
    }
  }
}

// Calls product(x, n, begin, end) for every panel of columns x and six keys n with the rows [begin, end) of the row
// groups that see one of these, in runs of neighbours.
template <class Product>
HWY_INLINE HWY_ATTR void for_seen_rows(const BackwardTile &t, const BackwardRows &w, int64_t width, Product &&product) {
  const auto sees = [&](int64_t g, int64_t n)
                        HWY_ATTR { return w.ranges[g].begin < n + kRowGroup && w.ranges[g].end > n; };
  for (int64_t x = 0; x < width; x += kPanel) {
    for (int64_t n = 0; n < t.count; n += kRowGroup) {
      for (int64_t g = 0; g < w.groups;) {
        if (!sees(g, n)) {
          ++g;
          continue;
        }
        const int64_t first = g;
        while (g < w.groups && sees(g, n)) ++g;
        product(x, n, first * kRowGroup, HWY_MIN(g * kRowGroup, static_cast<int64_t>(t.rows.rows)));
      }
    }
  }
}

// to (keys, width) += scores^T times rows.
inline HWY_ATTR void multiply_transposed(const BackwardTile &t, const BackwardRows &w, const float *scores,
                                         const float *rows, int64_t pitch, int64_t width, float *to) {
  for_seen_rows(t, w, width, [&](int64_t x, int64_t n, int64_t begin, int64_t end) HWY_ATTR {
    multiply_rows<true>(scores + begin * kScorePitch + n, kScorePitch, rows + begin * pitch + x, pitch, end - begin,
                        to + n * pitch + x, pitch);
  });
}

// A row group's sums that a product will need next: those of dq come from far away where a head has many rows.
HWY_INLINE HWY_ATTR void prefetch_sums(const float *c, int64_t c_stride) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t r = 0; r < kRowGroup; ++r) {
    for (int64_t n = 0; n < kPanel; n += kLine) __builtin_prefetch(c + r * c_stride + n, 1);
  }
}

// dq (rows, width) += ds times the keys.
inline HWY_ATTR void multiply_queries(const BackwardTile &t, const BackwardRows &w, const BackwardMemory &m) {
  const int64_t width = t.p->forward.head_dim, pitch = backward_width(width);
  for (int64_t x = 0; x < width; x += kPanel) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const GroupRange &range = w.ranges[g];
      if (range.begin >= range.end) continue;
      if (g + 1 < w.groups) prefetch_sums(t.dq + (t.rows.row0 + (g + 1) * kRowGroup) * pitch + x, pitch);
      multiply_rows<false>(m.gradients + g * kRowGroup * kScorePitch + range.begin, kScorePitch,
                           m.keys + range.begin * m.pitch + x, m.pitch, range.end - range.begin,
                           t.dq + (t.rows.row0 + g * kRowGroup) * pitch + x, pitch);
    }
  }
}

inline HWY_ATTR void add_rows(const BackwardTile &t) {
  const BackwardParams &b = *t.p;
  const Params &p = b.forward;
  const BackwardMemory m(t);
  BackwardRows w;
  find_ranges(t, w);
  const bool finite = load_rows(t, p.q, p.head_dim, w.rows, p.softmax_scale, m.q, m.pitch);
  load_rows(t, b.dout, p.head_dim_v, w.rows, 1.0f, m.dout, m.pitch_v);
  multiply_panels(t, w, m.q, m.pitch, p.head_dim, m.key_panels, m.scores);
  multiply_panels(t, w, m.dout, m.pitch_v, p.head_dim_v, m.value_panels, m.gradients);
  modify_scores(t, w, m);
  for (int64_t g = 0; g < w.groups; ++g) {
    if (w.ranges[g].begin < w.ranges[g].end) differentiate_group(t, w, m, g);
  }
  unmodify_scores(t, w, m);
  if (b.dv.data != nullptr) multiply_transposed(t, w, m.scores, m.dout, m.pitch_v, p.head_dim_v, m.dv);
  if (b.dk.data != nullptr) {
    if (!finite) remove_nonfinite(w.rows, p.head_dim, m.q, m.pitch);
    multiply_transposed(t, w, m.gradients, m.q, m.pitch, p.head_dim, m.dk);
  }
  if (t.dq != nullptr) multiply_queries(t, w, m);
}

// dk, times `scale`, and dv of the tile's keys.
inline HWY_ATTR void store_keys(const BackwardTile &t, const ScoreMemory &m, float scale) {
  const BackwardParams &b = *t.p;
  const Params &p = b.forward;
  for (int64_t n = 0; n < t.count; ++n) {
    const int64_t j = t.key + n, h = t.rows.h_kv;
    if (b.dk.data != nullptr)
      store_row(m.dk + n * m.pitch, p.head_dim, scale, b.dk.data, kv_offset(p, b.dk, t.rows.s, j, h), b.dk.dtype);
    if (b.dv.data != nullptr)
      store_row(m.dv + n * m.pitch_v, p.head_dim_v, 1.0f, b.dv.data, kv_offset(p, b.dv, t.rows.s, j, h), b.dv.dtype);
  }
}

inline HWY_ATTR void end_keys(const BackwardTile &t) {
  store_keys(t, BackwardMemory(t), 1.0f);
}

// Dot products of kRowGroup pairs of rows, each summed in the order of multiply(): where a row has one key, whose v is
// out, its ds is exactly 0.
inline HWY_ATTR void dot_rows(const void *const *a, const void *const *b, int64_t width, int32_t dtype, float *dots) {
  const hn::CappedTag<float, 8> d;
  const hn::CappedTag<float, 1> one;
  constexpr int64_t kStep = 8;  // divides every width
  HWY_ALIGN float x[kRowGroup][kStep], y[kRowGroup][kStep];
  hn::Vec<decltype(one)> sums[kRowGroup];
  for (int r = 0; r < kRowGroup; ++r) sums[r] = hn::Zero(one);
  const auto add = [&](auto type) HWY_ATTR {
    using Element = typename decltype(type)::Element;
    for (int64_t n = 0; n < width; n += kStep) {
      for (int r = 0; r < kRowGroup; ++r) {
        for (int64_t m = 0; m < kStep; m += static_cast<int64_t>(hn::Lanes(d))) {
          hn::StoreU(widen(d, type, static_cast<const Element *>(a[r]) + n + m), d, x[r] + m);
          hn::StoreU(widen(d, type, static_cast<const Element *>(b[r]) + n + m), d, y[r] + m);
        }
      }
      for (int64_t m = 0; m < kStep; ++m) {
        for (int r = 0; r < kRowGroup; ++r) sums[r] = hn::MulAdd(hn::Set(one, x[r][m]), hn::Set(one, y[r][m]), sums[r]);
      }
    }
  };
  with_type(dtype, add);
  for (int r = 0; r < kRowGroup; ++r) dots[r] = hn::GetLane(sums[r]);
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
