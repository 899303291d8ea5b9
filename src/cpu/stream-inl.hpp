// The kernel for few rows (decode, draft verification): K and V are read once, where they lie, and widened in
// registers.
//
// Rows go four at a time. Scores of a block are stored as (keys, 4): a vector then holds four rows of a key, and PV
// broadcasts the weight of one (key, row).
#if defined(FLASHSPARK_CPU_STREAM_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_STREAM_INL_HPP_
#undef FLASHSPARK_CPU_STREAM_INL_HPP_
#else
#define FLASHSPARK_CPU_STREAM_INL_HPP_
#endif

#include "cpu/dropout-inl.hpp"
#include "cpu/scores-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

// head_dim is a multiple of 8, so eight lanes never need a tail. Sixteen (AVX-512) serve where 16 divides both widths,
// and are faster there (docs/experiments.md E4).
using Lanes8 = hn::CappedTag<float, 8>;
using Lanes16 = hn::CappedTag<float, 16>;
using D4 = hn::FixedTag<float, 4>;

// Three keys by four rows fill 12 of AVX2's 16 registers with sums.
constexpr int kKeysAtOnce = 3;
// Keys between two calls of the prefetcher in PV: they take about as long as kKeysAtOnce keys of QK^T.
constexpr int kValuesAtOnce = 16;

// The sum of a vector's blocks of four.
template <class D>
HWY_INLINE hn::Vec<D4> sum_of_blocks(D d, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(d) > 4) {
    const hn::Half<D> half;
    return sum_of_blocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  } else {
    return v;
  }
}

// The sums of four vectors as one vector of four.
template <class D, class V = hn::Vec<D>>
HWY_INLINE hn::Vec<D4> sums_of_four(D d, V a, V b, V c, V e) {
  const hn::Repartition<uint64_t, D> d64;
  const V ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const V ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto low = hn::InterleaveLower(d64, hn::BitCast(d64, ab), hn::BitCast(d64, ce));
  const auto high = hn::InterleaveUpper(d64, hn::BitCast(d64, ab), hn::BitCast(d64, ce));
  const V sum = hn::Add(hn::BitCast(d, low), hn::BitCast(d, high));
  return sum_of_blocks(d, sum);
}

// scores[kKeys][4] = four rows of q (head_dim apart) times kKeys keys.
template <class D, class Type, int kKeys>
HWY_ATTR void stream_scores(const float *HWY_RESTRICT q, int64_t head_dim, const char *const *keys,
                            float *HWY_RESTRICT scores) {
  const D d;
  using V = hn::Vec<D>;
  const typename Type::Element *rows[kKeys];
  for (int n = 0; n < kKeys; ++n) rows[n] = reinterpret_cast<const typename Type::Element *>(keys[n]);
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  V acc[kKeys][4];
  HWY_UNROLL(kKeysAtOnce)
  for (int n = 0; n < kKeys; ++n) {
    for (int r = 0; r < 4; ++r) acc[n][r] = hn::Zero(d);
  }
  for (int64_t x = 0; x < head_dim; x += step) {
    V k[kKeys];
    HWY_UNROLL(kKeysAtOnce)
    for (int n = 0; n < kKeys; ++n) k[n] = widen(d, Type{}, rows[n] + x);
    HWY_UNROLL(4)
    for (int r = 0; r < 4; ++r) {
      const V row = hn::LoadU(d, q + r * head_dim + x);
      for (int n = 0; n < kKeys; ++n) acc[n][r] = hn::MulAdd(row, k[n], acc[n][r]);
    }
  }
  HWY_UNROLL(kKeysAtOnce)
  for (int n = 0; n < kKeys; ++n) {
    hn::StoreU(sums_of_four(d, acc[n][0], acc[n][1], acc[n][2], acc[n][3]), D4(), scores + 4 * n);
  }
}

// o[4][width] += weights[key][4] * values, kVecs vectors of columns from `column` on.
template <class D, class Type, int kVecs>
HWY_NOINLINE HWY_ATTR void stream_values(const float *HWY_RESTRICT weights, const char *const *values, int64_t count,
                                         int64_t column, int64_t width, float *HWY_RESTRICT o, Prefetcher &prefetcher) {
  const D d;
  using V = hn::Vec<D>;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  float *to[4] = {o + column, o + width + column, o + 2 * width + column, o + 3 * width + column};
  V acc[4][kVecs];
  HWY_UNROLL(4)
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < kVecs; ++c) acc[r][c] = hn::LoadU(d, to[r] + c * step);
  }
  int64_t n = 0;
  while (n < count) {
    const int64_t end = n + kValuesAtOnce < count ? n + kValuesAtOnce : count;
    for (; n < end; ++n) {
      const auto *v = reinterpret_cast<const typename Type::Element *>(values[n]) + column;
      V vec[kVecs];
      HWY_UNROLL(3)
      for (int c = 0; c < kVecs; ++c) vec[c] = widen(d, Type{}, v + c * step);
      HWY_UNROLL(4)
      for (int r = 0; r < 4; ++r) {
        const V w = hn::Set(d, weights[4 * n + r]);
        for (int c = 0; c < kVecs; ++c) acc[r][c] = hn::MulAdd(w, vec[c], acc[r][c]);
      }
    }
    prefetcher.advance();
  }
  HWY_UNROLL(4)
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < kVecs; ++c) hn::StoreU(acc[r][c], d, to[r] + c * step);
  }
}

// One step of the online softmax for four rows: scores[count][4] become weights, o and row_sum follow the new maximum.
template <class D>
HWY_ATTR void stream_softmax(float *scores, int64_t count, float *row_max, float *row_sum, float *o, int64_t width) {
  const D d;
  using V = hn::Vec<D>;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  // Pad to whole vectors; the buffer has room for it.
  const int64_t padded = (4 * count + step - 1) / step * step;
  for (int64_t n = 4 * count; n < padded; ++n) scores[n] = kMinusInfinity;

  V top = hn::Set(d, kMinusInfinity);
  for (int64_t n = 0; n < padded; n += step) top = hn::Max(hn::LoadU(d, scores + n), top);
  HWY_ALIGN float lanes[hn::MaxLanes(d)];
  hn::Store(top, d, lanes);
  HWY_ALIGN float base[4];  // what is subtracted: 0 for a row that has seen no key yet
  for (int r = 0; r < 4; ++r) {
    float now = row_max[r];
    for (int64_t m = r; m < step; m += 4) now = lanes[m] > now ? lanes[m] : now;
    base[r] = now == kMinusInfinity ? 0.0f : now;
    if (now == row_max[r]) continue;
    const float alpha = row_max[r] == kMinusInfinity ? 0.0f : __builtin_exp2f(row_max[r] - now);
    row_max[r] = now;
    row_sum[r] *= alpha;
    const V valpha = hn::Set(d, alpha);
    for (int64_t x = 0; x < width; x += step)
      hn::StoreU(hn::Mul(hn::LoadU(d, o + r * width + x), valpha), d, o + r * width + x);
  }
  const V vbase = hn::LoadDup128(d, base);
  V sum = hn::Zero(d);
  for (int64_t n = 0; n < padded; n += step) {
    const V weight = exp2_nonpositive(d, hn::Sub(hn::LoadU(d, scores + n), vbase));
    hn::StoreU(weight, d, scores + n);
    sum = hn::Add(sum, weight);
  }
  hn::Store(sum, d, lanes);
  for (int r = 0; r < 4; ++r) {
    for (int64_t m = r; m < step; m += 4) row_sum[r] += lanes[m];
  }
}

// One KV head's rows against one block of keys.
template <class D, class Type>
HWY_ATTR void stream_block(const Tile &t, int64_t key, int64_t count, const char *const *keys,
                           const char *const *values, const float *q, float *o, float *scores, float *row_max,
                           float *row_sum, Prefetcher &prefetcher) {
  const Params &p = *t.p;
  const int64_t head_dim = p.head_dim, width = p.head_dim_v, step = static_cast<int64_t>(hn::Lanes(D()));
  const int groups = (t.rows + 3) / 4;
  // Keys outside, row groups inside: the second group finds the keys in L1.
  int64_t n = 0;
  for (; n + kKeysAtOnce <= count; n += kKeysAtOnce) {
    for (int g = 0; g < groups; ++g) {
      stream_scores<D, Type, kKeysAtOnce>(q + g * 4 * head_dim, head_dim, keys + n, scores + (g * kBlockKeys + n) * 4);
      prefetcher.advance();
    }
  }
  for (; n < count; ++n) {
    for (int g = 0; g < groups; ++g) {
      stream_scores<D, Type, 1>(q + g * 4 * head_dim, head_dim, keys + n, scores + (g * kBlockKeys + n) * 4);
    }
  }
  for (int g = 0; g < groups; ++g) {
    float *group_scores = scores + g * kBlockKeys * 4;
    const int64_t first = 4 * g, last = first + 4 < t.rows ? first + 4 : t.rows;
    for (int64_t r = first; r < last && has_score_terms(p); ++r) {
      add_score_terms(t, r, key, count, group_scores + r % 4, 4);
    }
    if (t.functions != nullptr) add_function_terms(t, first, last - first, key, count, group_scores, 1, 4);
    for (int64_t r = first; r < last; ++r) {
      float *s = group_scores + r % 4;
      if (!t.mask(r).covers(key, key + count)) apply_mask(t.mask(r), key, count, s, 4);
    }
    stream_softmax<D>(group_scores, count, row_max + 4 * g, row_sum + 4 * g, o + g * 4 * width, width);
    if (t.dropout.any()) drop_four_rows(t, first, key, count, group_scores);
  }
  // Columns outside, row groups inside, for the same reason. Three vectors by four rows fill 12 registers with sums.
  for (int64_t column = 0; column < width;) {
    const int64_t vecs = (width - column) / step;
    for (int g = 0; g < groups; ++g) {
      const float *weights = scores + g * kBlockKeys * 4;
      float *to = o + g * 4 * width;
      if (vecs >= 3 && vecs != 4) {
        stream_values<D, Type, 3>(weights, values, count, column, width, to, prefetcher);
      } else if (vecs >= 2) {
        stream_values<D, Type, 2>(weights, values, count, column, width, to, prefetcher);
      } else {
        stream_values<D, Type, 1>(weights, values, count, column, width, to, prefetcher);
      }
    }
    column += step * (vecs >= 3 && vecs != 4 ? 3 : vecs >= 2 ? 2 : 1);
  }
}

// The tile of each KV head, its rows as floats and their sums before any key. `q` has rows past the last, which stay
// zero, and `o`, which begins as zero, lies behind it.
inline HWY_ATTR void start_heads(const Tile &t, int64_t padded, float *q, Tile *heads, float (*row_max)[kStreamRows],
                                 float (*row_sum)[kStreamRows]) {
  const int64_t head_dim = t.p->head_dim, width = t.p->head_dim_v;
  for (int64_t n = 0; n < t.num_heads * padded * (head_dim + width); ++n) q[n] = 0;
  for (int h = 0; h < t.num_heads; ++h) {
    Tile &head = heads[h] = t;
    head.h_kv += h;
    if (t.partial_o != nullptr) {
      head.partial_o += h * t.rows * width;
      head.partial_ml += h * t.rows * 2;
    }
    const float scale = query_scale(head);
    for (int64_t r = 0; r < padded; ++r) {
      row_max[h][r] = kMinusInfinity;
      row_sum[h][r] = 0;
      if (r >= t.rows) continue;
      load_query(head, r, scale, q + (h * padded + r) * head_dim);
      start_row(head, r, &row_max[h][r], &row_sum[h][r]);
    }
  }
}

template <class D, class Type>
HWY_ATTR void stream_tile(const Tile &t) {
  const Params &p = *t.p;
  const int64_t head_dim = p.head_dim, width = p.head_dim_v, step = static_cast<int64_t>(hn::Lanes(D()));
  const int groups = (t.rows + 3) / 4, padded = groups * 4;

  float *q = t.scratch;                              // (num_heads, padded, head_dim)
  float *o = q + t.num_heads * padded * head_dim;    // (num_heads, padded, width)
  float *scores = o + t.num_heads * padded * width;  // (groups, kBlockKeys, 4) and a vector of padding
  float row_max[kMaxStreamHeads][kStreamRows], row_sum[kMaxStreamHeads][kStreamRows];
  Tile heads[kMaxStreamHeads];
  start_heads(t, padded, q, heads, row_max, row_sum);

  // Rows of this block and of the next one, for the first head.
  const char *addresses[2][2][kBlockKeys];
  const int64_t size = static_cast<int64_t>(sizeof(typename Type::Element)),
                columns = (width + 3 * step - 1) / (3 * step);
  int side = 0;
  BlockCursor block(t, kBlockKeys);
  key_addresses(t, p.k, block, addresses[0][0]);
  key_addresses(t, p.v, block, addresses[0][1]);
  while (block.count > 0) {
    const int64_t key = block.key, count = block.count;
    const char **keys = addresses[side][0], **values = addresses[side][1];
    block.next();
    side ^= 1;
    key_addresses(t, p.k, block, addresses[side][0]);
    key_addresses(t, p.v, block, addresses[side][1]);
    Prefetcher prefetcher;
    prefetcher.start(t, addresses[side][0], addresses[side][1], block.count,
                     t.num_heads * groups * (count / kKeysAtOnce + columns * (count / kValuesAtOnce)));
    for (int h = 0; h < t.num_heads; ++h) {
      stream_block<D, Type>(heads[h], key, count, keys, values, q + h * padded * head_dim, o + h * padded * width,
                            scores, row_max[h], row_sum[h], prefetcher);
      for (int64_t n = 0; h + 1 < t.num_heads && n < count; ++n) {
        keys[n] += p.k.head_stride * size;
        values[n] += p.v.head_stride * size;
      }
    }
  }
  for (int h = 0; h < t.num_heads; ++h) {
    for (int64_t r = 0; r < t.rows; ++r) {
      finish_row(heads[h], r, o + (h * padded + r) * width, row_max[h][r], row_sum[h][r]);
    }
  }
}

template <class Type>
HWY_ATTR void run_stream(const Tile &t) {
  const bool even = t.p->head_dim % 16 == 0 && t.p->head_dim_v % 16 == 0;
  even ? stream_tile<Lanes16, Type>(t) : stream_tile<Lanes8, Type>(t);
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
