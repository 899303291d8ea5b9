// Turns (turns.cuh) of CTAs with parts of walks. All that the loop needs of a turn lies in shared memory, in the order
// in which the CTA comes to its turns: whole blocks have no registers for more.
#pragma once

#include "backward/turns.cuh"
#include "backward/walks.cuh"

namespace flashspark {

template <class T>
struct WalkTurns {
  static constexpr int32_t kBlocks = kWalkTurnBlocks;
  static constexpr uint32_t kFirst = 1u << 31, kLast = 1u << 31;
  const BackwardArguments &a;

  // Of each turn of the piece: which of all turns it is; and how many CTAs have theirs before, and kLast where none has
  // it after. Of each block: the row of the sums, and kFirst where none has added to them before.
  static FLASHSPARK_DEVICE ptx::SharedAddress kept(int32_t turn) {
    return ptx::shared_memory() + T::kMemory.walk_turns + turn * 8;
  }
  static FLASHSPARK_DEVICE ptx::SharedAddress kept_row(int32_t block) {
    return ptx::shared_memory() + T::kMemory.walk_turns + kMostWalkTurns * 8 + block * 4;
  }
  // Before the barrier behind which all begin.
  static FLASHSPARK_DEVICE void keep(const BackwardArguments &a, const Piece &piece, const Interval &blocks) {
    const Walks<T> walks{a};
    const int32_t walk = walks.place().walk, heads = a.num_heads_kv * static_cast<int32_t>(a.group.value);
    FLASHSPARK_NO_UNROLL
    for (auto n = static_cast<int32_t>(ptx::thread_index()); n < (piece.end - piece.first) / kBlocks;
         n += T::kThreads) {
      const typename Walks<T>::Turn turn = walks.turn_of(piece, walk, blocks, n);
      const int32_t head = (turn.second ? heads : 0) + piece.tile.head_q + turn.head,
                    of_seq = piece.tile.seq * a.seq_row_blocks;
      const typename Walks<T>::Order order = walks.order_of(walk, blocks, turn);
      const int64_t of_sum = turn.second ? a.dq_sum_rows : 0, of_head = piece.tile.head_q + turn.head;
      const auto first_row = static_cast<uint32_t>(of_sum + of_head * a.padded_rows) +
                             static_cast<uint32_t>(of_seq + turn.number * kBlocks) * T::kRows;
      FLASHSPARK_UNROLL
      for (uint32_t b = 0; b < kBlocks; ++b)
        ptx::store_shared_4(
            kept_row(n * kBlocks + static_cast<int32_t>(b)),
            first_row + (turn.down ? kBlocks - 1 - b : b) * T::kRows + (order.before == 0 ? kFirst : 0));
      ptx::store_shared_8(kept(n), static_cast<uint32_t>(head * a.num_row_blocks + of_seq + turn.number),
                          static_cast<uint32_t>(order.before) + (order.is_last ? kLast : 0));
    }
  }

  // So many blocks after the piece's first one. Before a barrier behind which the CTA adds to the block.
  FLASHSPARK_DEVICE void wait(int32_t block) const {
    if (block % kBlocks != 0 || a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != T::kWarps - 1) return;
    uint32_t turn[2];
    ptx::load_shared_8(turn, kept(block / kBlocks));
    const uint32_t before = ptx::uniform(turn[1] % kLast);
    if (before == 0) return;
    ptx::wait_until_at_least(a.dq_turns + turn[0], static_cast<int32_t>(before));
    ptx::warp_barrier();
  }
  // Behind a barrier before which the CTA has added to the block.
  FLASHSPARK_DEVICE void pass(int32_t block) const {
    if (block % kBlocks != kBlocks - 1 || a.dq_turns == nullptr || ptx::uniform(ptx::warp()) != 0) return;
    uint32_t turn[2];
    ptx::load_shared_8(turn, kept(block / kBlocks));
    if (ptx::uniform(turn[1] / kLast) != 0) return;
    ptx::raise_in_memory_if(ptx::lane() == 0, a.dq_turns + turn[0], static_cast<int32_t>(turn[1]) + 1);
  }
  // The block's first row in scratch memory; of both sums of dq.
  struct SumRow {
    uint32_t row;
    int32_t sign;  // less than 0: none has added to it before
  };
  FLASHSPARK_DEVICE SumRow row_of_sum(int32_t block) const {
    const uint32_t word = ptx::load_shared_4(kept_row(block));
    return {word % kFirst, static_cast<int32_t>(word)};
  }
  FLASHSPARK_DEVICE int64_t row(int32_t block) const {
    const uint32_t row = row_of_sum(block).row, rows = static_cast<uint32_t>(a.dq_sum_rows);
    return row < rows ? row : row - rows;
  }
};

// What a kernel has of both, and of RowWalk and TurnWalk.
template <class T>
using TurnsOf = std::conditional_t<T::kHasWalks, WalkTurns<T>, Turns<T>>;
template <class T>
using WalkOf = std::conditional_t<T::kHasWalks, TurnWalk, RowWalk>;

}  // namespace flashspark
