// New keys and values into the cache, with rotary embedding (Su et al., RoFormer, 2021) and rounding to e4m3 on the
// way. One block a new row of tokens; its warps take the heads in turn. Rows that have no place (a length beyond the
// cache, a page number, a slot, a position or a sequence out of range, as padded rows of a captured batch carry) are
// left out.
#pragma once

#include "append/arguments.hpp"
#include "forward/softmax.cuh"

namespace flashspark {

constexpr int32_t kAppendWarps = 4;

FLASHSPARK_DEVICE int32_t bytes_of(Number number) {
  return number == Number::float32 ? 4 : (number == Number::e4m3 ? 1 : 2);
}

FLASHSPARK_DEVICE void store_number(void *to, int64_t n, Number number, float x) {
  switch (number) {
    case Number::float32:
      static_cast<float *>(to)[n] = x;
      break;
    case Number::float16:
      static_cast<ptx::Float16 *>(to)[n].bits = static_cast<uint16_t>(ptx::pack<ptx::Float16>(x, 0));
      break;
    case Number::bfloat16:
      static_cast<ptx::Bfloat16 *>(to)[n].bits = static_cast<uint16_t>(ptx::pack<ptx::Bfloat16>(x, 0));
      break;
    case Number::e4m3:
      static_cast<ptx::E4m3 *>(to)[n].bits = static_cast<uint8_t>(ptx::narrow_e4m3x2(x, 0));
      break;
  }
}

// Where a new row comes from and goes to.
struct AppendRow {
  bool found;          // the cache has a place for it
  bool turned;         // q's row is to be turned: where slots say nothing else, that of a row with a place
  int32_t seq, index;  // token `index` of those that are new in sequence `seq`
  int64_t token;       // of its sequence (dense) or of all (cu_seqlens_new, slot_mapping)
  int32_t place;       // row of the cache's sequence
  int32_t position;    // for the rotary embedding
  int64_t batch;       // page or sequence of the cache
  int32_t slot;        // row of it
};

FLASHSPARK_DEVICE AppendRow find_append_row(const AppendArguments &a, int32_t row) {
  AppendRow r{};
  if (a.slot_mapping != nullptr) {  // all rows are sequence 0, whose factors they take
    const int64_t slot = a.slot_mapping[row];
    r.token = row;
    if (a.rotary_positions != nullptr) {
      const int64_t position = a.rotary_positions[row];
      if (position < 0 || position >= a.seqlen_rotary) return r;
      r.position = static_cast<int32_t>(position);
      r.turned = true;
    }
    r.found = slot >= 0 && slot < a.capacity;  // vLLM pads with -1, and marks what another rank stores
    if (!r.found) return r;
    const Quotient at = divide(static_cast<int32_t>(slot), a.page_size);
    r.batch = at.quotient;
    r.slot = at.remainder;
    return r;
  }
  if (a.cu_seqlens_new == nullptr) {
    const Quotient at = divide(row, a.seqlen_new);
    r.seq = at.quotient;
    r.index = at.remainder;
    r.token = at.remainder;
    r.found = true;
  } else {
    const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
    for (int32_t base = 0; base < a.num_seqs && !r.found; base += 32) {
      const int32_t b = base + lane;
      const uint32_t beyond = ptx::ballot(b < a.num_seqs && a.cu_seqlens_new[b + 1] > row);
      if (beyond == 0) continue;
      r.seq = base + static_cast<int32_t>(ptx::lowest_bit(beyond));
      r.index = row - a.cu_seqlens_new[r.seq];
      r.token = row;
      r.found = r.index >= 0;  // rows before the first sequence belong to none
      if (!r.found) break;
    }
  }
  if (!r.found) return r;
  const int32_t before = a.seqlens != nullptr ? a.seqlens[r.seq] : 0;
  r.place = before + r.index;
  r.position = r.place;
  r.found = before >= 0 && r.place < a.capacity;
  if (a.rotary_cos != nullptr) r.found = r.found && r.position >= r.index && r.position < a.seqlen_rotary;
  if (!r.found) return r;
  r.slot = r.place;
  r.batch = r.seq;
  if (a.page_table != nullptr) {
    const Quotient at = divide(r.place, a.page_size);
    r.batch = a.page_table[r.seq * a.page_table_stride + at.quotient];
    r.slot = at.remainder;
  } else if (a.kv_batch_index != nullptr) {
    r.batch = a.kv_batch_index[r.seq];
  }
  r.found = r.turned = r.batch >= 0 && r.batch < a.cache_batches;
  return r;
}

// Turns the first rotary_dim numbers of a row, pair by pair, times `factor`: `to` may be `from`.
FLASHSPARK_DEVICE void turn_row(const AppendArguments &a, const void *from, Number number, void *to, Number to_number,
                                float factor, int32_t position) {
  const int32_t half = a.rotary_dim / 2;
  const int64_t at = position * a.rotary_stride;
  for (int32_t n = static_cast<int32_t>(ptx::thread_index() % 32); n < half; n += 32) {
    const float c = load_number(a.rotary_cos, at + n, a.rotary_number);
    const float s = load_number(a.rotary_sin, at + n, a.rotary_number);
    const int32_t first = a.rotary_interleaved != 0 ? 2 * n : n,
                  second = a.rotary_interleaved != 0 ? first + 1 : n + half;
    const float x = load_number(from, first, number), y = load_number(from, second, number);
    store_number(to, first, to_number, (x * c - y * s) * factor);
    store_number(to, second, to_number, (x * s + y * c) * factor);
  }
}

// Numbers [begin, width) of a row: the same bytes, or times `factor` in another type.
FLASHSPARK_DEVICE void copy_row(const char *from, Number number, char *to, Number to_number, float factor,
                                int32_t begin, int32_t width) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  if (number != to_number) {
    for (int32_t n = begin + lane; n < width; n += 32)
      store_number(to, n, to_number, load_number(from, n, number) * factor);
    return;
  }
  from += begin * bytes_of(number);
  to += begin * bytes_of(number);
  const int32_t bytes = (width - begin) * bytes_of(number);
  if ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | static_cast<uint32_t>(bytes)) % 16 == 0) {
    for (int32_t n = lane * 16; n < bytes; n += 512)
      *reinterpret_cast<ptx::Vector16 *>(to + n) = *reinterpret_cast<const ptx::Vector16 *>(from + n);
  } else {
    for (int32_t n = lane; n < bytes; n += 32) to[n] = from[n];
  }
}

FLASHSPARK_DEVICE float inverse_scale(const Scale &scale, const AppendRow &r, int32_t head) {
  if (scale.data == nullptr) return 1.0f;
  const float x = scale.data[r.seq * scale.seq_stride + head * scale.head_stride];
  return x > 0 ? 1.0f / x : 0.0f;
}

FLASHSPARK_DEVICE void append(const AppendArguments &a) {
  ptx::grid_dependency_wait();  // every block, as in forward()
  ptx::grid_dependency_launch();
  const AppendRow r = find_append_row(a, static_cast<int32_t>(ptx::block_x()));
  const int64_t new_batch = a.cu_seqlens_new != nullptr ? 0 : r.seq;
  const int32_t size = bytes_of(a.new_number), cache_size = bytes_of(a.cache_number);
  const auto source = [&](const void *data, const Strides &s, int32_t head) {
    return static_cast<const char *>(data) + (new_batch * s.batch + r.token * s.token + head * s.head) * size;
  };
  const auto target = [&](void *data, const Strides &s, int32_t head) {
    return static_cast<char *>(data) + (r.batch * s.batch + r.slot * s.token + head * s.head) * cache_size;
  };
  const int32_t warp = static_cast<int32_t>(ptx::thread_index() / 32);
  for (int32_t head = warp; r.found && head < a.num_heads_kv; head += kAppendWarps) {
    const char *from = source(a.k_new, a.k_new_strides, head);
    char *to = target(a.k_cache, a.k_cache_strides, head);
    const float factor = inverse_scale(a.k_descale, r, head);
    if (a.rotary_cos != nullptr) turn_row(a, from, a.new_number, to, a.cache_number, factor, r.position);
    copy_row(from, a.new_number, to, a.cache_number, factor, a.rotary_cos != nullptr ? a.rotary_dim : 0, a.head_dim);
    copy_row(source(a.v_new, a.v_new_strides, head), a.new_number, target(a.v_cache, a.v_cache_strides, head),
             a.cache_number, inverse_scale(a.v_descale, r, head), 0, a.head_dim_v);
  }
  if (a.q == nullptr || !r.turned) return;
  const int32_t position = a.q_rotary_per_token != 0 ? r.position : r.position - r.index;
  for (int32_t head = warp; head < a.num_heads_q; head += kAppendWarps) {
    const int64_t offset = new_batch * a.q_strides.batch + r.token * a.q_strides.token + head * a.q_strides.head;
    char *row = static_cast<char *>(a.q) + offset * bytes_of(a.q_number);
    turn_row(a, row, a.q_number, row, a.q_number, 1.0f, position);
  }
}

}  // namespace flashspark
