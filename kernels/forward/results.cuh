// From the accumulators to out and lse, or to the pieces that the merge kernel joins.
#pragma once

#include "forward/softmax.cuh"

namespace flashspark {

// Natural logarithm of a row's sum of exponentials: maximum in units of log2, sum relative to it.
FLASHSPARK_DEVICE float lse_of(float maximum, float sum) {
  return sum > 0 || sum != sum ? (maximum + ptx::log2_approx(sum)) * kLn2 : minus_infinity();
}

// Addresses of one packed row.
struct ResultRow {
  bool in_use;
  int64_t head;       // query head
  int64_t token;      // row in q and out
  int64_t token_row;  // row of all tokens, dense rows counted too
};
FLASHSPARK_DEVICE ResultRow result_row(const ForwardArguments &a, const Work &work, int32_t row) {
  ResultRow r{};
  r.in_use = row < work.end_row;
  const Quotient at = divide(r.in_use ? row : 0, a.group);
  r.head = work.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
  r.token = work.q_row + at.quotient;
  r.token_row = (a.cu_seqlens_q != nullptr ? 0 : static_cast<int64_t>(work.seq) * a.max_seqlen_q) + r.token;
  return r;
}
FLASHSPARK_DEVICE int64_t partial_row(const ForwardArguments &a, const ResultRow &r) {
  return r.token_row * a.num_heads_kv * a.group.value + r.head;
}
FLASHSPARK_DEVICE void store_lse(const ForwardArguments &a, const Work &work, const ResultRow &r, float lse) {
  if (a.lse == nullptr) return;
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : work.seq * a.lse_strides.batch;
  a.lse[batch + r.head * a.lse_strides.head + r.token * a.lse_strides.token] = lse;
}
FLASHSPARK_DEVICE int64_t out_offset(const ForwardArguments &a, const Work &work, const ResultRow &r) {
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : work.seq * a.out_strides.batch;
  return batch + r.token * a.out_strides.token + r.head * a.out_strides.head;
}

// The sink of a head in units of log2; -inf: none.
FLASHSPARK_DEVICE float sink_of(const ForwardArguments &a, int64_t head) {
  return a.sinks == nullptr ? minus_infinity() : load_number(a.sinks, head, a.sinks_number) * kLog2E;
}

// Joins a sink to a row: the new maximum, and the factors of what was relative to the old one and of the sink.
struct Joined {
  float maximum, factor, sink;
};
FLASHSPARK_DEVICE Joined join_sink(float maximum, float sink) {
  const float high = larger(maximum, sink);
  if (high == minus_infinity()) return {high, 1.0f, 0.0f};
  return {high, maximum == high ? 1.0f : ptx::exp2_approx(maximum - high), ptx::exp2_approx(sink - high)};
}

// Writes eight numbers of a row, at once where the address allows it.
template <class Number>
FLASHSPARK_DEVICE void store_8(Number *to, ptx::Vector16 v) {
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<ptx::Vector16 *>(to) = v;
    return;
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 8; ++n) to[n].bits = static_cast<uint16_t>(v.word[n / 2] >> n % 2 * 16);
}

// Sums of whole rows.
template <class T>
FLASHSPARK_DEVICE void finish_rows(LaneState<T> &state) {
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) state.sum[n] += ptx::shuffle_xor(state.sum[n], 1);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) state.sum[n] += ptx::shuffle_xor(state.sum[n], 2);
}

FLASHSPARK_DEVICE void store_4(ptx::SharedAddress to, const float (&x)[4]) {
  ptx::Vector16 v;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 4; ++n) v.word[n] = ptx::as_word(x[n]);
  ptx::store_shared_16(to, v);
}

// The first key group gets the sum of all, the others are done. Memory: behind the rows of the result, for each of the
// other groups vectors of four floats of every lane, those of one number of vector side by side.
template <class T>
FLASHSPARK_DEVICE bool join_groups(Output<T> &o, LaneState<T> &state, ptx::SharedAddress shared) {
  constexpr uint32_t kColumns = T::kHeadDimV / 8, kVectors = T::kSlabs * (kColumns + 1);
  constexpr uint32_t kLanes = T::kRowWarps * 32;
  const auto group = static_cast<uint32_t>(key_group<T>());
  const uint32_t at = shared + T::kRows * T::ValueLayout::kPitch + ptx::thread_index() % kLanes * 16;
  const auto place = [at](uint32_t other, uint32_t slab, uint32_t c) {
    return at + (((other - 1) * kVectors + slab * (kColumns + 1) + c) * kLanes << 4);
  };
  if (group > 0) {
    FLASHSPARK_UNROLL
    for (uint32_t slab = 0; slab < T::kSlabs; ++slab) {
      const float ends[4] = {state.base[2 * slab], state.base[2 * slab + 1], state.sum[2 * slab],
                             state.sum[2 * slab + 1]};
      store_4(place(group, slab, kColumns), ends);
      FLASHSPARK_UNROLL
      for (uint32_t c = 0; c < kColumns; ++c) store_4(place(group, slab, c), o.at[slab][c]);
    }
  }
  ptx::block_barrier();  // the first group reads what the others have written
  if (group > 0) return false;
  FLASHSPARK_UNROLL
  for (uint32_t other = 1; other < T::kKeyGroups; ++other) {
    FLASHSPARK_UNROLL
    for (uint32_t slab = 0; slab < T::kSlabs; ++slab) {
      const ptx::Vector16 ends = ptx::load_shared_16(place(other, slab, kColumns));
      float own[2], theirs[2];
      FLASHSPARK_UNROLL
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t n = 2 * slab + half;
        const float base = larger(state.base[n], ptx::as_float(ends.word[half]));
        own[half] = ptx::exp2_approx(state.base[n] - base);
        theirs[half] = ptx::exp2_approx(ptx::as_float(ends.word[half]) - base);
        state.base[n] = base;
        state.sum[n] = state.sum[n] * own[half] + ptx::as_float(ends.word[2 + half]) * theirs[half];
      }
      FLASHSPARK_UNROLL
      for (uint32_t c = 0; c < kColumns; ++c) {
        const ptx::Vector16 x = ptx::load_shared_16(place(other, slab, c));
        FLASHSPARK_UNROLL
        for (uint32_t i = 0; i < 4; ++i)
          o.at[slab][c][i] = o.at[slab][c][i] * own[i / 2] + ptx::as_float(x.word[i]) * theirs[i / 2];
      }
    }
  }
  return true;
}

// One piece of a split problem: out / sum in float and the lse of the piece; -inf and nothing else if it saw no key.
template <class T>
FLASHSPARK_DEVICE void store_partial(const ForwardArguments &a, const Work &work, const Output<T> &o,
                                     const LaneState<T> &state, int32_t first_column) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const int64_t split = ptx::block_y();
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    const ResultRow r = result_row(a, work, lane_row<T>(work, n));
    if (!r.in_use) continue;
    const int64_t row = split * a.partial_rows + partial_row(a, r);
    const float lse = lse_of(state.base[n], state.sum[n]);
    if (lane % 4 == 0 && first_column == 0) a.partial_lse[row] = lse;
    if (lse == minus_infinity()) continue;
    const float inverse = 1.0f / state.sum[n];
    float *to = a.partial_out + row * a.head_dim_v + first_column + lane % 4 * 2;
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kHeadDimV / 8; ++c) {
      if (first_column + c * 8 >= a.head_dim_v) continue;
      to[c * 8] = o.at[n / 2][c][n % 2 * 2] * inverse;
      to[c * 8 + 1] = o.at[n / 2][c][n % 2 * 2 + 1] * inverse;
    }
  }
}

// Rows pass through shared memory, each warp's through its own piece of it, so that whole rows are written.
template <class T>
FLASHSPARK_DEVICE void store_final(const ForwardArguments &a, const Work &work, const Output<T> &o,
                                   const LaneState<T> &state, ptx::SharedAddress staging, int32_t first_column) {
  using Layout = typename T::ValueLayout;
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const int32_t first_row = work.first_row + first_warp_row<T>();
  staging += first_warp_row<T>() * Layout::kPitch;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    const int32_t tile_row = n / 2 * 16 + n % 2 * 8 + lane / 4;
    const ResultRow r = result_row(a, work, first_row + tile_row);
    const Joined joined = join_sink(state.base[n], r.in_use ? sink_of(a, r.head) : minus_infinity());
    const float sum = state.sum[n] * joined.factor + joined.sink;
    const float inverse = sum == 0 ? 0.0f : joined.factor / sum;
    if (r.in_use && lane % 4 == 0 && first_column == 0) store_lse(a, work, r, lse_of(joined.maximum, sum));
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kHeadDimV / 8; ++c) {
      const uint32_t word =
          ptx::pack<typename T::Number>(o.at[n / 2][c][n % 2 * 2] * inverse, o.at[n / 2][c][n % 2 * 2 + 1] * inverse);
      ptx::store_shared_4(staging + Layout::step(Layout::offset(tile_row, 0), c) + lane % 4 * 4, word);
    }
  }
  ptx::warp_barrier();
  // kRowLanes neighbouring lanes write one row.
  constexpr int32_t kRowLanes = T::kRowThreads, kPassRows = 32 / kRowLanes;
  auto *out = static_cast<typename T::Number *>(a.out);
  FLASHSPARK_UNROLL
  for (int32_t pass = 0; pass < T::kWarpRows / kPassRows; ++pass) {
    const int32_t tile_row = pass * kPassRows + lane / kRowLanes;
    const ResultRow r = result_row(a, work, first_row + tile_row);
    auto *to = out + out_offset(a, work, r) + first_column;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < Layout::kChunks / kRowLanes; ++n) {
      const int32_t chunk = n * kRowLanes + lane % kRowLanes;
      const ptx::Vector16 v =
          ptx::load_shared_16(staging + Layout::offset(tile_row, lane % kRowLanes) + n * kRowLanes * 16);
      if (r.in_use && first_column + chunk * 8 < a.head_dim_v) store_8(to + chunk * 8, v);
    }
  }
}

}  // namespace flashspark
