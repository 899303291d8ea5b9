// The kernel for few rows (decode, draft verification): K and V are read once, in place, widened in registers.
//
// Rows go four at a time. Scores of a block are kept as (keys, 4): a vector then holds whole rows of four, and the weight
// of (key, row) is one broadcast away for PV.
#if defined(FLASHSPARK_CPU_STREAM_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_STREAM_INL_HPP_
#undef FLASHSPARK_CPU_STREAM_INL_HPP_
#else
#define FLASHSPARK_CPU_STREAM_INL_HPP_
#endif

#include "cpu/scores-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

// head_dim is a multiple of 8, so eight lanes never need a tail.
using D8 = hn::CappedTag<float, 8>;
using V8 = hn::Vec<D8>;
using D4 = hn::FixedTag<float, 4>;

// The sums of four vectors as one vector of four.
HWY_INLINE hn::Vec<D4> sums_of_four(V8 a, V8 b, V8 c, V8 e) {
  const D8 d;
  const hn::Repartition<uint64_t, D8> d64;
  const V8 ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const V8 ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto low = hn::InterleaveLower(d64, hn::BitCast(d64, ab), hn::BitCast(d64, ce));
  const auto high = hn::InterleaveUpper(d64, hn::BitCast(d64, ab), hn::BitCast(d64, ce));
  const V8 sum = hn::Add(hn::BitCast(d, low), hn::BitCast(d, high));
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
  return hn::Add(hn::LowerHalf(D4(), sum), hn::UpperHalf(D4(), sum));
#else
  return sum;
#endif
}

// Bytes of the row at `p` into the cache ahead of use: the pages of a sequence lie anywhere, which no hardware follows.
HWY_INLINE void prefetch_row(const void *p, int64_t bytes) {
  for (int64_t n = 0; n < bytes; n += 64) __builtin_prefetch(static_cast<const char *>(p) + n);
}

// scores[key][4] = four rows of q (row-major, D apart) times `count` keys.
template <class Type>
HWY_ATTR void stream_scores(const float *q, int64_t head_dim, const typename Type::Element *const *keys, int64_t count,
                            const typename Type::Element *const *next, int64_t next_count, float *scores) {
  const D8 d;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(typename Type::Element));
  const float *q0 = q, *q1 = q + head_dim, *q2 = q + 2 * head_dim, *q3 = q + 3 * head_dim;
  int64_t n = 0;
  for (; n + 2 <= count; n += 2) {
    if (n < next_count) prefetch_row(next[n], bytes);
    if (n + 1 < next_count) prefetch_row(next[n + 1], bytes);
    const auto *k0 = keys[n], *k1 = keys[n + 1];
    V8 a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (int64_t x = 0; x < head_dim; x += step) {
      const V8 ka = widen(d, Type{}, k0 + x), kb = widen(d, Type{}, k1 + x);
      const V8 qa = hn::LoadU(d, q0 + x), qb = hn::LoadU(d, q1 + x);
      a0 = hn::MulAdd(qa, ka, a0);
      b0 = hn::MulAdd(qa, kb, b0);
      a1 = hn::MulAdd(qb, ka, a1);
      b1 = hn::MulAdd(qb, kb, b1);
      const V8 qc = hn::LoadU(d, q2 + x), qe = hn::LoadU(d, q3 + x);
      a2 = hn::MulAdd(qc, ka, a2);
      b2 = hn::MulAdd(qc, kb, b2);
      a3 = hn::MulAdd(qe, ka, a3);
      b3 = hn::MulAdd(qe, kb, b3);
    }
    hn::StoreU(sums_of_four(a0, a1, a2, a3), D4(), scores + 4 * n);
    hn::StoreU(sums_of_four(b0, b1, b2, b3), D4(), scores + 4 * n + 4);
  }
  if (n < count) {
    V8 a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0;
    for (int64_t x = 0; x < head_dim; x += step) {
      const V8 ka = widen(d, Type{}, keys[n] + x);
      a0 = hn::MulAdd(hn::LoadU(d, q0 + x), ka, a0);
      a1 = hn::MulAdd(hn::LoadU(d, q1 + x), ka, a1);
      a2 = hn::MulAdd(hn::LoadU(d, q2 + x), ka, a2);
      a3 = hn::MulAdd(hn::LoadU(d, q3 + x), ka, a3);
    }
    hn::StoreU(sums_of_four(a0, a1, a2, a3), D4(), scores + 4 * n);
  }
}

// o[4][width] += weights[key][4] * values, kVecs vectors of columns from `column` on.
template <class Type, int kVecs>
HWY_ATTR void stream_values_columns(const float *weights, const typename Type::Element *const *values, int64_t count,
                                    int64_t column, int64_t width, float *o) {
  const D8 d;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  float *to[4] = {o + column, o + width + column, o + 2 * width + column, o + 3 * width + column};
  V8 acc[4][kVecs];
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < kVecs; ++c) acc[r][c] = hn::LoadU(d, to[r] + c * step);
  }
  for (int64_t n = 0; n < count; ++n) {
    const auto *v = values[n] + column;
    V8 vec[kVecs];
    for (int c = 0; c < kVecs; ++c) vec[c] = widen(d, Type{}, v + c * step);
    for (int r = 0; r < 4; ++r) {
      const V8 w = hn::Set(d, weights[4 * n + r]);
      for (int c = 0; c < kVecs; ++c) acc[r][c] = hn::MulAdd(w, vec[c], acc[r][c]);
    }
  }
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < kVecs; ++c) hn::StoreU(acc[r][c], d, to[r] + c * step);
  }
}

template <class Type>
HWY_ATTR void stream_values(const float *weights, const typename Type::Element *const *values, int64_t count,
                            int64_t width, float *o) {
  const int64_t step = static_cast<int64_t>(hn::Lanes(D8()));
  int64_t column = 0;
  for (; column + 2 * step <= width; column += 2 * step) {
    stream_values_columns<Type, 2>(weights, values, count, column, width, o);
  }
  if (column < width) stream_values_columns<Type, 1>(weights, values, count, column, width, o);
}

// One step of the online softmax for four rows: scores[count][4] become weights, o and row_sum follow the new maximum.
inline HWY_ATTR void stream_softmax(float *scores, int64_t count, float *row_max, float *row_sum, float *o,
                                    int64_t width) {
  const D8 d;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  // Pad to whole vectors; the buffer has room for it.
  const int64_t padded = (4 * count + step - 1) / step * step;
  for (int64_t n = 4 * count; n < padded; ++n) scores[n] = kMinusInfinity;

  V8 top = hn::Set(d, kMinusInfinity);
  for (int64_t n = 0; n < padded; n += step) top = hn::Max(hn::LoadU(d, scores + n), top);
  HWY_ALIGN float lanes[8];
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
    const V8 valpha = hn::Set(d, alpha);
    for (int64_t x = 0; x < width; x += step) hn::StoreU(hn::Mul(hn::LoadU(d, o + r * width + x), valpha), d, o + r * width + x);
  }
  const V8 vbase = hn::LoadDup128(d, base);
  V8 sum = hn::Zero(d);
  for (int64_t n = 0; n < padded; n += step) {
    const V8 weight = exp2_nonpositive(d, hn::Sub(hn::LoadU(d, scores + n), vbase));
    hn::StoreU(weight, d, scores + n);
    sum = hn::Add(sum, weight);
  }
  hn::Store(sum, d, lanes);
  for (int r = 0; r < 4; ++r) {
    for (int64_t m = r; m < step; m += 4) row_sum[r] += lanes[m];
  }
}

template <class Type>
HWY_ATTR void run_stream(const Tile &t) {
  using Element = typename Type::Element;
  const Params &p = *t.p;
  const int64_t head_dim = p.head_dim, width = p.head_dim_v;
  const int groups = (t.rows + 3) / 4;
  constexpr int kMaxGroups = kStreamRows / 4;

  float *q = t.scratch;                            // (groups, 4, head_dim)
  float *o = q + groups * 4 * head_dim;            // (groups, 4, width)
  float *scores = o + groups * 4 * width;          // (kBlockKeys, 4) and a vector of padding
  float row_max[kMaxGroups * 4], row_sum[kMaxGroups * 4];
  for (int64_t n = 0; n < groups * 4 * (head_dim + width); ++n) q[n] = 0;  // rows past the last stay zero, and so does o
  const float scale = query_scale(t);
  for (int64_t r = 0; r < groups * 4; ++r) {
    row_max[r] = kMinusInfinity;
    row_sum[r] = 0;
    if (r >= t.rows) continue;
    load_query(t, r, scale, q + r * head_dim);
    start_row(t, r, &row_max[r], &row_sum[r]);
  }

  // Addresses of this block's keys and of the next one's, which are prefetched while this one is worked on.
  const Element *addresses[2][2][kBlockKeys];
  int64_t span = 0, key = t.num_spans > 0 ? t.spans[0].begin : 0;
  const auto block_at = [&](int64_t which, int64_t from) HWY_ATTR -> int64_t {
    if (which >= t.num_spans) return 0;
    const int64_t left = t.spans[which].end - from;
    return left < kBlockKeys ? left : kBlockKeys;
  };
  int side = 0;
  int64_t count = block_at(span, key);
  if (count > 0) {
    key_addresses(t, p.k, key, count, addresses[0][0]);
    key_addresses(t, p.v, key, count, addresses[0][1]);
  }
  while (count > 0) {
    int64_t next_span = span, next_key = key + count;
    if (next_key >= t.spans[span].end) {
      ++next_span;
      next_key = next_span < t.num_spans ? t.spans[next_span].begin : 0;
    }
    const int64_t next_count = block_at(next_span, next_key);
    const Element *const *keys = addresses[side][0], *const *values = addresses[side][1];
    const Element **next_keys = addresses[side ^ 1][0], **next_values = addresses[side ^ 1][1];
    if (next_count > 0) {
      key_addresses(t, p.k, next_key, next_count, next_keys);
      key_addresses(t, p.v, next_key, next_count, next_values);
    }
    for (int g = 0; g < groups; ++g) {
      // Only the first group prefetches; the others find the block in the cache.
      stream_scores<Type>(q + g * 4 * head_dim, head_dim, keys, count, next_keys, g == 0 ? next_count : 0, scores);
      for (int64_t r = 4 * g; r < 4 * g + 4 && r < t.rows; ++r) {
        float *s = scores + r % 4;
        if (has_score_terms(p)) add_score_terms(t, r, key, count, s, 4);
        if (!t.mask(r).covers(key, key + count)) apply_mask(t.mask(r), key, count, s, 4);
      }
      float *og = o + g * 4 * width;
      stream_softmax(scores, count, row_max + 4 * g, row_sum + 4 * g, og, width);
      if (g == 0) {
        for (int64_t n = 0; n < next_count; ++n) prefetch_row(next_values[n], width * static_cast<int64_t>(sizeof(Element)));
      }
      stream_values<Type>(scores, values, count, width, og);
    }
    side ^= 1;
    span = next_span;
    key = next_key;
    count = next_count;
  }
  for (int64_t r = 0; r < t.rows; ++r) finish_row(t, r, o + r * width, row_max[r], row_sum[r]);
}

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
