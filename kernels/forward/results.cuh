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
  int64_t head;   // query head
  int64_t token;  // row in q and out
};
FLASHSPARK_DEVICE ResultRow result_row(const ForwardArguments &a, const Work &work, int32_t row) {
  ResultRow r{};
  r.in_use = row < work.end_row;
  const Quotient at = divide(r.in_use ? row : 0, a.group);
  r.head = work.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
  r.token = work.q_row + at.quotient;
  return r;
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

// A factor of every number of out. A scale of 0 would make them infinite: they are NaN or the largest number then.
FLASHSPARK_DEVICE float output_factor(const ForwardArguments &a) {
  return a.output_scale == nullptr ? 1.0f : 1.0f / *a.output_scale;
}

// Eight numbers of a row of out, from element `at` on, of what kernels hold as 16-bit numbers. On their way to e4m3
// these are fp16, whose seven more bits keep a second rounding from being seen.
template <class Number>
FLASHSPARK_DEVICE void store_out_8(const ForwardArguments &a, int64_t at, ptx::Vector16 v) {
  if (a.out_number != flashspark::Number::e4m3) {
    store_8(static_cast<Number *>(a.out) + at, v);
    return;
  }
  auto *to = static_cast<ptx::E4m3 *>(a.out) + at;
  uint32_t four[2];
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) {
    const auto pair = [&v, n](int32_t word) {
      const uint32_t both = v.word[2 * n + word];
      return ptx::narrow_e4m3x2(ptx::widen(ptx::Float16{static_cast<uint16_t>(both)}),
                                ptx::widen(ptx::Float16{static_cast<uint16_t>(both >> 16)}));
    };
    four[n] = pair(0) | pair(1) << 16;
  }
  if (reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    reinterpret_cast<uint32_t *>(to)[0] = four[0];
    reinterpret_cast<uint32_t *>(to)[1] = four[1];
    return;
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 8; ++n) to[n].bits = static_cast<uint8_t>(four[n / 4] >> n % 4 * 8);
}

// Two numbers, at once where the address allows it.
template <class Number>
FLASHSPARK_DEVICE void store_2(Number *to, uint32_t both) {
  if (reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t *>(to) = both;
    return;
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) to[n].bits = static_cast<uint16_t>(both >> n * 16);
}

// Two numbers of a row of out, from element `at` on.
FLASHSPARK_DEVICE void store_out_2(const ForwardArguments &a, int64_t at, float low, float high) {
  if (a.out_number == flashspark::Number::e4m3) {
    auto *to = static_cast<ptx::E4m3 *>(a.out) + at;
    const uint32_t both = ptx::narrow_e4m3x2(low, high);
    to[0].bits = static_cast<uint8_t>(both);
    to[1].bits = static_cast<uint8_t>(both >> 8);
  } else if (a.out_number == flashspark::Number::bfloat16) {
    store_2(static_cast<ptx::Bfloat16 *>(a.out) + at, ptx::pack<ptx::Bfloat16>(low, high));
  } else {
    store_2(static_cast<ptx::Float16 *>(a.out) + at, ptx::pack<ptx::Float16>(low, high));
  }
}

// Pieces of split row tiles lie as the warps that compute them hold them, so that a warp writes 512 bytes at once: of
// eight rows, for each 16 columns, the 16 bytes of every lane. Lane l has row l / 4 and four columns (in_order, or
// for the merge kernel pair_distance). In floats: where row `row` (counted through all places) has its first 16
// columns, and from there what a lane of it has of the columns from `column` on, a multiple of 16.
FLASHSPARK_DEVICE int64_t piece_row(const ForwardArguments &a, int64_t row) {
  return row / 8 * 8 * a.partial_columns + row % 8 * 16;
}
FLASHSPARK_DEVICE int32_t piece_column(int32_t lane, int32_t column) {
  return column * 8 + lane % 4 * 4;
}

// Of the 16 columns of two n8 tiles a lane holds two pairs: 2 (l % 4) and + 1 of each tile, or with V in e4m3, where
// one tile has the even columns and the other the odd ones (multiply_values), four neighbours from 4 (l % 4) on. In
// order: word x of tile c.
template <class T>
FLASHSPARK_DEVICE float in_order(const Output<T> &o, int32_t n, int32_t c, int32_t x) {
  if constexpr (T::kConverts) return o.at[n / 2][c / 2 * 2 + x][n % 2 * 2 + c % 2];
  return o.at[n / 2][c][n % 2 * 2 + x];
}

// What a warp stores: all of its rows, with two key groups those eights of rows that its group has joined, with more
// those columns. Row lane / 4 of eight n is a lane's; at holds its two columns of each n8 tile.
template <class T>
struct Result {
  static constexpr int32_t kEights = T::kFlexible || T::kOwnKeys ? T::kLaneRows : T::kLaneRows / T::kKeyGroups;
  static constexpr int32_t kColumns = T::kOwnKeys ? T::kHeadDimV / T::kKeyGroups : T::kHeadDimV;
  float at[kEights][kColumns / 8][2];
  float base[kEights], sum[kEights];

  // First column of the warp among those of the block.
  static FLASHSPARK_DEVICE int32_t column() {
    return T::kOwnKeys ? static_cast<int32_t>(ptx::thread_index() / 32) * kColumns : 0;
  }
  static FLASHSPARK_DEVICE int32_t eights(const ForwardArguments &a) {
    return T::kFlexible && !side_by_side<T>(a) ? kEights / T::kKeyGroups : kEights;
  }
  // First row of an eight among the rows of the warp.
  static FLASHSPARK_DEVICE int32_t row(const ForwardArguments &a, int32_t eight) {
    return T::kOwnKeys || side_by_side<T>(a) ? eight * 8 : eight * 16 + key_group<T>(a) * 8;
  }
};

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

// Sums of whole rows from those of the lanes' columns.
template <int32_t rows>
FLASHSPARK_DEVICE void add_lanes(float (&sum)[rows], int32_t in_use) {
  FLASHSPARK_UNROLL
  for (int32_t lanes = 1; lanes <= 2; lanes *= 2) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < rows && n < in_use; ++n) sum[n] += ptx::shuffle_xor(sum[n], static_cast<uint32_t>(lanes));
  }
}

// Every warp has sums of all rows and columns over keys of its own: each hands over all of them and finishes a part of
// the columns. Of 16 rows the last eight may not exist.
template <class T>
FLASHSPARK_DEVICE Result<T> join_columns(const Work &work, const Output<T> &o, const LaneState<T> &state,
                                         ptx::SharedAddress shared) {
  constexpr int32_t kPairs = T::kHeadDimV / 16, kOwn = kPairs / T::kKeyGroups, kEights = Result<T>::kEights;
  static_assert(kEights == 2 && kPairs % T::kKeyGroups == 0);
  const auto warp = static_cast<int32_t>(ptx::thread_index() / 32);
  const ptx::SharedAddress lane = shared + ptx::thread_index() % 32 * 16;
  const auto place = [lane](int32_t of_warp, int32_t vector) {
    return lane + static_cast<uint32_t>(of_warp) * T::kResultBytes + static_cast<uint32_t>(vector) * 512;
  };
  const int32_t eights = work.end_row - work.first_row > 8 ? 2 : 1;
  float sum[kEights] = {state.sum[0], state.sum[1]};
  add_lanes(sum, kEights);
  store_4(place(warp, kEights * kPairs), state.base[0], sum[0], state.base[1], sum[1]);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kEights; ++n) {
    if (n >= eights) break;
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < kPairs; ++c)
      store_4(place(warp, n * kPairs + c), in_order<T>(o, n, 2 * c, 0), in_order<T>(o, n, 2 * c, 1),
              in_order<T>(o, n, 2 * c + 1, 0), in_order<T>(o, n, 2 * c + 1, 1));
  }
  ptx::block_barrier();  // all have handed over
  Result<T> r{};
  ptx::Vector16 ends[T::kKeyGroups];
  FLASHSPARK_UNROLL
  for (int32_t w = 0; w < T::kKeyGroups; ++w) ends[w] = ptx::load_shared_16(place(w, kEights * kPairs));
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kEights; ++n) {
    if (n >= eights) break;
    r.base[n] = kLowest;
    FLASHSPARK_UNROLL
    for (int32_t w = 0; w < T::kKeyGroups; ++w) r.base[n] = larger(r.base[n], ptx::as_float(ends[w].word[2 * n]));
    FLASHSPARK_UNROLL
    for (int32_t w = 0; w < T::kKeyGroups; ++w) {
      const float factor = ptx::exp2_approx(ptx::as_float(ends[w].word[2 * n]) - r.base[n]);
      r.sum[n] += ptx::as_float(ends[w].word[2 * n + 1]) * factor;
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kOwn; ++c) {
        const ptx::Vector16 v = ptx::load_shared_16(place(w, n * kPairs + warp * kOwn + c));
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x) r.at[n][2 * c + x / 2][x % 2] += ptx::as_float(v.word[x]) * factor;
      }
    }
  }
  return r;
}

// This warp's part of the shared memory that results pass through: with two key groups it first holds what the warp of
// the same rows in the other group hands over.
template <class T>
FLASHSPARK_DEVICE ptx::SharedAddress result_memory(ptx::SharedAddress shared, int32_t warp) {
  return shared + static_cast<uint32_t>(warp) * T::kResultBytes;
}

// Of each 16 rows the first key group finishes the first eight and the second group the others: each hands over its
// share of the rest, and both halves of the warps store.
template <class T>
FLASHSPARK_DEVICE Result<T> join_rows(const ForwardArguments &a, const Output<T> &o, const LaneState<T> &state,
                                      ptx::SharedAddress shared) {
  constexpr int32_t kColumns = T::kHeadDimV / 8;
  static_assert(T::kKeyGroups <= 2 && kColumns % 2 == 0);
  Result<T> r;
  if (side_by_side<T>(a)) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < Result<T>::kEights; ++n) {
      r.base[n] = state.base[n];
      r.sum[n] = state.sum[n];
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; ++c) {
        r.at[n][c][0] = in_order<T>(o, n, c, 0);
        r.at[n][c][1] = in_order<T>(o, n, c, 1);
      }
    }
  } else if constexpr (T::kKeyGroups > 1) {
    const auto warp = static_cast<int32_t>(ptx::thread_index() / 32);
    const bool second = key_group<T>(a) > 0;
    const int32_t other = second ? warp - T::kRowWarps : warp + T::kRowWarps;
    const auto place = [](int32_t slab, int32_t vector) { return (slab * (kColumns / 2 + 1) + vector) * 512; };
    const ptx::SharedAddress lane = ptx::thread_index() % 32 * 16;
    const ptx::SharedAddress to = result_memory<T>(shared, other) + lane, from = result_memory<T>(shared, warp) + lane;
    FLASHSPARK_UNROLL
    for (int32_t slab = 0; slab < T::kSlabs; ++slab) {
      const auto handed = [&](int32_t c, int32_t x) {
        return second ? in_order<T>(o, 2 * slab, c, x) : in_order<T>(o, 2 * slab + 1, c, x);
      };
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; c += 2)
        store_4(to + place(slab, c / 2), handed(c, 0), handed(c, 1), handed(c + 1, 0), handed(c + 1, 1));
      const int32_t away = 2 * slab + 1, kept = 2 * slab;  // rows of the first group
      store_4(to + place(slab, kColumns / 2), second ? state.base[kept] : state.base[away],
              second ? state.sum[kept] : state.sum[away], 0, 0);
      r.base[slab] = second ? state.base[away] : state.base[kept];
      r.sum[slab] = second ? state.sum[away] : state.sum[kept];
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; ++c) {
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 2; ++x)
          r.at[slab][c][x] = second ? in_order<T>(o, 2 * slab + 1, c, x) : in_order<T>(o, 2 * slab, c, x);
      }
    }
    ptx::block_barrier();  // what was handed over is there
    FLASHSPARK_UNROLL
    for (int32_t slab = 0; slab < T::kSlabs; ++slab) {
      const ptx::Vector16 ends = ptx::load_shared_16(from + place(slab, kColumns / 2));
      const float base = larger(r.base[slab], ptx::as_float(ends.word[0]));
      const float own = ptx::exp2_approx(r.base[slab] - base);
      const float theirs = ptx::exp2_approx(ptx::as_float(ends.word[0]) - base);
      r.base[slab] = base;
      r.sum[slab] = r.sum[slab] * own + ptx::as_float(ends.word[1]) * theirs;
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; c += 2) {
        const ptx::Vector16 v = ptx::load_shared_16(from + place(slab, c / 2));
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x)
          r.at[slab][c + x / 2][x % 2] = r.at[slab][c + x / 2][x % 2] * own + ptx::as_float(v.word[x]) * theirs;
      }
    }
    ptx::warp_barrier();  // all lanes have read what the rows of the result will lie on
  }
  add_lanes(r.sum, Result<T>::eights(a));
  return r;
}

template <class T>
FLASHSPARK_DEVICE Result<T> join_groups(const ForwardArguments &a, const Work &work, const Output<T> &o,
                                        const LaneState<T> &state, ptx::SharedAddress shared) {
  if constexpr (T::kOwnKeys) {
    return join_columns<T>(work, o, state, shared);
  } else {
    return join_rows<T>(a, o, state, shared);
  }
}

// One piece of a split problem: out / sum in float and the lse of the piece; 0 and -inf if it saw no key.
template <class T>
FLASHSPARK_DEVICE void store_partial(const ForwardArguments &a, const Work &work, const Result<T> &result,
                                     float value_scale, int32_t first_column, int32_t place) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const int32_t first_row = first_warp_row<T>(a) + lane / 4;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < Result<T>::kEights; ++n) {
    if (n >= Result<T>::eights(a)) break;
    const int32_t tile_row = first_row + Result<T>::row(a, n);
    if (work.first_row + tile_row >= work.end_row) continue;
    const int64_t row = place * static_cast<int64_t>(rows_of<T>(a)) + tile_row;
    const float lse = lse_of(result.base[n], result.sum[n]);
    if (lane % 4 == 0 && first_column == 0) a.partial_lse[row] = lse;
    const float inverse = lse == minus_infinity() ? 0.0f : (T::kConverts ? value_scale : 1.0f) / result.sum[n];
    float *to = a.partial_out + piece_row(a, row) + piece_column(lane, first_column);
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < Result<T>::kColumns / 8; c += 2) {
      if (first_column + c * 8 >= a.head_dim_v) continue;
      *reinterpret_cast<ptx::Vector16 *>(to + c * 64) =
          vector_of(result.at[n][c][0] * inverse, result.at[n][c][1] * inverse, result.at[n][c + 1][0] * inverse,
                    result.at[n][c + 1][1] * inverse);
    }
  }
}

// What finishes an eight of rows: the factor of its numbers. The lse goes out here.
template <class T>
FLASHSPARK_DEVICE float finish(const ForwardArguments &a, const Work &work, const Result<T> &result, int32_t n,
                               const ResultRow &r, float value_scale, int32_t first_column) {
  const Joined joined = join_sink(result.base[n], r.in_use ? sink_of(a, r.head) : minus_infinity());
  const float sum = result.sum[n] * joined.factor + joined.sink;
  const float inverse = sum == 0 ? 0.0f : joined.factor * ptx::reciprocal_approx(sum);
  if (r.in_use && ptx::thread_index() % 4 == 0 && first_column == 0) store_lse(a, work, r, lse_of(joined.maximum, sum));
  return (T::kConverts ? inverse * value_scale : inverse) * output_factor(a);
}
// As rows pass through shared memory: in out's type, or in fp16 on their way to e4m3.
template <class T>
FLASHSPARK_DEVICE uint32_t pack_out(const ForwardArguments &a, float low, float high) {
  constexpr bool kMayBeBfloat16 = T::kConverts || std::is_same_v<typename T::Number, ptx::Bfloat16>;
  return kMayBeBfloat16 && a.out_number == Number::bfloat16 ? ptx::pack<ptx::Bfloat16>(low, high)
                                                            : ptx::pack<ptx::Float16>(low, high);
}

// Few columns of few rows, from the registers.
template <class T>
FLASHSPARK_DEVICE void store_columns(const ForwardArguments &a, const Work &work, const Result<T> &result,
                                     float value_scale, int32_t first_column) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  constexpr int32_t kPair = T::kConverts ? 2 : 8;  // from a lane's first two columns of 16 to its others (in_order)
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < Result<T>::kEights; ++n) {
    const ResultRow r = result_row(a, work, work.first_row + n * 8 + lane / 4);
    const float inverse = finish<T>(a, work, result, n, r, value_scale, first_column);
    if (!r.in_use) continue;
    const int64_t to = out_offset(a, work, r);
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < Result<T>::kColumns / 8; ++c) {
      const int32_t column = first_column + c / 2 * 16 + lane % 4 * (T::kConverts ? 4 : 2) + c % 2 * kPair;
      if (column < a.head_dim_v)
        store_out_2(a, to + column, result.at[n][c][0] * inverse, result.at[n][c][1] * inverse);
    }
  }
}

// Rows pass through shared memory, each warp's through its own piece of it, so that whole rows are written.
template <class T>
FLASHSPARK_DEVICE void store_final(const ForwardArguments &a, const Work &work, const Result<T> &result,
                                   float value_scale, ptx::SharedAddress shared, int32_t first_column) {
  using Layout = typename T::ResultLayout;
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const int32_t first_row = work.first_row + first_warp_row<T>(a);
  const ptx::SharedAddress memory = result_memory<T>(shared, static_cast<int32_t>(ptx::thread_index() / 32));
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < Result<T>::kEights; ++n) {
    if (n >= Result<T>::eights(a)) break;
    const ResultRow r = result_row(a, work, first_row + Result<T>::row(a, n) + lane / 4);
    const float inverse = finish<T>(a, work, result, n, r, value_scale, first_column);
    const auto word = [&](int32_t c) {
      return pack_out<T>(a, result.at[n][c][0] * inverse, result.at[n][c][1] * inverse);
    };
    const int32_t row = n * 8 + lane / 4;
    if constexpr (T::kConverts) {
      // Eight bytes a lane; rows that would meet in the banks of c store another pair of chunks first.
      constexpr int32_t kOther = Layout::kGroup == 8 ? 4 : 2;
      const bool other = (Layout::kGroup == 8 ? row : row / 2) % 2 != 0;
      uint32_t words[T::kHeadDimV / 8];
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < T::kHeadDimV / 8; ++c) words[c] = word(c);
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < T::kHeadDimV / 8; c += 2) {
        ptx::store_shared_8(
            memory + Layout::step(Layout::offset(row, lane % 4 / 2), other ? c ^ kOther : c) + lane % 2 * 8,
            other ? words[c ^ kOther] : words[c], other ? words[(c ^ kOther) + 1] : words[c + 1]);
      }
    } else {
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < T::kHeadDimV / 8; ++c)
        ptx::store_shared_4(memory + Layout::step(Layout::offset(row, 0), c) + lane % 4 * 4, word(c));
    }
  }
  ptx::warp_barrier();
  // kRowLanes neighbouring lanes write one row.
  constexpr int32_t kRowLanes = T::kQueryThreads, kPassRows = 32 / kRowLanes;
  FLASHSPARK_UNROLL
  for (int32_t pass = 0; pass < Result<T>::kEights * 8 / kPassRows; ++pass) {
    if (pass * kPassRows >= Result<T>::eights(a) * 8) break;
    const int32_t row = pass * kPassRows + lane / kRowLanes;
    const ResultRow r = result_row(a, work, first_row + Result<T>::row(a, row / 8) + row % 8);
    const int64_t to = out_offset(a, work, r) + first_column;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < Layout::kChunks / kRowLanes; ++n) {
      const int32_t chunk = n * kRowLanes + lane % kRowLanes;
      const ptx::Vector16 v = ptx::load_shared_16(memory + Layout::offset(row, lane % kRowLanes) + n * kRowLanes * 16);
      if (r.in_use && first_column + chunk * 8 < a.head_dim_v) store_out_8<typename T::Number>(a, to + chunk * 8, v);
    }
  }
}

}  // namespace flashspark
