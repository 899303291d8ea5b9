// Rows of out and lse, sinks, and the layout of partial results: what the forward kernel's epilogue and the combine
// kernel share.
#pragma once

#include "attention/softmax.cuh"
#include "forward/arguments.hpp"

namespace flashspark {

// Natural logarithm of a row's sum of exponentials, from its maximum in units of log2 and the sum relative to it.
FLASHSPARK_DEVICE float lse_of(float maximum, float sum) {
  return sum > 0 || sum != sum ? (maximum + ptx::log2_approx(sum)) * kLn2 : minus_infinity();
}

// Where one packed row goes to.
struct OutputRow {
  bool in_use;
  int64_t head;   // query head
  int64_t token;  // row in q and out
};
FLASHSPARK_DEVICE OutputRow output_row(const AttentionArguments &a, const RowTile &rows, int32_t row) {
  OutputRow r{};
  r.in_use = row < rows.end_row;
  const Quotient at = divide(r.in_use ? row : 0, a.group);
  r.head = rows.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
  r.token = rows.q_row + at.quotient;
  return r;
}
FLASHSPARK_DEVICE void store_lse(const AttentionArguments &a, const RowTile &rows, const OutputRow &r, float lse) {
  if (a.lse == nullptr) return;
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : rows.seq * a.lse_strides.batch;
  a.lse[batch + r.head * a.lse_strides.head + r.token * a.lse_strides.token] = lse;
}
FLASHSPARK_DEVICE int64_t out_offset(const AttentionArguments &a, const RowTile &rows, const OutputRow &r) {
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : rows.seq * a.out_strides.batch;
  return batch + r.token * a.out_strides.token + r.head * a.out_strides.head;
}

// The sink of a head in units of log2; -inf: none.
FLASHSPARK_DEVICE float sink_of(const AttentionArguments &a, int64_t head) {
  return a.sinks == nullptr ? minus_infinity() : load_as_float(a.sinks, head, a.sinks_dtype) * kLog2E;
}

// Adds a sink to a row: the new maximum, the factor of what was relative to the old one, and the sink's exponential.
struct SinkRescale {
  float maximum, factor, sink;
};
FLASHSPARK_DEVICE SinkRescale add_sink(float maximum, float sink) {
  const float high = larger(maximum, sink);
  if (high == minus_infinity()) return {high, 1.0f, 0.0f};
  return {high, maximum == high ? 1.0f : ptx::exp2_approx(maximum - high), ptx::exp2_approx(sink - high)};
}

// Stores eight elements of a row, at once where the address is aligned.
template <class Element>
FLASHSPARK_DEVICE void store_8(Element *to, ptx::Vector16 v) {
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<ptx::Vector16 *>(to) = v;
    return;
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 8; ++n) to[n].bits = static_cast<uint16_t>(v.word[n / 2] >> n % 2 * 16);
}

// Stores two elements, at once where the address is aligned.
template <class Element>
FLASHSPARK_DEVICE void store_2(Element *to, uint32_t both) {
  if (reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t *>(to) = both;
    return;
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) to[n].bits = static_cast<uint16_t>(both >> n * 16);
}

// Partial results lie as the warps that compute them hold them, so that a warp writes 512 bytes at once: for eight rows
// and each 16 columns the 16 bytes of every lane. Lane l has row l / 4, and four columns of each 16: those that
// T::Mma::output_column() gives in order, or for the combine kernel two pairs partial_pair_distance apart. Offsets in
// floats: the first 16 columns of row `row`, counted through all slots, and from there a lane's columns of the 16 from
// `column` on.
FLASHSPARK_DEVICE int64_t partial_row(const PartialArguments &a, int64_t row) {
  return row / 8 * 8 * a.partial_columns + row % 8 * 16;
}
FLASHSPARK_DEVICE int32_t partial_column(int32_t lane, int32_t column) {
  return column * 8 + lane % 4 * 4;
}

FLASHSPARK_DEVICE ptx::Vector16 vector_of(float a, float b, float c, float d) {
  ptx::Vector16 v;
  v.word[0] = ptx::as_word(a);
  v.word[1] = ptx::as_word(b);
  v.word[2] = ptx::as_word(c);
  v.word[3] = ptx::as_word(d);
  return v;
}
FLASHSPARK_DEVICE void store_4(ptx::SharedAddress to, float a, float b, float c, float d) {
  ptx::store_shared_16(to, vector_of(a, b, c, d));
}

}  // namespace flashspark
