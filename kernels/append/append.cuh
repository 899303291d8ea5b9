// Appends new keys and values to the cache, with rotary embedding (Su et al., RoFormer, 2021) and rounding to e4m3 on
// the way. One CTA a new row, and one a row of q where that turns; its warps take the heads in turn. Rows that would
// not lie in the cache are skipped: a length beyond it, or a page number, slot, position or sequence out of range, as
// padded rows of a captured batch have.
#pragma once

#include "append/arguments.hpp"
#include "attention/sequence.cuh"
#include "common/element.cuh"

namespace flashspark {

constexpr int32_t kAppendWarps = 4;

// A row of the new keys or of q.
struct TokenRow {
  bool found;          // whether it belongs to a sequence
  int32_t seq, index;  // token `index` of those of sequence `seq`
  int64_t token;       // of its sequence (dense) or of all (offsets, slot_mapping)
};

// Row `row` of all rows: of sequences that lie end to end, or without offsets have equal lengths.
FLASHSPARK_DEVICE TokenRow find_token(const AppendArguments &a, int32_t row, const int32_t *offsets,
                                      const Divisor &seqlen) {
  TokenRow r{};
  if (offsets == nullptr) {
    const Quotient at = divide(row, seqlen);
    return {true, at.quotient, at.remainder, at.remainder};
  }
  const int32_t lane = ptx::lane();
  for (int32_t base = 0; base < a.num_seqs; base += 32) {
    const int32_t b = base + lane;
    const uint32_t beyond = ptx::ballot(b < a.num_seqs && offsets[b + 1] > row);
    if (beyond == 0) continue;
    r.seq = base + static_cast<int32_t>(ptx::lowest_bit(beyond));
    const int32_t first = max_of(0, offsets[r.seq]);
    r.index = row - first;
    r.token = row;
    r.found = first <= row;  // rows before the first sequence belong to none
    return r;
  }
  return r;
}

// base + index, or -1 where that is not in [0, end).
FLASHSPARK_DEVICE int32_t row_within(int32_t base, int32_t index, int32_t end) {
  return base >= 0 && base < end && index < end - base ? base + index : -1;
}

// The position by which a row turns; -1: cos and sin have none for it.
FLASHSPARK_DEVICE int32_t position_of(const AppendArguments &a, const TokenRow &r, int32_t index) {
  if (a.slot_mapping != nullptr) {
    const int64_t position = a.rotary_positions != nullptr ? a.rotary_positions[r.token] : -1;
    return position >= 0 && position < a.seqlen_rotary ? static_cast<int32_t>(position) : -1;
  }
  const int32_t *from = a.rotary_seqlens != nullptr ? a.rotary_seqlens : a.seqlens;
  return row_within(read_length(from, r.seq), index, a.seqlen_rotary);
}

// Where a new row goes to.
struct CacheRow {
  bool found;     // whether the cache has that row
  int64_t batch;  // page or sequence of the cache
  int32_t slot;   // row of it
};

FLASHSPARK_DEVICE CacheRow find_cache_row(const AppendArguments &a, const TokenRow &r) {
  CacheRow c{};
  if (a.slot_mapping != nullptr) {
    const int64_t slot = a.slot_mapping[r.token];
    if (slot < 0 || slot >= a.capacity) return c;  // vLLM pads with -1, and marks what another rank stores
    const Quotient at = divide(static_cast<int32_t>(slot), a.page_size);
    return {true, at.quotient, at.remainder};
  }
  const int32_t row = row_within(read_length(a.seqlens, r.seq), r.index, a.capacity);
  if (row < 0) return c;
  c.slot = row;
  c.batch = a.kv_batch_index != nullptr ? a.kv_batch_index[r.seq] : r.seq;
  if (c.batch < 0 || c.batch >= a.cache_rows) return c;
  if (a.page_table != nullptr) {
    const Quotient at = divide(row, a.page_size);
    c.batch = a.page_table[c.batch * a.page_table_stride + at.quotient];
    c.slot = at.remainder;
  }
  c.found = c.batch >= 0 && c.batch < a.cache_batches;
  return c;
}

// Turns the first rotary_dim elements of a row, pair by pair, and multiplies them by `factor`; `to` may be `from`.
FLASHSPARK_DEVICE void turn_row(const AppendArguments &a, const void *from, DType dtype, void *to, DType to_dtype,
                                float factor, int32_t position) {
  const int32_t half = a.rotary_dim / 2;
  const int64_t at = position * a.rotary_stride;
  for (int32_t n = ptx::lane(); n < half; n += 32) {
    const float c = load_as_float(a.rotary_cos, at + n, a.rotary_dtype);
    const float s = load_as_float(a.rotary_sin, at + n, a.rotary_dtype);
    const int32_t first = a.rotary_interleaved != 0 ? 2 * n : n,
                  second = a.rotary_interleaved != 0 ? first + 1 : n + half;
    const float x = load_as_float(from, first, dtype), y = load_as_float(from, second, dtype);
    store_from_float(to, first, to_dtype, (x * c - y * s) * factor);
    store_from_float(to, second, to_dtype, (x * s + y * c) * factor);
  }
}

// Copies elements [begin, width) of a row: the same bytes, or multiplied by `factor` where the type differs.
FLASHSPARK_DEVICE void copy_row(const char *from, DType dtype, char *to, DType to_dtype, float factor, int32_t begin,
                                int32_t width) {
  const int32_t lane = ptx::lane();
  if (dtype != to_dtype) {
    for (int32_t n = begin + lane; n < width; n += 32)
      store_from_float(to, n, to_dtype, load_as_float(from, n, dtype) * factor);
    return;
  }
  from += begin * bytes_of(dtype);
  to += begin * bytes_of(dtype);
  const int32_t bytes = (width - begin) * bytes_of(dtype);
  if ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | static_cast<uint32_t>(bytes)) % 16 == 0) {
    for (int32_t n = lane * 16; n < bytes; n += 512)
      *reinterpret_cast<ptx::Vector16 *>(to + n) = *reinterpret_cast<const ptx::Vector16 *>(from + n);
  } else {
    for (int32_t n = lane; n < bytes; n += 32) to[n] = from[n];
  }
}

FLASHSPARK_DEVICE float inverse_scale(const Scale &scale, int32_t seq, int32_t head) {
  if (scale.data == nullptr) return 1.0f;
  const float x = scale.data[seq * scale.seq_stride + head * scale.head_stride];
  return x > 0 ? 1.0f / x : 0.0f;
}

// One new row of keys and values.
FLASHSPARK_DEVICE void append_row(const AppendArguments &a, int32_t row) {
  TokenRow r{true, 0, row, row};  // with slots all rows are sequence 0, whose factors they take
  if (a.slot_mapping == nullptr) r = find_token(a, row, a.cu_seqlens_new, a.seqlen_new);
  if (!r.found) return;
  const CacheRow c = find_cache_row(a, r);
  const bool turns = a.rotary_cos != nullptr;
  const int32_t position = turns ? position_of(a, r, r.index) : 0;
  if (!c.found || position < 0) return;
  const int64_t new_batch = a.cu_seqlens_new != nullptr ? 0 : r.seq;
  const int32_t size = bytes_of(a.new_dtype), cache_size = bytes_of(a.cache_dtype);
  const auto source = [&](const void *data, const Strides &s, int32_t head) {
    return static_cast<const char *>(data) + (new_batch * s.batch + r.token * s.token + head * s.head) * size;
  };
  const auto target = [&](void *data, const Strides &s, int32_t head) {
    return static_cast<char *>(data) + (c.batch * s.batch + c.slot * s.token + head * s.head) * cache_size;
  };
  for (int32_t head = ptx::warp(); head < a.num_heads_kv; head += kAppendWarps) {
    const char *from = source(a.k_new, a.k_new_strides, head);
    char *to = target(a.k_cache, a.k_cache_strides, head);
    const float factor = inverse_scale(a.k_descale, r.seq, head);
    if (turns) turn_row(a, from, a.new_dtype, to, a.cache_dtype, factor, position);
    copy_row(from, a.new_dtype, to, a.cache_dtype, factor, turns ? a.rotary_dim : 0, a.head_dim);
    copy_row(source(a.v_new, a.v_new_strides, head), a.new_dtype, target(a.v_cache, a.v_cache_strides, head),
             a.cache_dtype, inverse_scale(a.v_descale, r.seq, head), 0, a.head_dim_v);
  }
}

// One row of q, in place.
FLASHSPARK_DEVICE void turn_query(const AppendArguments &a, int32_t row) {
  TokenRow r{true, 0, row, row};
  if (a.slot_mapping == nullptr) r = find_token(a, row, a.cu_seqlens_q, a.seqlen_q);
  if (!r.found || (a.seqused_q != nullptr && r.index >= a.seqused_q[r.seq])) return;
  const int32_t position = position_of(a, r, a.q_rotary_per_token != 0 ? r.index : 0);
  if (position < 0) return;
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : r.seq;
  for (int32_t head = ptx::warp(); head < a.num_heads_q; head += kAppendWarps) {
    const int64_t offset = batch * a.q_strides.batch + r.token * a.q_strides.token + head * a.q_strides.head;
    char *to = static_cast<char *>(a.q) + offset * bytes_of(a.q_dtype);
    turn_row(a, to, a.q_dtype, to, a.q_dtype, 1.0f, position);
  }
}

FLASHSPARK_DEVICE void append(const AppendArguments &a) {
  ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
  ptx::grid_dependency_launch();
  const auto cta = static_cast<int32_t>(ptx::cta_x());
  if (cta < a.new_rows) {
    append_row(a, cta);
  } else {
    turn_query(a, cta - a.new_rows);
  }
}

}  // namespace flashspark
