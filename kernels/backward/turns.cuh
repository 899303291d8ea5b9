// The order in which CTAs add to dq, with `deterministic`: the last keys first. A CTA waits for the one before it in
// this order, which is also that of their launch: so none waits for one that has not begun. Under a causal mask hardly
// any waits, since a tile of later keys begins with a later row and stays ahead. A turn is for a few blocks of rows, as
// it takes long to make additions known. One warp waits for all, before a barrier that they pass before they add, and
// one makes known what all have added, behind the next barrier (docs/experiments.md). Kernels with turns alone, and
// those with KeySharing::columns, do so without a branch of single lanes: ptxas has uniform registers where it knows
// that no lane goes another way.
#pragma once

#include "backward/scores.cuh"

namespace flashspark {

template <class T>
struct Turns {
  static constexpr int32_t kRows = 128;  // docs/experiments.md E96
  static constexpr int32_t kBlocks = T::kRows < kRows ? kRows / T::kRows : 1;
  static constexpr bool kUniform = T::kInTurns || T::kColumns;  // no branch is of single lanes

  static FLASHSPARK_DEVICE bool are_taken(const BackwardArguments &a) {
    return T::kInTurns || (T::kAsAsked && a.dq_turns != nullptr);
  }
  static FLASHSPARK_DEVICE Interval groups(Interval blocks) {
    const int32_t begin = blocks.begin / kBlocks;
    return {begin, is_empty(blocks) ? begin : ceil_div(blocks.end, kBlocks)};
  }
  // Of a CTA with such keys of its sequence; `before`: groups that the next tile visits, whose turn is before.
  struct State {
    int32_t tile, tiles;
    Interval before;
    int32_t first_block;  // the sequence's first among a head's blocks
  };
  const BackwardArguments &a;
  // Of kernels with ScoreMod::native; the others, and those with KeySharing::columns, have it in shared memory, as they
  // have no registers for it.
  State own;

  static FLASHSPARK_DEVICE ptx::SharedAddress kept() { return ptx::shared_memory() + T::kMemory.turns; }
  // Before the barrier behind which all begin.
  static FLASHSPARK_DEVICE void keep(const State &s) {
    if (ptx::thread_index() != 0) return;
    ptx::store_shared_8(kept(), static_cast<uint32_t>(s.tile), static_cast<uint32_t>(s.tiles));
    ptx::store_shared_8(kept() + 8, static_cast<uint32_t>(s.before.begin), static_cast<uint32_t>(s.before.end));
    ptx::store_shared_4(kept() + 16, static_cast<uint32_t>(s.first_block));
  }
  FLASHSPARK_DEVICE State state() const {
    if constexpr (T::kNative && !T::kColumns) return own;
    uint32_t tiles[2], before[2];
    ptx::load_shared_8(tiles, kept());
    ptx::load_shared_8(before, kept() + 8);
    return {static_cast<int32_t>(tiles[0]),
            static_cast<int32_t>(tiles[1]),
            {static_cast<int32_t>(before[0]), static_cast<int32_t>(before[1])},
            static_cast<int32_t>(ptx::load_shared_4(kept() + 16))};
  }

  // The last turn before this one at a group of blocks; 0: none is. Both ends of what tiles visit rise with the tile,
  // but for masks of kernels with ScoreMod::native.
  FLASHSPARK_DEVICE int32_t turn_before(const State &s, const BackwardMask<T> &mask, int32_t group) const {
    if (group >= s.before.begin && group < s.before.end) return s.tiles - s.tile - 1;
    if constexpr (T::kNative) {
      for (int32_t base = s.tile + 2; base < s.tiles; base += 32) {
        const int32_t other = base + ptx::lane(), tokens = mask.of.end - mask.of.shift;
        const Interval visited =
            other >= s.tiles ? Interval{0, 0} : groups(visited_blocks<T>(a, mask.of, other * T::kKeys, tokens));
        const uint32_t found = ptx::ballot(group >= visited.begin && group < visited.end);
        if (found != 0) return s.tiles - base - static_cast<int32_t>(ptx::lowest_bit(found));
      }
    }
    return 0;
  }

  // Memory has the last turn that is over; it only rises, so that sequences whose offsets overlap, and which share it,
  // make no CTA wait forever.
  FLASHSPARK_DEVICE int32_t *turn_at(const State &s, const RowWalk &at) const {
    return a.dq_turns + static_cast<int64_t>(at.head) * a.num_row_blocks + s.first_block + at.block / kBlocks;
  }
  // Whether the block is the first or the last one of a turn.
  static FLASHSPARK_DEVICE bool begins(const RowWalk &at) { return at.block == at.begin || at.block % kBlocks == 0; }
  static FLASHSPARK_DEVICE bool ends(const RowWalk &at) {
    return at.is_last_of_head() || (at.block + 1) % kBlocks == 0;
  }
  // Before a barrier behind which the CTA adds to the block.
  FLASHSPARK_DEVICE void wait(const BackwardMask<T> &mask, const RowWalk &at) const {
    if constexpr (kUniform) {
      if (!begins(at) || a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != T::kWarps - 1) return;
    } else {
      if (!begins(at) || ptx::warp() != T::kWarps - 1) return;
    }
    const State s = state();
    const int32_t last = turn_before(s, mask, at.block / kBlocks);
    if (kUniform || ptx::lane() == 0) ptx::wait_until_at_least(turn_at(s, at), last);
    ptx::warp_barrier();
  }
  // Behind a barrier before which the CTA has added to the block.
  FLASHSPARK_DEVICE void pass(const RowWalk &at) const {
    if constexpr (kUniform) {
      if (!ends(at) || a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != 0) return;
      const State s = state();
      ptx::raise_in_memory_if(ptx::lane() == 0, turn_at(s, at), s.tiles - s.tile);
    } else {
      if (!ends(at) || ptx::thread_index() != 0) return;
      const State s = state();
      ptx::raise_in_memory(turn_at(s, at), s.tiles - s.tile);
    }
  }
};

}  // namespace flashspark
