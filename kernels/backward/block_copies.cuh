// Copies of whole blocks of rows, one after another: a thread has no more to do than to add where a block begins.
#pragma once

#include "backward/products.cuh"
#include "backward/row_loader.cuh"

namespace flashspark {

// Where a block begins: numbers in q and dout, rows in scratch memory.
struct BlockPlace {
  int64_t q, dout, row;

  FLASHSPARK_DEVICE BlockPlace operator+(const BlockPlace &by) const {
    return {q + by.q, dout + by.dout, row + by.row};
  }
};

template <class T>
FLASHSPARK_DEVICE BlockPlace place_of(const BackwardArguments &a, const QueryLoader<T> &q,
                                      const GradientLoader<T> &dout, int32_t first_row, const RowWalk &at) {
  const int64_t token = at.block * T::kRows, head = at.head;
  return {head * q.head_stride + token * q.token_stride, head * dout.head_stride + token * dout.token_stride,
          head * a.padded_rows + first_row + token};
}

template <class T>
struct BlockCopies {
  using Element = typename T::Element;
  static constexpr int32_t kPasses = T::kRows / T::kPassRows;

  int64_t q_rows, dout_rows;  // from one pass to the next
  const Element *q, *dout;    // the thread's first numbers of token 0 of head 0
  const float *lse, *delta;
  uint32_t target;  // of the thread in a tile

  // To the next block.
  FLASHSPARK_DEVICE BlockPlace step() const { return {kPasses * q_rows, kPasses * dout_rows, T::kRows}; }

  FLASHSPARK_DEVICE void copy(const BlockPlace &place, ptx::SharedAddress queries, ptx::SharedAddress douts,
                              ptx::SharedAddress rows, uint32_t thread, int32_t warp) const {
    constexpr uint32_t kVectors = T::kRows / 4;
    copy_tile(q + place.q, q_rows, queries + target);
    copy_tile(dout + place.dout, dout_rows, douts + target);
    if constexpr (T::kDropout) {  // of a warp, whose number is uniform, they have one that is, and no thread keeps any
      const float *const from = warp == 0 ? lse : delta;
      const uint32_t lane = (T::kKeepsAddresses ? thread : ptx::unknown(thread)) % 32;
      if (warp < 2 && lane < kVectors)
        ptx::cp_async_16(rows + warp * (T::kRows * 4) + lane * 16, from + place.row + lane * 4);
      return;
    }
    // One warp copies lse, the next one delta: for the thread alone they have no addresses.
    if (thread < kVectors) {
      ptx::cp_async_16(rows + thread * 16, lse + place.row + thread * 4);
    } else if (thread - 32 < kVectors) {
      ptx::cp_async_16(rows + T::kRows * 4 + (thread - 32) * 16, delta + place.row + (thread - 32) * 4);
    }
  }

 private:
  static FLASHSPARK_DEVICE void copy_tile(const Element *from, int64_t rows, ptx::SharedAddress to) {
    using Layout = typename T::KeyLayout;
    FLASHSPARK_UNROLL
    for (int32_t pass = 0; pass < kPasses; ++pass) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < Layout::kChunks / T::kRowThreads; ++n)
        ptx::cp_async_16(Layout::down(Layout::step(to, n * T::kRowThreads), pass * T::kPassRows),
                         from + pass * rows + n * T::kRowThreads * 8);
    }
  }
};

// On sm_120f ptxas spills what it has to keep, and computes it again with less.
template <class T>
FLASHSPARK_DEVICE uint32_t keep_address(uint32_t x) {
  return T::kKeepsAddresses ? keep_in_register(x) : x;
}
template <class T, class Pointer>
FLASHSPARK_DEVICE Pointer *keep_address(Pointer *p) {
  const auto bits = reinterpret_cast<uint64_t>(p);
  const uint64_t upper = keep_address<T>(static_cast<uint32_t>(bits >> 32));
  return reinterpret_cast<Pointer *>(upper << 32 | keep_address<T>(static_cast<uint32_t>(bits)));
}

template <class T>
FLASHSPARK_DEVICE BlockCopies<T> block_copies(const BackwardArguments &a, const QueryLoader<T> &q,
                                              const GradientLoader<T> &dout, uint32_t thread) {
  const uint32_t row = thread / T::kRowThreads, chunk = thread % T::kRowThreads;
  return {T::kPassRows * q.token_stride,
          T::kPassRows * dout.token_stride,
          keep_address<T>(q.data + row * q.token_stride + chunk * 8),
          keep_address<T>(dout.data + row * dout.token_stride + chunk * 8),
          a.row_lse,
          a.row_delta,
          keep_address<T>(T::KeyLayout::offset(row, chunk))};
}

}  // namespace flashspark
