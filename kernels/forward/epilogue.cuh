// From the accumulators to out and lse, or to the partial results that the combine kernel joins.
#pragma once

#include "forward/key_groups.cuh"

namespace flashspark {

// What every element of out is multiplied with, beside the inverse of its row's sum.
template <class T>
FLASHSPARK_DEVICE float out_factor(const typename T::KernelArguments &a, const typename T::Mma::Scales &scales) {
  if constexpr (T::ScoreMod::kDropout) {
    return scales.v() * a.dropout.scale;
  } else {
    return scales.v();
  }
}

// A partial result: out / row_sum in float and the lse; 0 and -inf where no key was visited.
template <class T>
FLASHSPARK_DEVICE void store_partial(const typename T::KernelArguments &a, const RowTile &rows,
                                     const EpilogueTile<T> &result, const typename T::Mma::Scales &scales,
                                     int32_t first_column, int32_t partial_slot) {
  const int32_t lane = ptx::lane();
  const int32_t first_row = T::first_warp_row(a) + lane / 4;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
    if (n >= EpilogueTile<T>::octets(a)) break;
    const int32_t tile_row = first_row + EpilogueTile<T>::row(a, n);
    if (rows.first_row + tile_row >= rows.end_row) continue;
    const int64_t row = partial_slot * static_cast<int64_t>(T::rows(a)) + tile_row;
    const float lse = lse_of(result.row_max[n], result.row_sum[n]);
    if (lane % 4 == 0 && first_column == 0) a.partial_lse[row] = lse;
    const float inverse = lse == minus_infinity() ? 0.0f : out_factor<T>(a, scales) / result.row_sum[n];
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

// Adds the sink to octet n of the warp's rows, stores its lse, and returns the factor that normalizes its output.
template <class T>
FLASHSPARK_DEVICE float normalize_and_store_lse(const typename T::KernelArguments &a, const RowTile &rows,
                                                const EpilogueTile<T> &result, int32_t n, const OutputRow &r,
                                                const typename T::Mma::Scales &scales, int32_t first_column) {
  const SinkRescale joined = add_sink(result.row_max[n], r.in_use ? sink_of(a, r.head) : minus_infinity());
  const float sum = result.row_sum[n] * joined.factor + joined.sink;
  const float inverse = sum == 0 ? 0.0f : joined.factor * ptx::reciprocal_approx(sum);
  if (r.in_use && ptx::thread_index() % 4 == 0 && first_column == 0) store_lse(a, rows, r, lse_of(joined.maximum, sum));
  return inverse * out_factor<T>(a, scales);
}

// From registers: few columns of few rows.
template <class T>
FLASHSPARK_DEVICE void store_out_direct(const typename T::KernelArguments &a, const RowTile &rows,
                                        const EpilogueTile<T> &result, const typename T::Mma::Scales &scales,
                                        int32_t first_column) {
  const int32_t lane = ptx::lane();
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
    const OutputRow r = output_row(a, rows, rows.first_row + n * 8 + lane / 4);
    const float inverse = normalize_and_store_lse<T>(a, rows, result, n, r, scales, first_column);
    if (!r.in_use) continue;
    auto *to = static_cast<typename T::Element *>(a.out) + out_offset(a, rows, r);
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < EpilogueTile<T>::kColumns / 8; ++c) {
      const int32_t column = first_column + c / 2 * 16 + T::Mma::first_column(lane) + c % 2 * T::Mma::kPairDistance;
      if (column < a.head_dim_v)
        store_2(to + column, T::Mma::pack_out(a, result.at[n][c][0] * inverse, result.at[n][c][1] * inverse));
    }
  }
}

// Through shared memory, each warp through its own part of it, so that whole rows are written.
template <class T>
FLASHSPARK_DEVICE void store_out(const typename T::KernelArguments &a, const RowTile &rows,
                                 const EpilogueTile<T> &result, const typename T::Mma::Scales &scales,
                                 ptx::SharedAddress shared, int32_t first_column) {
  using Layout = typename T::OutputLayout;
  const int32_t lane = ptx::lane();
  const int32_t first_row = rows.first_row + T::first_warp_row(a);
  const ptx::SharedAddress memory = epilogue_memory<T>(shared, ptx::warp());
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < EpilogueTile<T>::kOctets; ++n) {
    if (n >= EpilogueTile<T>::octets(a)) break;
    const OutputRow r = output_row(a, rows, first_row + EpilogueTile<T>::row(a, n) + lane / 4);
    const float inverse = normalize_and_store_lse<T>(a, rows, result, n, r, scales, first_column);
    uint32_t words[T::kHeadDimV / 8];
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kHeadDimV / 8; ++c)
      words[c] = T::Mma::pack_out(a, result.at[n][c][0] * inverse, result.at[n][c][1] * inverse);
    T::Mma::template store_row<Layout>(memory, n * 8 + lane / 4, words);
  }
  ptx::warp_barrier();
  // kRowLanes neighbouring lanes write one row.
  constexpr int32_t kRowLanes = T::kQueryThreads, kPassRows = 32 / kRowLanes;
  auto *out = static_cast<typename T::Element *>(a.out);
  FLASHSPARK_UNROLL
  for (int32_t pass = 0; pass < EpilogueTile<T>::kOctets * 8 / kPassRows; ++pass) {
    if (pass * kPassRows >= EpilogueTile<T>::octets(a) * 8) break;
    const int32_t row = pass * kPassRows + lane / kRowLanes;
    const OutputRow r = output_row(a, rows, first_row + EpilogueTile<T>::row(a, row / 8) + row % 8);
    auto *to = out + out_offset(a, rows, r) + first_column;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < Layout::kChunks / kRowLanes; ++n) {
      const int32_t chunk = n * kRowLanes + lane % kRowLanes;
      const ptx::Vector16 v = ptx::load_shared_16(memory + Layout::offset(row, lane % kRowLanes) + n * kRowLanes * 16);
      if (r.in_use && first_column + chunk * 8 < a.head_dim_v) store_8(to + chunk * 8, v);
    }
  }
}

}  // namespace flashspark
