// Blocks of rows of Q and dO, and what preprocess has found of each row, from global to shared memory.
#pragma once

#include "attention/tile_layout.cuh"
#include "backward/blocks.cuh"

namespace flashspark {

// One tensor of the CTA's sequence; `data` is at token 0, head 0.
template <class T, class Layout, int32_t width>
struct RowLoader {
  using Element = typename T::Element;
  static constexpr int32_t kLoads = Layout::kChunks / T::kRowThreads;

  const Element *data;
  int64_t token_stride, head_stride;
  int32_t columns, tokens;

  // Rows past the sequence and columns past the head become 0.
  FLASHSPARK_DEVICE void copy(const RowWalk &at, ptx::SharedAddress to, uint32_t thread) const {
    const int32_t first = at.block * T::kRows;
    if (first + T::kRows <= tokens && columns == width) {
      copy_rows<true>(at, first, to, thread);
    } else {
      copy_rows<false>(at, first, to, thread);
    }
  }
  FLASHSPARK_DEVICE bool is_full(const RowWalk &at) const {
    return (at.block + 1) * T::kRows <= tokens && columns == width;
  }
  FLASHSPARK_DEVICE void copy_full(const RowWalk &at, ptx::SharedAddress to, uint32_t thread) const {
    copy_rows<true>(at, at.block * T::kRows, to, thread);
  }

 private:
  template <bool full>
  FLASHSPARK_DEVICE void copy_rows(const RowWalk &at, int32_t first, ptx::SharedAddress to, uint32_t thread) const {
    const auto row = static_cast<int32_t>(thread / T::kRowThreads),
               chunk = static_cast<int32_t>(thread % T::kRowThreads);
    // The part that all threads share is apart, for the uniform datapath.
    const Element *from = data + (at.head * head_stride + first * token_stride) + (row * token_stride + chunk * 8);
    to += Layout::offset(static_cast<uint32_t>(row), static_cast<uint32_t>(chunk));
    FLASHSPARK_UNROLL
    for (int32_t pass = 0; pass < ceil_div(T::kRows, T::kPassRows); ++pass, from += T::kPassRows * token_stride) {
      // More threads than a block has rows: the others have nothing to copy.
      if (T::kRows % T::kPassRows != 0 && pass * T::kPassRows + row >= T::kRows) break;
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kLoads; ++n) {
        const ptx::SharedAddress target = Layout::down(Layout::step(to, n * T::kRowThreads), pass * T::kPassRows);
        if constexpr (full) {
          ptx::cp_async_16(target, from + n * T::kRowThreads * 8);
        } else {
          const bool valid = first + pass * T::kPassRows + row < tokens && (chunk + n * T::kRowThreads) * 8 < columns;
          ptx::cp_async_16_or_zero(target, valid ? from + n * T::kRowThreads * 8 : data, valid);
        }
      }
    }
  }
};

template <class T>
using QueryLoader = RowLoader<T, typename T::KeyLayout, T::kHeadDim>;
template <class T>
using GradientLoader = RowLoader<T, typename T::ValueLayout, T::kHeadDimV>;

template <class Loader>
FLASHSPARK_DEVICE Loader make_row_loader(const BackwardArguments &a, const RowTile &rows, const void *data,
                                         const Strides &strides, int32_t columns) {
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : rows.seq * strides.batch;
  return {static_cast<const typename Loader::Element *>(data) + batch + rows.q_row * strides.token, strides.token,
          strides.head, columns, rows.seqlen_q};
}

// lse of a block, then delta, T::kRows floats each.
template <class T>
FLASHSPARK_DEVICE void copy_row_values(const BackwardArguments &a, int64_t row, ptx::SharedAddress to,
                                       uint32_t thread_index) {
  constexpr int32_t kVectors = T::kRows / 4;
  const auto thread = static_cast<int32_t>(thread_index);
  static_assert(2 * kVectors <= T::kThreads);
  if (thread >= 2 * kVectors) return;
  const float *from = thread < kVectors ? a.row_lse : a.row_delta;
  ptx::cp_async_16(to + thread * 16, from + row + thread % kVectors * 4);
}
template <class T>
FLASHSPARK_DEVICE void copy_row_values(const BackwardArguments &a, int32_t first_row, const RowWalk &at,
                                       ptx::SharedAddress to, uint32_t thread_index) {
  copy_row_values<T>(a, static_cast<int64_t>(at.head) * a.padded_rows + first_row + at.block * T::kRows, to,
                     thread_index);
}

}  // namespace flashspark
