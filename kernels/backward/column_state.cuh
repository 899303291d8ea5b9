// What a warp of the column loop keeps from block to block.
#pragma once

#include "backward/scores.cuh"

namespace flashspark {

// Where the loop is: a block of rows, or the end; and where its steps lie in shared memory. What follows from a few
// numbers is found again each time: there are no registers for it.
struct ColumnWalk {
  RowWalk at;
  int32_t left, count;  // blocks from `at` on, and all
  int32_t now;          // slot of the rows of this step

  // Of the next step and of the step before.
  FLASHSPARK_DEVICE int32_t after() const { return now == 2 ? 0 : now + 1; }
  FLASHSPARK_DEVICE int32_t before() const { return 3 - now - after(); }
  // Stage of the block's lse and delta.
  FLASHSPARK_DEVICE int32_t values() const { return left % 2; }
};

// What a warp knows of its keys and rows, in shared memory, as there are no registers for it.
template <class T>
struct ColumnState {
  ptx::SharedAddress memory;
  const BackwardArguments &a;
  int32_t part;  // the warp's first key, of the CTA's

  FLASHSPARK_DEVICE void keep(const BackwardMask<T> &mask, int32_t first_key, int32_t first_padded_row, int32_t tokens,
                              PhiloxKey dropout_key) const {
    if (ptx::lane() == 0) {
      put(0, first_key, first_padded_row), put(1, tokens, 0);
      if constexpr (T::kNative) {
        put(2, mask.of.seq, mask.of.end), put(3, mask.of.shift, mask.of.causal);
        put(4, static_cast<int32_t>(mask.of.token_row), static_cast<int32_t>(dropout_key.low));
        put(5, static_cast<int32_t>(dropout_key.high), 0);
        put(6, mask.tokens.visited.begin, mask.tokens.visited.end);
        put(7, mask.tokens.unmasked.begin, mask.tokens.unmasked.end);
      } else {
        put(2, mask.low, mask.high), put(3, mask.end, 0);
      }
    }
    ptx::warp_barrier();
  }
  FLASHSPARK_DEVICE int32_t first_key() const { return get(0); }
  FLASHSPARK_DEVICE int32_t first_padded_row() const { return get(1); }
  FLASHSPARK_DEVICE int32_t tokens() const { return get(2); }
  FLASHSPARK_DEVICE int32_t warp_key() const { return first_key() + part; }
  FLASHSPARK_DEVICE PhiloxKey dropout_key() const {
    return {static_cast<uint32_t>(get(9)), static_cast<uint32_t>(get(10))};
  }
  FLASHSPARK_DEVICE BackwardMask<T> mask() const {
    if constexpr (T::kNative) {
      return {a, of(), {{get(12), get(13)}, {get(14), get(15)}}};
    } else {
      return {get(4), get(5), get(6)};
    }
  }
  FLASHSPARK_DEVICE SequenceMask of() const { return {get(4), 0, get(5), get(6), get(7) != 0, get(8)}; }

 private:
  FLASHSPARK_DEVICE void put(int32_t n, int32_t first, int32_t second) const {
    ptx::store_shared_8(memory + n * 8, static_cast<uint32_t>(first), static_cast<uint32_t>(second));
  }
  FLASHSPARK_DEVICE int32_t get(int32_t n) const {
    return ptx::uniform(static_cast<int32_t>(ptx::load_shared_4(memory + n * 4)));
  }
};

}  // namespace flashspark
