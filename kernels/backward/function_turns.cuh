// Turns (turns.cuh) of kernels with the user's functions: any tiles of keys may visit a group of blocks of rows, as the
// user's lists have it, so that a CTA looks for the last one before it that does.
#pragma once

#include "backward/function_walk.cuh"
#include "backward/scores.cuh"

namespace flashspark {

template <class T>
struct FunctionTurns {
  static constexpr int32_t kBlocks = 128 / T::kRows;  // as there
  const BackwardArguments &a;
  SequenceMask mask;
  int32_t tile, tiles;  // of the sequence
  int32_t tokens, first_block;

  static FLASHSPARK_DEVICE bool same_group(const RowWalk &x, const RowWalk &y) {
    return x.head == y.head && x.block / kBlocks == y.block / kBlocks;
  }
  // Whether the CTA with such keys adds to one of the group's blocks.
  FLASHSPARK_DEVICE bool visits(const SequenceBlocks &lists, int32_t other, int32_t head, int32_t group) const {
    const int32_t first_key = other * T::kKeys, last_key = min_of(first_key + T::kKeys, mask.end) - 1;
    if (other >= tiles || first_key > last_key) return false;
    const Interval all = visited_blocks<T, T::kNativeScores>(a, mask, first_key, tokens);
    const int32_t begin = max_of(all.begin, group * kBlocks) * T::kRows;
    const int32_t end = min_of(min_of(all.end, (group + 1) * kBlocks) * T::kRows, tokens);
    if (begin >= end) return false;
    if constexpr (!T::kBlockSparse) return true;
    for (int32_t q = lists.query_block(begin); q <= lists.query_block(end - 1); ++q) {
      for (int32_t k = lists.key_block(first_key); k <= lists.key_block(last_key); ++k) {
        if (lists.at(head, q, k) != kUnlisted) return true;
      }
    }
    return false;
  }
  FLASHSPARK_DEVICE int32_t *turn_at(const RowWalk &at) const {
    return a.dq_turns + static_cast<int64_t>(at.head) * a.num_row_blocks + first_block + at.block / kBlocks;
  }
  // Before a barrier behind which the CTA adds to the block, the first that it visits of its group.
  FLASHSPARK_DEVICE void wait(const SequenceBlocks &lists, const RowWalk &at) const {
    if (a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != T::kWarps - 1) return;
    int32_t last = 0;
    FLASHSPARK_NO_UNROLL
    for (int32_t base = tile + 1; base < tiles && last == 0; base += 32) {
      const uint32_t found = ptx::ballot(visits(lists, base + ptx::lane(), at.head, at.block / kBlocks));
      if (found != 0) last = tiles - base - static_cast<int32_t>(ptx::lowest_bit(found));
    }
    ptx::wait_until_at_least(turn_at(at), last);
    ptx::warp_barrier();
  }
  // Behind a barrier before which the CTA has added to the last that it visits of it.
  FLASHSPARK_DEVICE void pass(const RowWalk &at) const {
    if (a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != 0) return;
    ptx::raise_in_memory_if(ptx::lane() == 0, turn_at(at), tiles - tile);
  }
};

}  // namespace flashspark
