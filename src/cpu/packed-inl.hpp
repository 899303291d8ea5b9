// The kernel for many rows (prefill). Each block of K and V is widened into panels once; two register-blocked matrix
// products run over the panels, six rows by one panel at a time, with the softmax between them.
#if defined(FLASHSPARK_CPU_PACKED_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_PACKED_INL_HPP_
#undef FLASHSPARK_CPU_PACKED_INL_HPP_
#else
#define FLASHSPARK_CPU_PACKED_INL_HPP_
#endif

#include "cpu/dropout-inl.hpp"
#include "cpu/scores-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

using DN = hn::ScalableTag<float>;
using VN = hn::Vec<DN>;
constexpr int kLanes = HWY_MAX_BYTES / sizeof(float);

// A panel is so wide that the accumulators of 6 rows, a row of the panel and one broadcast fill the registers: 16
// floats on AVX2 (15 of 16 registers) and NEON (29 of 32), 32 on AVX-512.
constexpr int kPanelVecs = kLanes >= 8 ? 2 : 4;
constexpr int kPanel = kPanelVecs * kLanes;
static_assert(kPackedKeys % kPanel == 0 && kPackedPad % kPanel == 0);

// Four rows of four become columns: to[c * kPanel + r] = rows[r][c].
template <class Type>
HWY_INLINE void transpose_four(const typename Type::Element *const rows[4], int64_t at, float *to) {
  const hn::FixedTag<float, 4> d;
  const hn::Repartition<uint64_t, decltype(d)> d64;
  const auto a = widen(d, Type{}, rows[0] + at), b = widen(d, Type{}, rows[1] + at);
  const auto c = widen(d, Type{}, rows[2] + at), e = widen(d, Type{}, rows[3] + at);
  const auto ab_low = hn::BitCast(d64, hn::InterleaveLower(d, a, b)),
             ab_high = hn::BitCast(d64, hn::InterleaveUpper(d, a, b));
  const auto ce_low = hn::BitCast(d64, hn::InterleaveLower(d, c, e)),
             ce_high = hn::BitCast(d64, hn::InterleaveUpper(d, c, e));
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, ab_low, ce_low)), d, to);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, ab_low, ce_low)), d, to + kPanel);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, ab_high, ce_high)), d, to + 2 * kPanel);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, ab_high, ce_high)), d, to + 3 * kPanel);
}

// panels[key / kPanel][head_dim][kPanel] = keys, transposed. Keys past `count` up to the panel's end repeat the last
// one: their scores are never used. `keys` has room for them.
template <class Type>
HWY_ATTR void pack_keys(int64_t head_dim, int64_t count, const char **keys, float *panels) {
  using Element = typename Type::Element;
  const int64_t padded = (count + kPanel - 1) / kPanel * kPanel;
  for (int64_t n = count; n < padded; ++n) keys[n] = keys[count - 1];
  for (int64_t n = 0; n < padded; n += 4) {
    const Element *rows[4];
    for (int m = 0; m < 4; ++m) rows[m] = reinterpret_cast<const Element *>(keys[n + m]);
    float *to = panels + n / kPanel * head_dim * kPanel + n % kPanel;
    for (int64_t x = 0; x < head_dim; x += 4) transpose_four<Type>(rows, x, to + x * kPanel);
  }
}

// panels[column / kPanel][kPackedKeys][kPanel] = values; columns past `width` are zero.
template <class Type>
HWY_ATTR void pack_values(int64_t width, int64_t count, const char *const *values, float *panels) {
  const hn::CappedTag<float, 8> d;
  constexpr int64_t kStep = HWY_MIN(kLanes, 8);
  for (int64_t n = 0; n < count; ++n) {
    const auto *row = reinterpret_cast<const typename Type::Element *>(values[n]);
    float *to = panels + n * kPanel;
    for (int64_t x = 0; x < width; x += kPanel, to += kPackedKeys * kPanel) {
      for (int64_t y = 0; y < kPanel; y += kStep) {
        const auto value = x + y < width ? widen(d, Type{}, row + x + y) : hn::Zero(d);
        hn::StoreU(value, d, to + y);
      }
    }
  }
}

inline HWY_ATTR void pack_block(const Tile &t, int64_t count, const char **keys, const char *const *values,
                                float *key_panels, float *value_panels) {
  const auto pack = [&](auto type) HWY_ATTR {
    pack_keys<decltype(type)>(t.p->head_dim, count, keys, key_panels);
    pack_values<decltype(type)>(t.p->head_dim_v, count, values, value_panels);
  };
  with_type(t.p->k.dtype, pack);
}

// c[6][kPanel] (+)= a[6][depth] * b[depth][kPanel]. The one inner loop of the engine. kTransposed: a is [depth][6], so
// that a_stride leads from one step of the depth to the next.
template <bool kAccumulate, bool kTransposed>
HWY_INLINE HWY_ATTR void multiply_strided(const float *HWY_RESTRICT a, int64_t a_stride, const float *HWY_RESTRICT b,
                                          int64_t b_stride, int64_t depth, float *HWY_RESTRICT c, int64_t c_stride) {
  const DN d;
  VN acc[kRowGroup][kPanelVecs];
  HWY_UNROLL(kRowGroup)
  for (int r = 0; r < kRowGroup; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) {
      acc[r][v] = kAccumulate ? hn::LoadU(d, c + r * c_stride + v * kLanes) : hn::Zero(d);
    }
  }
  for (int64_t n = 0; n < depth; ++n, b += b_stride, a += kTransposed ? a_stride : 1) {
    VN row[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) row[v] = hn::Load(d, b + v * kLanes);
    HWY_UNROLL(kRowGroup)
    for (int r = 0; r < kRowGroup; ++r) {
      const VN x = hn::Set(d, kTransposed ? a[r] : a[r * a_stride]);
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = hn::MulAdd(x, row[v], acc[r][v]);
    }
  }
  HWY_UNROLL(kRowGroup)
  for (int r = 0; r < kRowGroup; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) hn::StoreU(acc[r][v], d, c + r * c_stride + v * kLanes);
  }
}

// With b as pack_keys() and pack_values() leave it.
template <bool kAccumulate>
HWY_NOINLINE HWY_ATTR void multiply(const float *HWY_RESTRICT a, int64_t a_stride, const float *HWY_RESTRICT b,
                                    int64_t depth, float *HWY_RESTRICT c, int64_t c_stride) {
  multiply_strided<kAccumulate, false>(a, a_stride, b, kPanel, depth, c, c_stride);
}

// Scores s[0, count) of one row become weights; o and row_sum follow the new maximum. `count` is whole vectors.
inline HWY_ATTR void softmax_row(float *s, int64_t count, float *row_max, float *row_sum, float *o, int64_t width) {
  const DN d;
  VN top = hn::Set(d, *row_max);
  for (int64_t n = 0; n < count; n += kLanes) top = hn::Max(hn::LoadU(d, s + n), top);
  const float now = max_of(d, top);
  if (now != *row_max) {
    const float alpha = *row_max == kMinusInfinity ? 0.0f : __builtin_exp2f(*row_max - now);
    *row_max = now;
    *row_sum *= alpha;
    const VN valpha = hn::Set(d, alpha);
    for (int64_t x = 0; x < width; x += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, o + x), valpha), d, o + x);
  }
  const VN base = hn::Set(d, now == kMinusInfinity ? 0.0f : now);
  VN sum = hn::Zero(d);
  for (int64_t n = 0; n < count; n += kLanes) {
    const VN weight = exp2_nonpositive(d, hn::Sub(hn::LoadU(d, s + n), base));
    hn::StoreU(weight, d, s + n);
    sum = hn::Add(sum, weight);
  }
  *row_sum += sum_of(d, sum);
}

// The keys of a block that any row of a row group keeps, as offsets into the block.
struct GroupRange {
  int32_t begin, end;
};

inline HWY_ATTR GroupRange group_range(const RowMask *masks, int64_t key, int64_t count) {
  int64_t begin = count, end = 0;
  const auto widen_to = [&](const Interval &kept) HWY_ATTR {
    const int64_t low = kept.begin > key ? kept.begin - key : 0;
    const int64_t high = kept.end - key < count ? kept.end - key : count;
    if (low >= high) return;
    begin = low < begin ? low : begin;
    end = high > end ? high : end;
  };
  for (int64_t r = 0; r < kRowGroup; ++r) {
    widen_to(masks[r].first);
    widen_to(masks[r].second);
  }
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// A tile's scratch memory, and what is known of its rows.
struct PackedTile {
  int64_t head_dim, width, groups, rows;  // width: of V and of the results, padded; rows: whole groups
  float *key_panels;                      // (kPackedKeys / kPanel, head_dim, kPanel)
  float *value_panels;                    // (width / kPanel, kPackedKeys, kPanel)
  float *o;                               // (rows, width)
  float *scores;                          // (rows, kPackedKeys)
  float *q;                               // (rows, head_dim)
  float row_max[kMaxTileRows], row_sum[kMaxTileRows];
  RowMask masks[kMaxTileRows];
  GroupRange ranges[kMaxTileRows / kRowGroup];  // of the current block
};

inline HWY_ATTR void start_packed(const Tile &t, PackedTile &w) {
  const Params &p = *t.p;
  w.head_dim = p.head_dim;
  w.width = (p.head_dim_v + kPackedPad - 1) / kPackedPad * kPackedPad;
  w.groups = (t.rows + kRowGroup - 1) / kRowGroup;
  w.rows = w.groups * kRowGroup;
  w.key_panels = t.scratch;
  w.value_panels = w.key_panels + kPackedKeys * w.head_dim;
  w.o = w.value_panels + kPackedKeys * w.width;
  w.scores = w.o + w.rows * w.width;
  w.q = w.scores + w.rows * kPackedKeys;
  const float scale = query_scale(t);
  for (int64_t n = 0; n < w.rows * w.width; ++n) w.o[n] = 0;
  for (int64_t r = 0; r < w.rows; ++r) {
    // Rows past the last are computed like the last one and thrown away.
    const int64_t real = r < t.rows ? r : t.rows - 1;
    w.masks[r] = t.mask(real);
    prefetch_row<false>(t, p.q, w.head_dim, r + kRowsAhead);
    load_query(t, real, scale, w.q + r * w.head_dim);
    start_row(t, real, &w.row_max[r], &w.row_sum[r]);
  }
}

// Scores of the `count` keys in key_panels. Panel outside, rows inside: the panel stays in L1 while Q streams past it.
inline HWY_ATTR void multiply_keys(const PackedTile &w, int64_t count, Prefetcher &prefetcher) {
  for (int64_t n = 0; n < count; n += kPanel) {
    for (int64_t g = 0; g < w.groups; ++g) {
      if (w.ranges[g].begin >= n + kPanel || w.ranges[g].end <= n) continue;
      prefetcher.advance();
      multiply<false>(w.q + g * kRowGroup * w.head_dim, w.head_dim, w.key_panels + n * w.head_dim, w.head_dim,
                      w.scores + g * kRowGroup * kPackedKeys + n, kPackedKeys);
    }
  }
}

// Softcap, biases and the user's functions, for the rows that keep some key.
inline HWY_ATTR void modify_packed(const Tile &t, PackedTile &w, int64_t key, int64_t count) {
  int64_t first = w.rows, last = 0, begin = count, end = 0;
  for (int64_t r = 0; r < w.rows; ++r) {
    const GroupRange range = w.ranges[r / kRowGroup];
    if (range.begin >= range.end) continue;
    const int64_t from = range.begin / kPanel * kPanel, to = (range.end + kPanel - 1) / kPanel * kPanel;
    const int64_t stop = to < count ? to : count;
    if (has_score_terms(*t.p))
      add_score_terms(t, r < t.rows ? r : t.rows - 1, key + from, stop - from, w.scores + r * kPackedKeys + from, 1);
    first = r < first ? r : first;
    last = r + 1 > last ? r + 1 : last;
    begin = from < begin ? from : begin;
    end = stop > end ? stop : end;
  }
  if (t.functions == nullptr || first >= last) return;
  last = last < t.rows ? last : t.rows;  // not rows that only fill the last group
  add_function_terms(t, first, last - first, key + begin, end - begin, w.scores + first * kPackedKeys + begin,
                     kPackedKeys, 1);
}

// Scores of keys [key, key + count) become weights.
inline HWY_ATTR void softmax_packed(const Tile &t, PackedTile &w, int64_t key, int64_t count) {
  if (has_score_terms(*t.p) || t.functions != nullptr) modify_packed(t, w, key, count);
  for (int64_t g = 0; g < w.groups; ++g) {
    const GroupRange range = w.ranges[g];
    if (range.begin >= range.end) continue;
    const int64_t begin = range.begin / kPanel * kPanel, end = (range.end + kPanel - 1) / kPanel * kPanel;
    const int64_t last = end < count ? end : count;
    float *scores = w.scores + g * kRowGroup * kPackedKeys + begin;
    for (int64_t r = g * kRowGroup; r < (g + 1) * kRowGroup; ++r) {
      float *s = w.scores + r * kPackedKeys + begin;
      if (!w.masks[r].covers(key + begin, key + last)) apply_mask(w.masks[r], key + begin, last - begin, s, 1);
      for (int64_t n = last; n < end; ++n) s[n - begin] = kMinusInfinity;
      softmax_row(s, end - begin, &w.row_max[r], &w.row_sum[r], w.o + r * w.width, w.width);
    }
    if (t.dropout.any()) drop_row_group<kPackedKeys>(t, g * kRowGroup, key + begin, end - begin, scores);
  }
}

// o += weights times the values in value_panels.
inline HWY_ATTR void multiply_values(const PackedTile &w, int64_t head_dim_v, Prefetcher &prefetcher) {
  for (int64_t x = 0; x < head_dim_v; x += kPanel) {
    const float *panel = w.value_panels + x * kPackedKeys;
    for (int64_t g = 0; g < w.groups; ++g) {
      const GroupRange range = w.ranges[g];
      if (range.begin >= range.end) continue;
      prefetcher.advance();
      multiply<true>(w.scores + g * kRowGroup * kPackedKeys + range.begin, kPackedKeys, panel + range.begin * kPanel,
                     range.end - range.begin, w.o + g * kRowGroup * w.width + x, w.width);
    }
  }
}

inline HWY_ATTR void run_packed(const Tile &t) {
  const Params &p = *t.p;
  PackedTile w;
  start_packed(t, w);
  const char *keys[kPackedKeys], *values[kPackedKeys];
  BlockCursor block(t, kPackedKeys);
  key_addresses(t, p.k, block, keys);
  key_addresses(t, p.v, block, values);
  while (block.count > 0) {
    const int64_t key = block.key, count = block.count;
    pack_block(t, count, keys, values, w.key_panels, w.value_panels);
    for (int64_t g = 0; g < w.groups; ++g) w.ranges[g] = group_range(w.masks + g * kRowGroup, key, count);

    block.next();
    key_addresses(t, p.k, block, keys);
    key_addresses(t, p.v, block, values);
    Prefetcher prefetcher;
    prefetcher.start(t, keys, values, block.count, w.groups * (count + w.width) / kPanel);

    multiply_keys(w, count, prefetcher);
    softmax_packed(t, w, key, count);
    multiply_values(w, p.head_dim_v, prefetcher);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    if (t.partial_o == nullptr) prefetch_row<true>(t, p.out, p.head_dim_v, r + kRowsAhead);
    finish_row(t, r, w.o + r * w.width, w.row_max[r], w.row_sum[r]);
  }
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
