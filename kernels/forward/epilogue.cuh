// From the accumulators to out and lse, or to the pieces that the combine kernel joins.
#pragma once

#include "forward/softmax.cuh"

namespace flashspark {

// Natural logarithm of a row's sum of exponentials: maximum in units of log2, sum relative to it.
FLASHSPARK_DEVICE float lse_of(float maximum, float sum) {
  return sum > 0 || sum != sum ? (maximum + ptx::log2_approx(sum)) * kLn2 : minus_infinity();
}

// Addresses of one packed row.
struct OutputRow {
  bool in_use;
  int64_t head;   // query head
  int64_t token;  // row in q and out
};
FLASHSPARK_DEVICE OutputRow output_row(const ForwardArguments &a, const RowTile &row_tile, int32_t row) {
  OutputRow r{};
  r.in_use = row < row_tile.end_row;
  const Quotient at = divide(r.in_use ? row : 0, a.group);
  r.head = row_tile.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
  r.token = row_tile.q_row + at.quotient;
  return r;
}
FLASHSPARK_DEVICE void store_lse(const ForwardArguments &a, const RowTile &row_tile, const OutputRow &r, float lse) {
  if (a.lse == nullptr) return;
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : row_tile.seq * a.lse_strides.batch;
  a.lse[batch + r.head * a.lse_strides.head + r.token * a.lse_strides.token] = lse;
}
FLASHSPARK_DEVICE int64_t out_offset(const ForwardArguments &a, const RowTile &row_tile, const OutputRow &r) {
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : row_tile.seq * a.out_strides.batch;
  return batch + r.token * a.out_strides.token + r.head * a.out_strides.head;
}

// The sink of a head in units of log2; -inf: none.
FLASHSPARK_DEVICE float sink_of(const ForwardArguments &a, int64_t head) {
  return a.sinks == nullptr ? minus_infinity() : load_as_float(a.sinks, head, a.sinks_dtype) * kLog2E;
}

// Joins a sink to a row: the new maximum, and the factors of what was relative to the old one and of the sink.
struct SinkRescale {
  float maximum, factor, sink;
};
FLASHSPARK_DEVICE SinkRescale add_sink(float maximum, float sink) {
  const float high = larger(maximum, sink);
  if (high == minus_infinity()) return {high, 1.0f, 0.0f};
  return {high, maximum == high ? 1.0f : ptx::exp2_approx(maximum - high), ptx::exp2_approx(sink - high)};
}

// Writes eight numbers of a row, at once where the address allows it.
template <class Element>
FLASHSPARK_DEVICE void store_8(Element *to, ptx::Vector16 v) {
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<ptx::Vector16 *>(to) = v;
    return;
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 8; ++n) to[n].bits = static_cast<uint16_t>(v.word[n / 2] >> n % 2 * 16);
}

// Two numbers, at once where the address allows it.
template <class Element>
FLASHSPARK_DEVICE void store_2(Element *to, uint32_t both) {
  if (reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t *>(to) = both;
    return;
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) to[n].bits = static_cast<uint16_t>(both >> n * 16);
}

// Contributors of split row tiles lie as the warps that compute them hold them, so that a warp writes 512 bytes at
// once: of eight rows, for each 16 columns, the 16 bytes of every lane. Lane l has row l / 4 and four columns
// (output_column, or for the combine kernel partial_pair_distance). In floats: where row `row` (counted through all
// places) has its first 16 columns, and from there what a lane of it has of the columns from `column` on, a multiple
// of 16.
FLASHSPARK_DEVICE int64_t partial_row(const ForwardArguments &a, int64_t row) {
  return row / 8 * 8 * a.partial_columns + row % 8 * 16;
}
FLASHSPARK_DEVICE int32_t partial_column(int32_t lane, int32_t column) {
  return column * 8 + lane % 4 * 4;
}

// Of the 16 columns of two n8 tiles a lane holds two pairs: 2 (l % 4) and + 1 of each tile, or with V in e4m3, where
// one tile has the even columns and the other the odd ones (multiply_values), four neighbours from 4 (l % 4) on. In
// order: word x of tile c.
template <class T>
FLASHSPARK_DEVICE float output_column(const Output<T> &o, int32_t n, int32_t c, int32_t x) {
  if constexpr (T::kDequantizeKV) return o.at[n / 2][c / 2 * 2 + x][n % 2 * 2 + c % 2];
  return o.at[n / 2][c][n % 2 * 2 + x];
}

// What a warp stores: all of its rows, with two key groups those octets of rows that its group has joined, with more
// those columns. Row lane / 4 of eight n is a lane's; at holds its two columns of each n8 tile.
template <class T>
struct EpilogueTile {
  static constexpr int32_t kOctets =
      T::kRuntimeKeyGroups || T::kWarpPrivateKV ? T::kLaneRows : T::kLaneRows / T::kKeyGroups;
  static constexpr int32_t kColumns = T::kWarpPrivateKV ? T::kHeadDimV / T::kKeyGroups : T::kHeadDimV;
  float at[kOctets][kColumns / 8][2];
  float row_max[kOctets], row_sum[kOctets];

  // First column of the warp among those of the block.
  static FLASHSPARK_DEVICE int32_t column() {
    return T::kWarpPrivateKV ? static_cast<int32_t>(ptx::thread_index() / 32) * kColumns : 0;
  }
  static FLASHSPARK_DEVICE int32_t octets(const ForwardArguments &a) {
    return T::kRuntimeKeyGroups && !warps_split_rows<T>(a) ? kOctets / T::kKeyGroups : kOctets;
  }
  // First row of an eight among the rows of the warp.
  static FLASHSPARK_DEVICE int32_t row(const ForwardArguments &a, int32_t octet) {
    return T::kWarpPrivateKV || warps_split_rows<T>(a) ? octet * 8 : octet * 16 + key_group<T>(a) * 8;
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

// PartialSum of whole rows from those of the lanes' columns.
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
FLASHSPARK_DEVICE EpilogueTile<T> reduce_to_columns(const RowTile &row_tile, const Output<T> &o,
                                                    const RowState<T> &state, ptx::SharedAddress shared) {
  constexpr int32_t kPairs = T::kHeadDimV / 16, kOwn = kPairs / T::kKeyGroups, kOctets = EpilogueTile<T>::kOctets;
  static_assert(kOctets == 2 && kPairs % T::kKeyGroups == 0);
  const auto warp = static_cast<int32_t>(ptx::thread_index() / 32);
  const ptx::SharedAddress lane = shared + ptx::thread_index() % 32 * 16;
  const auto offset = [lane](int32_t of_warp, int32_t vector) {
    return lane + static_cast<uint32_t>(of_warp) * T::kEpilogueBytes + static_cast<uint32_t>(vector) * 512;
  };
  const int32_t octets = row_tile.end_row - row_tile.first_row > 8 ? 2 : 1;
  float sum[kOctets] = {state.row_sum[0], state.row_sum[1]};
  add_lanes(sum, kOctets);
  store_4(offset(warp, kOctets * kPairs), state.row_max[0], sum[0], state.row_max[1], sum[1]);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kOctets; ++n) {
    if (n >= octets) break;
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < kPairs; ++c)
      store_4(offset(warp, n * kPairs + c), output_column<T>(o, n, 2 * c, 0), output_column<T>(o, n, 2 * c, 1),
              output_column<T>(o, n, 2 * c + 1, 0), output_column<T>(o, n, 2 * c + 1, 1));
  }
  ptx::cta_barrier();  // all have handed over
  EpilogueTile<T> r{};
  ptx::Vector16 ends[T::kKeyGroups];
  FLASHSPARK_UNROLL
  for (int32_t w = 0; w < T::kKeyGroups; ++w) ends[w] = ptx::load_shared_16(offset(w, kOctets * kPairs));
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kOctets; ++n) {
    if (n >= octets) break;
    r.row_max[n] = kLowest;
    FLASHSPARK_UNROLL
    for (int32_t w = 0; w < T::kKeyGroups; ++w) r.row_max[n] = larger(r.row_max[n], ptx::as_float(ends[w].word[2 * n]));
    FLASHSPARK_UNROLL
    for (int32_t w = 0; w < T::kKeyGroups; ++w) {
      const float factor = ptx::exp2_approx(ptx::as_float(ends[w].word[2 * n]) - r.row_max[n]);
      r.row_sum[n] += ptx::as_float(ends[w].word[2 * n + 1]) * factor;
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kOwn; ++c) {
        const ptx::Vector16 v = ptx::load_shared_16(offset(w, n * kPairs + warp * kOwn + c));
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
FLASHSPARK_DEVICE ptx::SharedAddress epilogue_memory(ptx::SharedAddress shared, int32_t warp) {
  return shared + static_cast<uint32_t>(warp) * T::kEpilogueBytes;
}

// Of each 16 rows the first key group finishes the first eight and the second group the others: each hands over its
// share of the rest, and both halves of the warps store.
template <class T>
FLASHSPARK_DEVICE EpilogueTile<T> reduce_to_rows(const ForwardArguments &a, const Output<T> &o,
                                                 const RowState<T> &state, ptx::SharedAddress shared) {
  constexpr int32_t kColumns = T::kHeadDimV / 8;
  static_assert(T::kKeyGroups <= 2 && kColumns % 2 == 0);
  EpilogueTile<T> r;
  if (warps_split_rows<T>(a)) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
      r.row_max[n] = state.row_max[n];
      r.row_sum[n] = state.row_sum[n];
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; ++c) {
        r.at[n][c][0] = output_column<T>(o, n, c, 0);
        r.at[n][c][1] = output_column<T>(o, n, c, 1);
      }
    }
  } else if constexpr (T::kKeyGroups > 1) {
    const auto warp = static_cast<int32_t>(ptx::thread_index() / 32);
    const bool second = key_group<T>(a) > 0;
    const int32_t other = second ? warp - T::kRowWarps : warp + T::kRowWarps;
    const auto offset = [](int32_t m_atom, int32_t vector) { return (m_atom * (kColumns / 2 + 1) + vector) * 512; };
    const ptx::SharedAddress lane = ptx::thread_index() % 32 * 16;
    const ptx::SharedAddress to = epilogue_memory<T>(shared, other) + lane,
                             from = epilogue_memory<T>(shared, warp) + lane;
    FLASHSPARK_UNROLL
    for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
      const auto handed = [&](int32_t c, int32_t x) {
        return second ? output_column<T>(o, 2 * m_atom, c, x) : output_column<T>(o, 2 * m_atom + 1, c, x);
      };
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; c += 2)
        store_4(to + offset(m_atom, c / 2), handed(c, 0), handed(c, 1), handed(c + 1, 0), handed(c + 1, 1));
      const int32_t away = 2 * m_atom + 1, kept = 2 * m_atom;  // rows of the first group
      store_4(to + offset(m_atom, kColumns / 2), second ? state.row_max[kept] : state.row_max[away],
              second ? state.row_sum[kept] : state.row_sum[away], 0, 0);
      r.row_max[m_atom] = second ? state.row_max[away] : state.row_max[kept];
      r.row_sum[m_atom] = second ? state.row_sum[away] : state.row_sum[kept];
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; ++c) {
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 2; ++x)
          r.at[m_atom][c][x] =
              second ? output_column<T>(o, 2 * m_atom + 1, c, x) : output_column<T>(o, 2 * m_atom, c, x);
      }
    }
    ptx::cta_barrier();  // what was handed over is there
    FLASHSPARK_UNROLL
    for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
      const ptx::Vector16 ends = ptx::load_shared_16(from + offset(m_atom, kColumns / 2));
      const float base = larger(r.row_max[m_atom], ptx::as_float(ends.word[0]));
      const float own = ptx::exp2_approx(r.row_max[m_atom] - base);
      const float theirs = ptx::exp2_approx(ptx::as_float(ends.word[0]) - base);
      r.row_max[m_atom] = base;
      r.row_sum[m_atom] = r.row_sum[m_atom] * own + ptx::as_float(ends.word[1]) * theirs;
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; c += 2) {
        const ptx::Vector16 v = ptx::load_shared_16(from + offset(m_atom, c / 2));
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x)
          r.at[m_atom][c + x / 2][x % 2] = r.at[m_atom][c + x / 2][x % 2] * own + ptx::as_float(v.word[x]) * theirs;
      }
    }
    ptx::warp_barrier();  // all lanes have read what the rows of the result will lie on
  }
  add_lanes(r.row_sum, EpilogueTile<T>::octets(a));
  return r;
}

template <class T>
FLASHSPARK_DEVICE EpilogueTile<T> reduce_key_groups(const ForwardArguments &a, const RowTile &row_tile,
                                                    const Output<T> &o, const RowState<T> &state,
                                                    ptx::SharedAddress shared) {
  if constexpr (T::kWarpPrivateKV) {
    return reduce_to_columns<T>(row_tile, o, state, shared);
  } else {
    return reduce_to_rows<T>(a, o, state, shared);
  }
}

// One piece of a split problem: out / sum in float and the lse of the piece; 0 and -inf if it saw no key.
template <class T>
FLASHSPARK_DEVICE void store_partial(const ForwardArguments &a, const RowTile &row_tile, const EpilogueTile<T> &result,
                                     float value_scale, int32_t first_column, int32_t partial_slot) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const int32_t first_row = first_warp_row<T>(a) + lane / 4;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
    if (n >= EpilogueTile<T>::octets(a)) break;
    const int32_t tile_row = first_row + EpilogueTile<T>::row(a, n);
    if (row_tile.first_row + tile_row >= row_tile.end_row) continue;
    const int64_t row = partial_slot * static_cast<int64_t>(rows_of<T>(a)) + tile_row;
    const float lse = lse_of(result.row_max[n], result.row_sum[n]);
    if (lane % 4 == 0 && first_column == 0) a.partial_lse[row] = lse;
    const float inverse = lse == minus_infinity() ? 0.0f : (T::kDequantizeKV ? value_scale : 1.0f) / result.row_sum[n];
    float *to = a.partial_out + partial_row(a, row) + partial_column(lane, first_column);
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < EpilogueTile<T>::kColumns / 8; c += 2) {
      if (first_column + c * 8 >= a.head_dim_v) continue;
      *reinterpret_cast<ptx::Vector16 *>(to + c * 64) =
          vector_of(result.at[n][c][0] * inverse, result.at[n][c][1] * inverse, result.at[n][c + 1][0] * inverse,
                    result.at[n][c + 1][1] * inverse);
    }
  }
}

// What finishes an eight of rows: the factor of its numbers. The lse goes out here.
template <class T>
FLASHSPARK_DEVICE float normalize_and_store_lse(const ForwardArguments &a, const RowTile &row_tile,
                                                const EpilogueTile<T> &result, int32_t n, const OutputRow &r,
                                                float value_scale, int32_t first_column) {
  const SinkRescale joined = add_sink(result.row_max[n], r.in_use ? sink_of(a, r.head) : minus_infinity());
  const float sum = result.row_sum[n] * joined.factor + joined.sink;
  const float inverse = sum == 0 ? 0.0f : joined.factor * ptx::reciprocal_approx(sum);
  if (r.in_use && ptx::thread_index() % 4 == 0 && first_column == 0)
    store_lse(a, row_tile, r, lse_of(joined.maximum, sum));
  return T::kDequantizeKV ? inverse * value_scale : inverse;
}
template <class T>
FLASHSPARK_DEVICE uint32_t pack_out(const ForwardArguments &a, float low, float high) {
  return T::kDequantizeKV && a.out_dtype == DType::bfloat16 ? ptx::pack<ptx::Bfloat16>(low, high)
                                                            : ptx::pack<typename T::Element>(low, high);
}

// Few columns of few rows, from the registers.
template <class T>
FLASHSPARK_DEVICE void store_out_direct(const ForwardArguments &a, const RowTile &row_tile,
                                        const EpilogueTile<T> &result, float value_scale, int32_t first_column) {
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  constexpr int32_t kPair =
      T::kDequantizeKV ? 2 : 8;  // from a lane's first two columns of 16 to its others (output_column)
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
    const OutputRow r = output_row(a, row_tile, row_tile.first_row + n * 8 + lane / 4);
    const float inverse = normalize_and_store_lse<T>(a, row_tile, result, n, r, value_scale, first_column);
    if (!r.in_use) continue;
    auto *to = static_cast<typename T::Element *>(a.out) + out_offset(a, row_tile, r);
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < EpilogueTile<T>::kColumns / 8; ++c) {
      const int32_t column = first_column + c / 2 * 16 + lane % 4 * (T::kDequantizeKV ? 4 : 2) + c % 2 * kPair;
      if (column < a.head_dim_v)
        store_2(to + column, pack_out<T>(a, result.at[n][c][0] * inverse, result.at[n][c][1] * inverse));
    }
  }
}

// Rows pass through shared memory, each warp's through its own piece of it, so that whole rows are written.
template <class T>
FLASHSPARK_DEVICE void store_out(const ForwardArguments &a, const RowTile &row_tile, const EpilogueTile<T> &result,
                                 float value_scale, ptx::SharedAddress shared, int32_t first_column) {
  using Layout = typename T::OutputLayout;
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const int32_t first_row = row_tile.first_row + first_warp_row<T>(a);
  const ptx::SharedAddress memory = epilogue_memory<T>(shared, static_cast<int32_t>(ptx::thread_index() / 32));
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
    if (n >= EpilogueTile<T>::octets(a)) break;
    const OutputRow r = output_row(a, row_tile, first_row + EpilogueTile<T>::row(a, n) + lane / 4);
    const float inverse = normalize_and_store_lse<T>(a, row_tile, result, n, r, value_scale, first_column);
    const auto word = [&](int32_t c) {
      return pack_out<T>(a, result.at[n][c][0] * inverse, result.at[n][c][1] * inverse);
    };
    const int32_t row = n * 8 + lane / 4;
    if constexpr (T::kDequantizeKV) {
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
  auto *out = static_cast<typename T::Element *>(a.out);
  FLASHSPARK_UNROLL
  for (int32_t pass = 0; pass < EpilogueTile<T>::kOctets * 8 / kPassRows; ++pass) {
    if (pass * kPassRows >= EpilogueTile<T>::octets(a) * 8) break;
    const int32_t row = pass * kPassRows + lane / kRowLanes;
    const OutputRow r = output_row(a, row_tile, first_row + EpilogueTile<T>::row(a, row / 8) + row % 8);
    auto *to = out + out_offset(a, row_tile, r) + first_column;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < Layout::kChunks / kRowLanes; ++n) {
      const int32_t chunk = n * kRowLanes + lane % kRowLanes;
      const ptx::Vector16 v = ptx::load_shared_16(memory + Layout::offset(row, lane % kRowLanes) + n * kRowLanes * 16);
      if (r.in_use && first_column + chunk * 8 < a.head_dim_v) store_8(to + chunk * 8, v);
    }
  }
}

}  // namespace flashspark
