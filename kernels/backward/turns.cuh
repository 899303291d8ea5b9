// The order in which CTAs add to dq, with `deterministic`: the last keys first. Each warp of a CTA has its own part of
// a block's dQ and waits for the same warp of the CTA before it in this order, which is also that of their launch: so
// none waits for one that has not begun. Under a causal mask hardly any waits, since a tile of later keys begins with a
// later row and stays ahead. A turn is for a few blocks of rows, as it takes long to make additions known.
#pragma once

#include "backward/scores.cuh"

namespace flashspark {

template <class T>
struct Turns {
  static constexpr int32_t kRows = 128;  // docs/experiments.md E96
  static constexpr int32_t kBlocks = T::kRows < kRows ? kRows / T::kRows : 1;

  const BackwardArguments &a;
  int32_t tile, tiles;  // the CTA's keys among those of the sequence
  Interval before;      // groups of kBlocks blocks that the next tile visits, whose turn is before
  int32_t *turn;        // of the warp's part of the group that it is adding to; NULL: none yet

  static FLASHSPARK_DEVICE Interval groups(Interval blocks) {
    const int32_t begin = blocks.begin / kBlocks;
    return {begin, is_empty(blocks) ? begin : ceil_div(blocks.end, kBlocks)};
  }
  // 0: of none.
  FLASHSPARK_DEVICE int32_t turn_of(int32_t number) const { return tiles - number; }

  // The last turn before this one at a group of blocks. Both ends of what tiles visit rise with the tile, but for masks
  // of kernels with ScoreMod::native.
  FLASHSPARK_DEVICE int32_t turn_before(const BackwardMask<T> &mask, int32_t group) const {
    if (group >= before.begin && group < before.end) return turn_of(tile + 1);
    if constexpr (T::kNative) {
      for (int32_t base = tile + 2; base < tiles; base += 32) {
        const int32_t other = base + ptx::lane(), tokens = mask.of.end - mask.of.shift;
        const Interval visited =
            other >= tiles ? Interval{0, 0} : groups(visited_blocks<T>(a, mask.of, other * T::kKeys, tokens));
        const uint32_t found = ptx::ballot(group >= visited.begin && group < visited.end);
        if (found != 0) return turn_of(base + static_cast<int32_t>(ptx::lowest_bit(found)));
      }
    }
    return 0;
  }

  // first_block: the sequence's first among a head's blocks. Memory has the last turn that is over; it only rises, so
  // that sequences whose offsets overlap, and which share it, make no CTA wait forever.
  FLASHSPARK_DEVICE void wait(const BackwardMask<T> &mask, int32_t head, int32_t first_block, int32_t block) {
    const int32_t group = block / kBlocks;
    int32_t *const next =
        a.dq_turns + (static_cast<int64_t>(head) * a.num_row_blocks + first_block + group) * T::kWarps + ptx::warp();
    if (next == turn) return;
    pass();
    turn = next;
    const int32_t last = turn_before(mask, group);
    if (ptx::lane() == 0) ptx::wait_until_at_least(turn, last);
    ptx::warp_barrier();
  }
  // The turn is over. It has been for a while, so that additions need not be waited for.
  FLASHSPARK_DEVICE void pass() {
    if (turn == nullptr) return;
    ptx::warp_barrier();  // all lanes have added
    if (ptx::lane() == 0) ptx::raise_in_memory(turn, turn_of(tile));
  }
};

}  // namespace flashspark
