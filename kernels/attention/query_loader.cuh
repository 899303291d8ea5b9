// The queries of a row tile, from global to shared memory.
#pragma once

#include "attention/sequence.cuh"
#include "attention/tile_layout.cuh"

namespace flashspark {

// Copies the CTA's queries to T::QueryLayout at `to`; rows past the sequence and columns past the head become 0. With
// T::Mma::kAsyncQueries the copies are in flight when it returns, and belong to the group that is committed next.
template <class T>
FLASHSPARK_DEVICE void copy_queries(const typename T::Arguments &a, const RowTile &row_tile, ptx::SharedAddress to) {
  const int32_t thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t row = thread / T::kQueryThreads, chunk = thread % T::kQueryThreads;
  const auto *q = static_cast<const typename T::Element *>(a.q);
  if (a.cu_seqlens_q == nullptr) q += row_tile.seq * a.q_strides.batch;
  FLASHSPARK_UNROLL
  for (int32_t pass = 0; pass < T::kMaxRows / T::kQueryPassRows; ++pass) {
    if (T::kRuntimeKeyGroups && pass * T::kQueryPassRows >= T::rows(a)) break;
    const int32_t tile_row = pass * T::kQueryPassRows + row;
    const bool in_use = row_tile.first_row + tile_row < row_tile.end_row;
    const Quotient at = divide(in_use ? row_tile.first_row + tile_row : 0, a.group);
    const int64_t head = row_tile.head_kv * static_cast<int64_t>(a.group.value) + at.remainder;
    const auto *from = q + (row_tile.q_row + at.quotient) * a.q_strides.token + head * a.q_strides.head + chunk * 8;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::QueryLayout::kChunks / T::kQueryThreads; ++n) {
      const bool valid = in_use && (chunk + n * T::kQueryThreads) * 8 < a.head_dim;
      T::Mma::template copy_query_chunk<T>(a, to, tile_row, chunk, n * T::kQueryThreads, from, valid);
    }
  }
}

}  // namespace flashspark
