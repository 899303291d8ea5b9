#include "cpu/append.hpp"

#include <cstring>

#include "cpu/thread_pool.hpp"
#include "dtype.hpp"

namespace flashspark::cpu {
namespace {

// Rotary embedding (Su et al., RoFormer, 2021) of the first rotary_dim elements of `row`, read and written in `dtype`.
void rotate(const AppendParams &p, void *row, int64_t offset, int32_t dtype, int64_t position) {
  const int64_t half = p.rotary_dim / 2, at = position * rotary_stride(p);
  for (int64_t n = 0; n < half; ++n) {
    const float c = load_as_float(p.rotary_cos, at + n, p.rotary_dtype);
    const float s = load_as_float(p.rotary_sin, at + n, p.rotary_dtype);
    const int64_t i0 = offset + (p.rotary_interleaved ? 2 * n : n);
    const int64_t i1 = offset + (p.rotary_interleaved ? 2 * n + 1 : n + half);
    const float x0 = load_as_float(row, i0, dtype), x1 = load_as_float(row, i1, dtype);
    store_from_float(row, i0, dtype, x0 * c - x1 * s);
    store_from_float(row, i1, dtype, x0 * s + x1 * c);
  }
}

void copy_row(const flashspark_tensor &from, int64_t source, const flashspark_tensor &to, int64_t target, int64_t width,
              float descale) {
  if (from.dtype == to.dtype) {
    const auto size = static_cast<int64_t>(dtype_size(from.dtype));  // signed: strides may be negative
    std::memcpy(static_cast<char *>(to.data) + target * size, static_cast<const char *>(from.data) + source * size,
                static_cast<size_t>(width * size));
    return;
  }
  const float inverse = descale > 0 ? 1.0f / descale : 0.0f;
  for (int64_t d = 0; d < width; ++d) {
    store_from_float(to.data, target + d, to.dtype, load_as_float(from.data, source + d, from.dtype) * inverse);
  }
}

int64_t position_of(const AppendParams &p, const AppendSequence &s, int64_t i) {
  return p.rotary_positions != nullptr ? p.rotary_positions[i] : s.position0 + i;
}

// Row i of sequence s in k_new or v_new.
int64_t new_offset(const AppendParams &p, const flashspark_tensor &t, const AppendSequence &s, int64_t i, int64_t h) {
  return (p.cu_seqlens_new ? 0 : s.b * t.batch_stride) + (s.new_row + i) * t.token_stride + h * t.head_stride;
}

int64_t cache_offset(const AppendParams &p, const flashspark_tensor &t, const AppendSequence &s, int64_t i, int64_t h) {
  if (p.slot_mapping != nullptr) {
    const int64_t slot = p.slot_mapping[i];
    return slot / p.page_size * t.batch_stride + slot % p.page_size * t.token_stride + h * t.head_stride;
  }
  const int64_t row = s.before + i;
  if (p.page_table != nullptr) {
    const int64_t page = p.page_table[s.cache_index * p.page_table_stride + row / p.page_size];
    return page * t.batch_stride + row % p.page_size * t.token_stride + h * t.head_stride;
  }
  return s.cache_index * t.batch_stride + row * t.token_stride + h * t.head_stride;
}

void append_head(const AppendParams &p, const AppendSequence &s, int64_t h) {
  const bool quantize = p.k_cache.dtype == FLASHSPARK_FLOAT8_E4M3 && p.k_new.dtype != FLASHSPARK_FLOAT8_E4M3;
  const float k_descale = scale_at(p.k_descale, s.b, h, p.k_cache.dtype);
  const float v_descale = scale_at(p.v_descale, s.b, h, p.v_cache.dtype);
  for (int64_t i = 0; i < s.rows; ++i) {
    if (p.slot_mapping != nullptr && p.slot_mapping[i] < 0) continue;
    const int64_t k_at = cache_offset(p, p.k_cache, s, i, h);
    if (p.rotary_cos == nullptr) {
      copy_row(p.k_new, new_offset(p, p.k_new, s, i, h), p.k_cache, k_at, p.head_dim, k_descale);
    } else if (quantize) {  // turned in float, so that a number is rounded to e4m3 once
      float row[kMaxHeadDim];
      const int64_t from = new_offset(p, p.k_new, s, i, h);
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] = load_as_float(p.k_new.data, from + d, p.k_new.dtype);
      rotate(p, row, 0, FLASHSPARK_FLOAT32, position_of(p, s, i));
      copy_row({row, 0, 0, 0, FLASHSPARK_FLOAT32, 0}, 0, p.k_cache, k_at, p.head_dim, k_descale);
    } else {
      copy_row(p.k_new, new_offset(p, p.k_new, s, i, h), p.k_cache, k_at, p.head_dim, 1.0f);
      rotate(p, p.k_cache.data, k_at, p.k_cache.dtype, position_of(p, s, i));
    }
    copy_row(p.v_new, new_offset(p, p.v_new, s, i, h), p.v_cache, cache_offset(p, p.v_cache, s, i, h), p.head_dim_v,
             v_descale);
  }
}

// One head of a sequence's rows of q in use, in place.
void rotate_query(const AppendParams &p, const AppendSequence &s, int64_t h) {
  const bool per_token = p.q_rotary_per_token != 0 || p.rotary_positions != nullptr;
  const int64_t batch = p.cu_seqlens_q != nullptr ? 0 : s.b * p.q.batch_stride;
  for (int64_t i = 0; i < s.q_rows; ++i) {
    const int64_t at = batch + (s.q_row + i) * p.q.token_stride + h * p.q.head_stride;
    rotate(p, p.q.data, at, p.q.dtype, position_of(p, s, per_token ? i : 0));
  }
}

}  // namespace

void append_kv(const AppendParams &p) {
  // A decode step appends a few rows: threads would cost more than the copy.
  const int64_t rows = p.slot_mapping != nullptr ? p.total_new : p.num_seqs * p.seqlen_new;
  const int64_t elements = rows * p.num_heads_kv * (p.head_dim + p.head_dim_v);
  const int32_t threads = elements < (1 << 16) ? 1 : 0;
  parallel_for(threads, p.num_seqs * p.num_heads_kv,
               [&](int64_t n) { append_head(p, append_sequence(p, n / p.num_heads_kv), n % p.num_heads_kv); });
  if (p.q.data == nullptr) return;
  parallel_for(threads, p.num_seqs * p.num_heads_q,
               [&](int64_t n) { rotate_query(p, append_sequence(p, n / p.num_heads_q), n % p.num_heads_q); });
}

}  // namespace flashspark::cpu
