// Reduction over key groups: warps that computed the same rows over different keys add up their results, through shared
// memory, so that each warp has a part to store.
#pragma once

#include "forward/output.cuh"
#include "forward/traits.cuh"

namespace flashspark {

// What a warp stores. Without key groups all of its rows; with two the octets of rows that its group has reduced; with
// more, some columns of all rows. A lane has row lane / 4 of each octet; at holds its two columns of each n8 tile.
template <class T>
struct EpilogueTile {
  static constexpr int32_t kOctets =
      T::kRuntimeKeyGroups || T::kWarpPrivateKV ? T::kLaneRows : T::kLaneRows / T::kKeyGroups;
  static constexpr int32_t kColumns = T::kWarpPrivateKV ? T::kHeadDimV / T::kKeyGroups : T::kHeadDimV;
  float at[kOctets][kColumns / 8][2];
  float row_max[kOctets], row_sum[kOctets];

  // First column of the warp among those of the CTA.
  static FLASHSPARK_DEVICE int32_t column() { return T::kWarpPrivateKV ? ptx::warp() * kColumns : 0; }
  static FLASHSPARK_DEVICE int32_t octets(const ForwardArguments &a) {
    return T::kRuntimeKeyGroups && !T::warps_split_rows(a) ? kOctets / T::kKeyGroups : kOctets;
  }
  // First row of an octet among the rows of the warp.
  static FLASHSPARK_DEVICE int32_t row(const ForwardArguments &a, int32_t octet) {
    return T::kWarpPrivateKV || T::warps_split_rows(a) ? octet * 8 : octet * 16 + T::key_group(a) * 8;
  }
};

// From sums over the lanes' own columns to those of whole rows.
template <int32_t rows>
FLASHSPARK_DEVICE void add_lanes(float (&sum)[rows], int32_t in_use) {
  FLASHSPARK_UNROLL
  for (int32_t lanes = 1; lanes <= 2; lanes *= 2) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < rows && n < in_use; ++n) sum[n] += ptx::shuffle_xor(sum[n], static_cast<uint32_t>(lanes));
  }
}

// Between more than two groups: every warp has sums of all rows and columns over keys of its own, hands over all of
// them and reduces a part of the columns. The last eight of 16 rows may not exist.
template <class T>
FLASHSPARK_DEVICE EpilogueTile<T> reduce_to_columns(const RowTile &rows, const Output<T> &o, const RowState<T> &state,
                                                    ptx::SharedAddress shared) {
  constexpr int32_t kPairs = T::kHeadDimV / 16, kOwn = kPairs / T::kKeyGroups, kOctets = EpilogueTile<T>::kOctets;
  static_assert(kOctets == 2 && kPairs % T::kKeyGroups == 0);
  const auto warp = ptx::warp();
  const ptx::SharedAddress lane = shared + ptx::thread_index() % 32 * 16;
  const auto offset = [lane](int32_t of_warp, int32_t vector) {
    return lane + static_cast<uint32_t>(of_warp) * static_cast<uint32_t>(T::kSharedMemory.epilogue) +
           static_cast<uint32_t>(vector) * 512;
  };
  const int32_t octets = rows.end_row - rows.first_row > 8 ? 2 : 1;
  float sum[kOctets] = {state.row_sum[0], state.row_sum[1]};
  add_lanes(sum, kOctets);
  store_4(offset(warp, kOctets * kPairs), state.row_max[0], sum[0], state.row_max[1], sum[1]);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kOctets; ++n) {
    if (n >= octets) break;
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < kPairs; ++c)
      store_4(offset(warp, n * kPairs + c), T::Mma::output_column(o, n, 2 * c, 0),
              T::Mma::output_column(o, n, 2 * c, 1), T::Mma::output_column(o, n, 2 * c + 1, 0),
              T::Mma::output_column(o, n, 2 * c + 1, 1));
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

// A warp's part of the shared memory that results pass through. With two key groups it first holds what the warp of the
// same rows in the other group hands over.
template <class T>
FLASHSPARK_DEVICE ptx::SharedAddress epilogue_memory(ptx::SharedAddress shared, int32_t warp) {
  return shared + static_cast<uint32_t>(warp) * static_cast<uint32_t>(T::kSharedMemory.epilogue);
}

// Between two groups: the first reduces the first eight of each 16 rows and the second the others. Each hands over its
// sums of the rest, and both store.
template <class T>
FLASHSPARK_DEVICE EpilogueTile<T> reduce_to_rows(const ForwardArguments &a, const Output<T> &o,
                                                 const RowState<T> &state, ptx::SharedAddress shared) {
  constexpr int32_t kColumns = T::kHeadDimV / 8;
  static_assert(T::kKeyGroups <= 2 && kColumns % 2 == 0);
  EpilogueTile<T> r;
  if (T::warps_split_rows(a)) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
      r.row_max[n] = state.row_max[n];
      r.row_sum[n] = state.row_sum[n];
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < kColumns; ++c) {
        r.at[n][c][0] = T::Mma::output_column(o, n, c, 0);
        r.at[n][c][1] = T::Mma::output_column(o, n, c, 1);
      }
    }
  } else if constexpr (T::kKeyGroups > 1) {
    const auto warp = ptx::warp();
    const bool second = T::key_group(a) > 0;
    const int32_t other = second ? warp - T::kRowWarps : warp + T::kRowWarps;
    const auto offset = [](int32_t m_atom, int32_t vector) { return (m_atom * (kColumns / 2 + 1) + vector) * 512; };
    const ptx::SharedAddress lane = ptx::thread_index() % 32 * 16;
    const ptx::SharedAddress to = epilogue_memory<T>(shared, other) + lane,
                             from = epilogue_memory<T>(shared, warp) + lane;
    FLASHSPARK_UNROLL
    for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
      const auto handed = [&](int32_t c, int32_t x) {
        return second ? T::Mma::output_column(o, 2 * m_atom, c, x) : T::Mma::output_column(o, 2 * m_atom + 1, c, x);
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
              second ? T::Mma::output_column(o, 2 * m_atom + 1, c, x) : T::Mma::output_column(o, 2 * m_atom, c, x);
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
FLASHSPARK_DEVICE EpilogueTile<T> reduce_key_groups(const ForwardArguments &a, const RowTile &rows, const Output<T> &o,
                                                    const RowState<T> &state, ptx::SharedAddress shared) {
  if constexpr (T::kWarpPrivateKV) {
    return reduce_to_columns<T>(rows, o, state, shared);
  } else {
    return reduce_to_rows<T>(a, o, state, shared);
  }
}

}  // namespace flashspark
