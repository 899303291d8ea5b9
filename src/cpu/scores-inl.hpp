// What happens to scores between QK^T and the softmax, and how a row starts and ends: for both kernels of a target.
#if defined(FLASHSPARK_CPU_SCORES_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHSPARK_CPU_SCORES_INL_HPP_
#undef FLASHSPARK_CPU_SCORES_INL_HPP_
#else
#define FLASHSPARK_CPU_SCORES_INL_HPP_
#endif

#include "cpu/simd-inl.hpp"
#include "cpu/tile.hpp"

HWY_BEFORE_NAMESPACE();
namespace flashspark::cpu::HWY_NAMESPACE {

constexpr float kMinusInfinity = -__builtin_inff();

// Scores stay in natural units while something has to be added to them; otherwise log2(e) is folded into Q.
inline HWY_ATTR bool has_score_terms(const Params &p) {
  return p.softcap > 0 || p.rel_logits != nullptr || p.alibi_slopes != nullptr || p.score_mod.mod != nullptr;
}

inline HWY_ATTR float query_scale(const Tile &t) {
  const Params &p = *t.p;
  const float scale = p.softmax_scale * scale_at(p.q_descale, t.s.index, t.h_kv, p.q.dtype) *
                      scale_at(p.k_descale, t.s.index, t.h_kv, p.k.dtype);
  return has_score_terms(p) ? scale : scale * kLog2e;
}

// Prefetches row r of q or out, kRowsAhead rows before its use: consecutive rows of one head may lie pages apart.
constexpr int64_t kRowsAhead = 8;
template <bool kWrite>
HWY_ATTR void prefetch_row(const Tile &t, const flashspark_tensor &tensor, int64_t width, int64_t r) {
  if (r >= t.rows) return;
  const int64_t size = static_cast<int64_t>(dtype_size(tensor.dtype));
  const char *row = static_cast<const char *>(tensor.data) + q_offset(*t.p, tensor, t.s, t.token(r), t.head(r)) * size;
  for (int64_t n = 0; n < width * size; n += 64) __builtin_prefetch(row + n, kWrite);
}

// Row r of the tile as floats times the scale: head_dim elements.
inline HWY_ATTR void load_query(const Tile &t, int64_t r, float scale, float *to) {
  const Params &p = *t.p;
  const int64_t at = q_offset(p, p.q, t.s, t.token(r), t.head(r));
  const hn::CappedTag<float, 8> d;
  const auto vscale = hn::Set(d, scale);
  const auto copy = [&](auto type) HWY_ATTR {
    using Type = decltype(type);
    const auto *from = static_cast<const typename Type::Element *>(p.q.data) + at;
    for (int64_t n = 0; n < p.head_dim; n += static_cast<int64_t>(hn::Lanes(d))) {
      hn::StoreU(hn::Mul(widen(d, type, from + n), vscale), d, to + n);
    }
  };
  with_type(p.q.dtype, copy);
}

// softcap * tanh(score / softcap). With stride 1 whole vectors: what lies behind the last score is never used.
inline HWY_ATTR void cap_scores(float softcap, int64_t count, float *s, int64_t stride) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto inverse = hn::Set(d, 1.0f / softcap), factor = hn::Set(d, softcap);
  const auto cap = [&](const float *from, float *to) HWY_ATTR {
    hn::StoreU(hn::Mul(tanh_of(d, hn::Mul(hn::LoadU(d, from), inverse)), factor), d, to);
  };
  if (stride == 1) {
    for (int64_t n = 0; n < count; n += lanes) cap(s + n, s + n);
    return;
  }
  HWY_ALIGN float block[HWY_MAX_BYTES / sizeof(float)];
  for (int64_t n = 0; n < count; n += lanes) {
    const int64_t valid = count - n < lanes ? count - n : lanes;
    for (int64_t m = 0; m < lanes; ++m) block[m] = m < valid ? s[(n + m) * stride] : 0.0f;
    cap(block, block);
    for (int64_t m = 0; m < valid; ++m) s[(n + m) * stride] = block[m];
  }
}

// Relative-position bias and ALiBi for the scores of row r against keys [key, key + count), at s[n * stride], in
// natural units.
inline HWY_ATTR void add_biases(const Tile &t, int64_t r, int64_t key, int64_t count, float *s, int64_t stride) {
  const Params &p = *t.p;
  const int64_t i = t.token(r), h = t.head(r), pos = t.s.pos(i);
  if (p.rel_logits != nullptr) {
    const int64_t base = token_row(p, t.s, i) * p.rel_token_stride + h * p.rel_head_stride;
    const int64_t first = pos - p.rel_extent + 1 > key ? pos - p.rel_extent + 1 : key;
    const int64_t last = pos < key + count - 1 ? pos : key + count - 1;
    for (int64_t j = first; j <= last; ++j) {
      s[(j - key) * stride] += load_as_float(p.rel_logits, base + pos - j, p.rel_dtype);
    }
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = alibi_slope(p, t.s.index, h);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t distance = pos - key - n;
      s[n * stride] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
  }
}

// Softcap and biases; leaves the scores in units of log2, or in natural units where a score function follows
// (add_function_terms).
inline HWY_ATTR void add_score_terms(const Tile &t, int64_t r, int64_t key, int64_t count, float *s, int64_t stride) {
  const Params &p = *t.p;
  if (p.softcap > 0) cap_scores(p.softcap, count, s, stride);
  add_biases(t, r, key, count, s, stride);
  if (p.score_mod.mod != nullptr) return;
  for (int64_t n = 0; n < count; ++n) s[n * stride] *= kLog2e;
}

// The user's functions and block lists, for `rows` rows; leaves scores in units of log2.
inline HWY_ATTR void add_function_terms(const Tile &t, int64_t first, int64_t rows, int64_t key, int64_t count,
                                        float *s, int64_t row_stride, int64_t key_stride) {
  apply_functions(t, first, rows, key, count, s, row_stride, key_stride);
  if (t.p->score_mod.mod == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    float *row = s + r * row_stride;
    if (key_stride == 1) {  // apart, for the sake of vectors
      for (int64_t n = 0; n < count; ++n) row[n] *= kLog2e;
    } else {
      for (int64_t n = 0; n < count; ++n) row[n * key_stride] *= kLog2e;
    }
  }
}

// -inf for the keys of [key, key + count) that the row does not keep.
inline HWY_ATTR void apply_mask(const RowMask &mask, int64_t key, int64_t count, float *s, int64_t stride) {
  const auto hide = [&](int64_t begin, int64_t end) {
    if (begin < key) begin = key;
    if (end > key + count) end = key + count;
    for (int64_t j = begin; j < end; ++j) s[(j - key) * stride] = kMinusInfinity;
  };
  hide(key, mask.first.begin);
  if (mask.second.empty()) return hide(mask.first.end, key + count);
  hide(mask.first.end, mask.second.begin);
  hide(mask.second.end, key + count);
}

// Row maximum and sum before any key: of the sink, or of nothing.
inline HWY_ATTR void start_row(const Tile &t, int64_t r, float *row_max, float *row_sum) {
  *row_max = kMinusInfinity;
  *row_sum = 0;
  if (!t.with_sink || t.p->sinks == nullptr) return;
  *row_max = load_as_float(t.p->sinks, t.head(r), t.p->sinks_dtype) * kLog2e;
  *row_sum = *row_max == kMinusInfinity ? 0.0f : 1.0f;
}

// Ends row r: writes a partial row that is still to be combined, or out and lse.
inline HWY_ATTR void finish_row(const Tile &t, int64_t r, const float *o, float row_max, float row_sum) {
  const Params &p = *t.p;
  if (t.partial_o != nullptr) {
    store_row(o, p.head_dim_v, 1.0f, t.partial_o, r * p.head_dim_v, FLASHSPARK_FLOAT32);
    t.partial_ml[2 * r] = row_max;
    t.partial_ml[2 * r + 1] = row_sum;
    return;
  }
  const int64_t i = t.token(r), h = t.head(r);
  float factor = row_sum == 0 ? 0.0f : scale_at(p.v_descale, t.s.index, t.h_kv, p.v.dtype) / row_sum;
  factor *= t.dropout.scale;
  if (p.output_scale != nullptr) factor /= *p.output_scale;
  store_row(o, p.head_dim_v, factor, p.out.data, q_offset(p, p.out, t.s, i, h), p.out.dtype);
  if (p.lse != nullptr) {
    p.lse[lse_offset(p, t.s, i, h)] = row_sum == 0 ? kMinusInfinity : kLn2 * (row_max + __builtin_log2f(row_sum));
  }
}

// The blocks of a tile's spans, one after the other; count is 0 past the last.
struct BlockCursor {
  const Tile *t;
  int64_t size, span, key, count;

  HWY_ATTR BlockCursor(const Tile &tile, int64_t block_size)
      : t(&tile), size(block_size), span(0), key(tile.num_spans > 0 ? tile.spans[0].begin : 0), count(0) {
    clip();
  }
  HWY_ATTR void next() {
    key += count;
    if (key >= t->spans[span].end) {
      ++span;
      if (span < t->num_spans) key = t->spans[span].begin;
    }
    clip();
  }

 private:
  HWY_ATTR void clip() {
    count = 0;
    if (span >= t->num_spans) return;
    const int64_t left = t->spans[span].end - key;
    count = left < size ? left : size;
  }
};

// Addresses of a block's rows in k or v, for the tile's first KV head. It goes page by page, without a division for
// each key.
inline HWY_ATTR void key_addresses(const Tile &t, const flashspark_tensor &tensor, const BlockCursor &block,
                                   const char **to) {
  const Params &p = *t.p;
  const int64_t size = static_cast<int64_t>(dtype_size(tensor.dtype));
  for (int64_t n = 0; n < block.count;) {
    const int64_t key = block.key + n;
    int64_t run = block.count - n;
    if (is_paged(p)) {
      const int64_t left = p.page_size - (t.s.k_row + key) % p.page_size;
      if (left < run) run = left;
    }
    const char *row = static_cast<const char *>(tensor.data) + kv_offset(p, tensor, t.s, key, t.h_kv) * size;
    // The stride of a single row may be any number: it is multiplied by 0.
    for (int64_t m = 0; m < run; ++m) to[n + m] = row + m * tensor.token_stride * size;
    n += run;
  }
}

// Brings the K and V rows of the next block into the cache, a few lines at a time, while this block is worked on. The
// pages of a sequence lie anywhere, so no hardware prefetcher finds them, and a burst would stall other loads.
class Prefetcher {
 public:
  // Rows of a block for the tile's first KV head. `calls`: how often advance() will be called until they are needed.
  HWY_ATTR void start(const Tile &t, const char *const *keys, const char *const *values, int64_t count, int64_t calls) {
    const int64_t size = static_cast<int64_t>(dtype_size(t.p->k.dtype));
    rows_[0] = keys;
    rows_[1] = values;
    lines_[0] = (((t.num_heads - 1) * t.p->k.head_stride + t.p->head_dim) * size + 63) / 64;
    lines_[1] = (((t.num_heads - 1) * t.p->v.head_stride + t.p->head_dim_v) * size + 63) / 64;
    count_ = count;
    which_ = row_ = line_ = 0;
    budget_ = calls > 0 ? (count * (lines_[0] + lines_[1]) + calls - 1) / calls : 0;
  }

  HWY_ATTR void advance() {
    if (row_ >= count_) return;
    for (int64_t n = 0; n < budget_; ++n) {
      __builtin_prefetch(rows_[which_][row_] + 64 * line_);
      if (++line_ < lines_[which_]) continue;
      line_ = 0;
      which_ ^= 1;  // a key's K row, then its V row
      if (which_ == 0) ++row_;
      if (row_ >= count_) return;
    }
  }

 private:
  const char *const *rows_[2] = {};
  int64_t lines_[2] = {};
  int64_t count_ = 0, row_ = 0, line_ = 0, budget_ = 0;
  int which_ = 0;
};

}  // namespace flashspark::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
