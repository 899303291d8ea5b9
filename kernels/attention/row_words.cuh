// What the user's functions and dropout keep of each row of a row tile, in shared memory: word w of row r lies at word
// (w * kMaxRows + r), neighbouring rows in neighbouring banks.
#pragma once

#include "ptx/ptx.cuh"

namespace flashspark {

template <class T>
FLASHSPARK_DEVICE ptx::SharedAddress row_word(ptx::SharedAddress rows, int32_t word) {
  return rows + word * (T::kMaxRows * 4);
}

// Words [first, first + count) of row n of the lane; `rows` is at the warp's first row.
template <class T, int32_t first, int32_t count>
FLASHSPARK_DEVICE void load_row_words(ptx::SharedAddress rows, int32_t n, uint32_t (&words)[count + 1]) {
  FLASHSPARK_UNROLL
  for (int32_t word = 0; word < count; ++word)
    words[word] = ptx::load_shared_4(row_word<T>(rows, first + word) + (n / 2 * 16 + n % 2 * 8 + ptx::lane() / 4) * 4);
}

}  // namespace flashspark
