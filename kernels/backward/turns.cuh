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
  static constexpr int32_t kRows = T::kColumns && T::kInTurns ? 64 : 128;  // docs/experiments.md E112
  static constexpr int32_t kBlocks = T::kRows < kRows ? kRows / T::kRows : 1;
  static constexpr bool kUniform = T::kInTurns || T::kColumns;  // no branch is of single lanes

  // Tiles add to several sums of dq in turn: the one that has its turn before is so many tiles further.
  static constexpr int32_t kSums = T::kTile.dq_sums();
  // Which warp waits for turns, and which one passes them on: it sums dK with KeySharing::columns, so that none waits
  // for its P^T.
  static constexpr int32_t kWaitingWarp = T::kWarps - 1, kPassingWarp = T::kColumns && T::kInTurns ? 4 : 0;

  static FLASHSPARK_DEVICE bool are_taken(const BackwardArguments &a) {
    return T::kInTurns || T::kHasWalks || (T::kAsAsked && a.dq_turns != nullptr);
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
  // With KeySharing::columns the first block lies behind the only mbarrier, as 16 bytes here are for look().
  static FLASHSPARK_DEVICE ptx::SharedAddress kept_block() {
    return T::kColumns ? ptx::shared_memory() + T::kMemory.barriers + 8 : looked();
  }
  static FLASHSPARK_DEVICE ptx::SharedAddress looked() { return kept() + 16; }
  // Before the barrier behind which all begin.
  static FLASHSPARK_DEVICE void keep(const State &s) {
    if (ptx::thread_index() != 0) return;
    ptx::store_shared_8(kept(), static_cast<uint32_t>(s.tile), static_cast<uint32_t>(s.tiles));
    ptx::store_shared_8(kept() + 8, static_cast<uint32_t>(s.before.begin), static_cast<uint32_t>(s.before.end));
    ptx::store_shared_4(kept_block(), static_cast<uint32_t>(s.first_block));
  }
  FLASHSPARK_DEVICE State state() const {
    if constexpr (T::kNative && !T::kColumns) return own;
    uint32_t tiles[2], before[2];
    ptx::load_shared_8(tiles, kept());
    ptx::load_shared_8(before, kept() + 8);
    return {static_cast<int32_t>(tiles[0]),
            static_cast<int32_t>(tiles[1]),
            {static_cast<int32_t>(before[0]), static_cast<int32_t>(before[1])},
            static_cast<int32_t>(ptx::load_shared_4(kept_block()))};
  }

  // The last turn before this one at a group of blocks; 0: none is. Both ends of what tiles visit rise with the tile,
  // but for masks of kernels with ScoreMod::native.
  FLASHSPARK_DEVICE int32_t turn_before(const State &s, const BackwardMask<T> &mask, int32_t group) const {
    if (group >= s.before.begin && group < s.before.end) return s.tiles - s.tile - kSums;
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
    int32_t head = at.head;
    if (kSums > 1) head += s.tile % kSums * (a.num_heads_kv * static_cast<int32_t>(a.group.value));
    return a.dq_turns + static_cast<int64_t>(head) * a.num_row_blocks + s.first_block + at.block / kBlocks;
  }
  // Whether the block is the first or the last one of a turn.
  static FLASHSPARK_DEVICE bool begins(const RowWalk &at) { return at.block == at.begin || at.block % kBlocks == 0; }
  static FLASHSPARK_DEVICE bool ends(const RowWalk &at) {
    return at.is_last_of_head() || (at.block + 1) % kBlocks == 0;
  }
  // Before a barrier behind which the CTA adds to the block.
  FLASHSPARK_DEVICE void wait(const BackwardMask<T> &mask, const RowWalk &at) const {
    if constexpr (kUniform) {
      if (!begins(at) || a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != kWaitingWarp) return;
    } else {
      if (!begins(at) || ptx::warp() != kWaitingWarp) return;
    }
    const State s = state();
    const int32_t last = turn_before(s, mask, at.block / kBlocks);
    if (kUniform || ptx::lane() == 0) ptx::wait_until_at_least(turn_at(s, at), last);
    ptx::warp_barrier();
  }
  // The same where a turn begins within whole blocks: look() copies its number to shared memory beside a step's rows,
  // and wait_looked() reads it when they are here, so that no warp stands if the turn has come. What follows are
  // additions alone, which are sent behind that: it need not acquire.
  FLASHSPARK_DEVICE bool looks(const RowWalk &at) const {
    return at.block % kBlocks == 0 && a.dq_turns != nullptr && ptx::uniform(ptx::warp()) == kWaitingWarp;
  }
  FLASHSPARK_DEVICE void look(const RowWalk &at) const {
    if (!looks(at)) return;
    const auto from = reinterpret_cast<uint64_t>(turn_at(state(), at));
    if (ptx::lane() == 0) ptx::cp_async_16(looked(), reinterpret_cast<const void *>(from & ~uint64_t{15}));
  }
  FLASHSPARK_DEVICE void wait_looked(const BackwardMask<T> &mask, const RowWalk &at) const {
    if (!looks(at)) return;
    const State s = state();
    const int32_t *const from = turn_at(s, at);
    const int32_t last = turn_before(s, mask, at.block / kBlocks);
    ptx::warp_barrier();  // one lane has copied it
    const uint32_t place = static_cast<uint32_t>(reinterpret_cast<uint64_t>(from)) & 15;
    if (static_cast<int32_t>(ptx::uniform(ptx::load_shared_4(looked() + place))) < last)
      ptx::wait_until_at_least(from, last);
    ptx::warp_barrier();
  }
  // Behind a barrier before which the CTA has added to the block.
  FLASHSPARK_DEVICE void pass(const RowWalk &at) const {
    if constexpr (kUniform) {
      if (!ends(at) || a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != kPassingWarp) return;
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
