// The order in which CTAs add to dq, with `deterministic`: that of their keys. Each warp of a CTA has its own part of a
// block's dQ and waits for the same warp of the CTA before, so that no CTA waits for another as a whole. A CTA waits
// for such as begin before it alone, and all walk over rows from the last block on: under a causal mask the first tile
// of keys, for which all others wait, then never waits for rows that it sees alone.
#pragma once

#include "backward/scores.cuh"

namespace flashspark {

template <class T>
struct Turns {
  const BackwardArguments &a;
  int32_t tile;     // number of the CTA's keys among the tiles of the sequence
  Interval before;  // blocks of rows that the tile before visits

  // Number of the last of the tiles before that visits the block, plus 1; 0: none. Ends of what tiles visit rise with
  // the tile, but for masks of kernels with ScoreMod::native.
  FLASHSPARK_DEVICE int32_t last_visitor(const BackwardMask<T> &mask, int32_t block) const {
    if (block >= before.begin && block < before.end) return tile;
    if constexpr (T::kNative) {
      for (int32_t base = tile - 2; base >= 0; base -= 32) {
        const int32_t other = base - ptx::lane();
        const Interval visited =
            other < 0 ? Interval{0, 0} : visited_blocks<T>(a, mask.of, other * T::kKeys, mask.of.end - mask.of.shift);
        const uint32_t found = ptx::ballot(block >= visited.begin && block < visited.end);
        if (found != 0) return base - static_cast<int32_t>(ptx::lowest_bit(found)) + 1;
      }
    }
    return 0;
  }

  // The number of the last tile, plus 1, that has added to the warp's part of a block. block: of all of a head. It only
  // rises, so that offsets of sequences that overlap, which share it, make no CTA wait forever.
  FLASHSPARK_DEVICE int32_t *done(int32_t head, int32_t block) const {
    return a.dq_turns + (static_cast<int64_t>(head) * a.num_row_blocks + block) * T::kWarps + ptx::warp();
  }
  FLASHSPARK_DEVICE void wait(const BackwardMask<T> &mask, int32_t head, int32_t first_block, int32_t block) const {
    const int32_t last = last_visitor(mask, block);
    if (ptx::lane() == 0) ptx::wait_until_at_least(done(head, first_block + block), last);
    ptx::warp_barrier();
  }
  FLASHSPARK_DEVICE void pass(int32_t head, int32_t first_block, int32_t block) const {
    ptx::warp_barrier();  // all lanes have added
    if (ptx::lane() == 0) ptx::raise_in_memory(done(head, first_block + block), tile + 1);
  }
};

}  // namespace flashspark
