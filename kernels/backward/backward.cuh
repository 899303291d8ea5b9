// The backward pass of attention: dK and dV of a CTA's keys, summed in registers over the rows of all query heads that
// share them, and what these keys add to dQ. A warp owns some of the keys and computes scores a key a row, so that
// probabilities and their gradients stay in registers; only dS^T passes through shared memory, to be multiplied with
// the keys of all warps.
//
//   for each block of rows                            barrier: Q and dO are here, all are done with dS^T
//     S^T = K Q^T, dP^T = V dO^T      warp's keys     the next Q is copied meanwhile
//     P^T, dS^T                       registers
//     dV += P^T dO, dK += dS^T Q      registers       barrier: dS^T is here, all are done with dO
//     dQ += dS K                      all keys        the next dO is copied meanwhile
//
// Where all of this has two stages in shared memory (RowStages::all), dQ is computed one block later, and the second
// barrier is not needed; pair_block.cuh has the order in which whole blocks do it.
#pragma once

#include "backward/dropout_pairs.cuh"
#include "backward/epilogue.cuh"
#include "backward/modifications.cuh"
#include "backward/row_loop.cuh"
#include "backward/walk_turns.cuh"

namespace flashspark {

template <class T>
struct BackwardLoop : RowLoop<T, BackwardArguments> {
  using Base = RowLoop<T, BackwardArguments>;
  using Base::a, Base::first_key, Base::first_padded_row, Base::q, Base::dout, Base::shared, Base::lane, Base::keys,
      Base::values, Base::dk, Base::dv;
  using Base::copy_queries, Base::copy_dout, Base::add_to_dq, Base::ready, Base::done, Base::summed,
      Base::begin_barriers, Base::arrive_ready, Base::padded_row;
  using Base::queries, Base::douts, Base::dscores, Base::rows, Base::row_values, Base::kept, Base::warp_key;

  BackwardMask<T> mask;
  PhiloxKey dropout_key;
  TurnsOf<T> turns;
  float slope_sum;  // of the head's gradient of alibi_slopes

  FLASHSPARK_DEVICE void draw(const RowWalk &at, int32_t stage) {
    if constexpr (T::kDropout) {
      BlockDraw<T> draw{};
      draw.set(*this, at.head, at.block * T::kRows, stage);
      draw.all();
    } else if constexpr (T::kNative) {
      if (a.dropout.scale != 1.0f) draw_kept<T>(a, dropout_key, mask.of.seq, first_key, at, kept(stage));
    }
  }

  // What kScoreRows rows of a block add to dK and dV; dS^T goes to shared memory.
  FLASHSPARK_DEVICE void add_rows(const RowWalk &at, int32_t stage, int32_t first_row) {
    const int32_t token = at.block * T::kRows + first_row;
    const ptx::SharedAddress q_rows = queries(stage) + first_row * T::KeyLayout::kPitch;
    const ptx::SharedAddress dout_rows = douts(stage) + first_row * T::ValueLayout::kPitch;
    const ptx::SharedAddress lse = row_values(stage, first_row), delta = lse + T::kRows * 4;
    ScoreTile<T> scores{}, gradients{};
    ScoreOperand<T> p{}, ds{};
    const Interval visited = mask.visited(warp_key(), T::kWarpKeys), unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    if (token < visited.end && token + T::kScoreRows > visited.begin && any_row_keeps<T>(mask, warp_key(), token)) {
      score_product<T, typename T::KeyLayout>(scores, keys, shared, q_rows, lane);
      if (token < unmasked.begin || token + T::kScoreRows > unmasked.end)
        mask_score_tile(scores, mask, warp_key(), token);
      if constexpr (!T::kNative) begin_with_delta<T>(gradients, delta);
      score_product<T, typename T::ValueLayout>(gradients, values, shared + T::kMemory.values, dout_rows, lane);
      if constexpr (T::kNative) {
        NativeScores<T> mod(a, mask.of, at.head, warp_key(), token);
        modified_scores(mod, scores, gradients, lse, delta, kept(stage), first_row, p, ds);
        slope_sum += mod.slope_sum;
      } else {
        scores_to_probabilities(scores, a.scale_log2, lse);
        pack_scores(p, scores);
        FLASHSPARK_UNROLL
        for (int32_t m = 0; m < T::kMAtoms; ++m) {
          FLASHSPARK_UNROLL
          for (int32_t n = 0; n < T::kScoreRows / 2; ++n) gradients.at[m][n / 4][n % 4] *= scores.at[m][n / 4][n % 4];
        }
        pack_scores(ds, gradients);
      }
      store_scores(ds, dscores(stage), lane.score_store, first_row);
      gradient_product<T, typename T::ValueLayout>(dv, p, dout_rows, lane);
      gradient_product<T, typename T::KeyLayout>(dk, ds, q_rows, lane);
    } else {
      store_scores(ds, dscores(stage), lane.score_store, first_row);
    }
  }

  // The same by a pair of warps: one computes P^T and sums dV, the other one dP^T, and dS^T from both, and sums dK. P^T
  // passes from lane to lane through the words where dS^T then lies. A pair has `keys` as its operand, K or V, and its
  // sums in dk.
  FLASHSPARK_DEVICE void add_rows_of_pair(const RowWalk &at, int32_t stage, int32_t first_row) {
    const int32_t token = at.block * T::kRows + first_row;
    const bool values_summed = T::sums_values();
    const ptx::SharedAddress q_rows = queries(stage) + first_row * T::KeyLayout::kPitch;
    const ptx::SharedAddress dout_rows = douts(stage) + first_row * T::ValueLayout::kPitch;
    const ptx::SharedAddress lse = row_values(stage, first_row), delta = lse + T::kRows * 4;
    const ptx::SharedAddress to = dscores(stage);
    const int32_t pair = lane.warp_key / T::kWarpKeys, number = first_row / T::kScoreRows;
    ScoreTile<T> scores{};
    ScoreOperand<T> operand{};
    const Interval visited = mask.visited(warp_key(), T::kWarpKeys), unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    if (token >= visited.end || token + T::kScoreRows <= visited.begin || !any_row_keeps<T>(mask, warp_key(), token)) {
      if (!values_summed) store_scores(operand, to, lane.score_store, first_row);
      return;
    }
    if (!values_summed) begin_with_delta<T>(scores, delta);
    score_product<T, typename T::KeyLayout>(scores, keys, shared, values_summed ? q_rows : dout_rows, lane);
    if (values_summed) {
      if (token < unmasked.begin || token + T::kScoreRows > unmasked.end)
        mask_score_tile(scores, mask, warp_key(), token);
      scores_to_probabilities(scores, a.scale_log2, lse);
      pack_scores(operand, scores);
      store_scores(operand, to, lane.score_store, first_row);
      ptx::pair_arrive(pair, number);
    } else {
      ptx::pair_wait(pair, number);  // P^T is here
      multiply_by_stored(scores, to, lane.score_store, first_row);
      pack_scores(operand, scores);
      store_scores(operand, to, lane.score_store, first_row);
    }
    gradient_product<T, typename T::KeyLayout>(dk, operand, values_summed ? dout_rows : q_rows, lane);
  }

  FLASHSPARK_DEVICE void add_block(const RowWalk &at, int32_t stage) {
    FLASHSPARK_NO_UNROLL
    for (int32_t row = 0; row < T::kRows; row += T::kScoreRows) {
      if constexpr (T::kDropout) {
        if (ptx::uniform(T::sums_values()) != 0) {
          add_dropout_rows<true>(*this, at, stage, row);
        } else {
          add_dropout_rows<false>(*this, at, stage, row);
        }
      } else if constexpr (T::kPaired) {
        add_rows_of_pair(at, stage, row);
      } else {
        add_rows(at, stage, row);
      }
    }
    if constexpr (T::kNative) {
      if (at.is_last_of_head()) store_slope_sum<T>(a, at.head, slope_sum);
    }
  }

  // K and V are in flight. A loop with turns stands beside the other one, which has no registers for them, or is of
  // another kernel.
  FLASHSPARK_DEVICE void run(const WalkOf<T> &at, int32_t count) {
    if (Turns<T>::are_taken(a)) {
      run<true>(at, count);
    } else {
      run<false>(at, count);
    }
  }

  template <bool in_turn>
  FLASHSPARK_DEVICE void run(const WalkOf<T> &at, int32_t count) {
    copy_queries(at, 0);
    copy_dout(at, 0);
    ptx::cp_async_commit();
    if constexpr (T::kNative) draw(at, 0);
    ptx::cp_async_wait<1>();
    ptx::cta_barrier();  // K and V are here
    if constexpr (T::kPaired) {
      load_key_operand<T, typename T::KeyLayout>(keys, T::sums_values() ? shared : shared + T::kMemory.values, lane);
    } else {
      load_key_operand<T, typename T::KeyLayout>(keys, shared, lane);
      load_key_operand<T, typename T::ValueLayout>(values, shared + T::kMemory.values, lane);
    }
    if constexpr (T::kHasWalks) {
      run_walk(at, count);
    } else if constexpr (T::kStages == RowStages::all) {
      run_whole_blocks<in_turn>(at, count);
    } else {
      run_phases<in_turn>(at, count);
    }
  }

  // A block's scores, then its dQ.
  template <bool in_turn>
  FLASHSPARK_DEVICE void run_phases(RowWalk at, int32_t count) {
    FLASHSPARK_NO_UNROLL
    for (int32_t left = count, stage = 0; left > 0; --left, stage = 1 - stage) {
      const RowWalk next = at.next();
      const bool has_next = left > 1;
      ptx::cp_async_wait<0>();
      ptx::cta_barrier();  // Q and dO are here; all are done with dS^T and the other stage, and have V in registers
      if (in_turn && left < count) turns.pass(at.previous());
      if (T::kStages != RowStages::one && has_next) copy_queries(next, 1 - stage);
      ptx::cp_async_commit();
      add_block(at, stage);
      if (has_next) draw(next, 1 - stage);
      if constexpr (in_turn) turns.wait(mask, at);
      ptx::cta_barrier();  // dS^T is here; all are done with dO
      if (has_next) {
        if constexpr (T::kStages == RowStages::one) copy_queries(next, 1 - stage);
        copy_dout(next, 1 - stage);
      }
      ptx::cp_async_commit();
      if (a.dq_sum != nullptr) add_to_dq(at, stage);
      at = next;
    }
    if constexpr (in_turn) pass_last(at.previous());
  }

  FLASHSPARK_DEVICE void pass_last(const RowWalk &added) const {
    ptx::cta_barrier();  // all have added
    turns.pass(added);
  }

  // A block's scores and dQ of the one before; several whole blocks by add_whole_blocks(). Two mbarriers in place of a
  // barrier let a warp be most of a block ahead of another.
  // A CTA that comes here again calls invalidate_barriers() before.
  // By turns: all have added to the last but one when a block is ready, and none adds to a block before all are done
  // with it.
  template <bool in_turn>
  FLASHSPARK_DEVICE void run_whole_blocks(RowWalk at, int32_t count) {
    const bool values_summed = ptx::uniform(T::sums_values()) != 0;  // the compiler knows no uniform values otherwise
    begin_barriers();
    if constexpr (T::kDropout) draw(at, 0);
    arrive_ready();
    const BlockCopies<T> copies = block_copies<T>(a, q, dout, lane.thread);
    RowWalk last = at;
    int32_t stage = 0;
    FLASHSPARK_NO_UNROLL
    for (int32_t left = count; left >= 0;) {
      // A piece of a tile may end before the head does.
      int32_t whole = left > 1 && left < count && a.dq_sum != nullptr ? min_of(whole_blocks(at), left - 1) : 0;
      if constexpr (in_turn) {
        if (at.block == at.begin) whole = 0;
        ptx::mbarrier_wait(ready(), static_cast<uint32_t>(stage));
        if (left + 1 < count) turns.pass(last.previous());
      }
      if (whole > 0) {
        if (values_summed) {
          add_whole_blocks<true>(*this, copies, last, at, stage, whole, 0);
        } else {
          add_whole_blocks<false>(*this, copies, last, at, stage, whole, 0);
        }
        left -= whole, at.block += whole, stage ^= whole & 1;
        last = {at.begin, at.end, at.head, at.block - 1};
        continue;
      }
      const RowWalk next = at.next();
      if constexpr (!in_turn) ptx::mbarrier_wait(ready(), static_cast<uint32_t>(stage));
      ptx::mbarrier_wait(done(), static_cast<uint32_t>(1 - stage));
      if (left > 1) {
        copy_queries(next, 1 - stage);
        copy_dout(next, 1 - stage);
      }
      ptx::cp_async_commit();
      if (left < count && a.dq_sum != nullptr) add_to_dq(last, 1 - stage);
      if (T::kDropout && left > 1) ptx::mbarrier_arrive(summed());  // else none waits for it
      if (left > 0) {
        add_block(at, stage);
        if (T::kDropout && left > 1) {
          ptx::mbarrier_wait(summed(), static_cast<uint32_t>(stage));
          draw(next, 1 - stage);
        }
        arrive_ready();
        if constexpr (in_turn) turns.wait(mask, at);
        ptx::mbarrier_arrive(done());
      }
      --left, stage ^= 1;
      last = at;
      at = next;
    }
    if constexpr (in_turn) pass_last(last.previous());
  }

  // The same of a part of a walk. All turns are of whole turns' blocks, counted from its first block on.
  FLASHSPARK_DEVICE void run_walk(TurnWalk at, int32_t count) {
    const bool values_summed = ptx::uniform(T::sums_values()) != 0;
    begin_barriers();
    arrive_ready();
    const BlockCopies<T> copies = block_copies<T>(a, q, dout, lane.thread);
    FLASHSPARK_NO_UNROLL
    for (int32_t done_blocks = 0; done_blocks <= count;) {
      const int32_t left = count - done_blocks, stage = done_blocks % 2;
      const int32_t whole = left > 1 && done_blocks > 0 && a.dq_sum != nullptr ? min_of(whole_blocks(at), left - 1) : 0;
      if (whole > 0) {
        if (values_summed) {
          add_whole_blocks<true>(*this, copies, at, at, stage, whole, done_blocks);
        } else {
          add_whole_blocks<false>(*this, copies, at, at, stage, whole, done_blocks);
        }
        at.block += whole * at.step, done_blocks += whole;
        continue;
      }
      const TurnWalk next = at.next();
      ptx::mbarrier_wait(ready(), static_cast<uint32_t>(stage));
      if (done_blocks > 1) turns.pass(done_blocks - 2);
      ptx::mbarrier_wait(done(), static_cast<uint32_t>(1 - stage));
      if (left > 1) {
        copy_queries(next, 1 - stage);
        copy_dout(next, 1 - stage);
      }
      ptx::cp_async_commit();
      if (done_blocks > 0 && a.dq_sum != nullptr) {
        const auto sum = turns.row_of_sum(done_blocks - 1);
        add_to_dq(sum.row, 1 - stage, sum.sign);
      }
      if (left > 0) {
        add_block(at, stage);
        arrive_ready();
        turns.wait(done_blocks);
        ptx::mbarrier_arrive(done());
      }
      ++done_blocks;
      at = next;
    }
    ptx::cta_barrier();  // all have added
    turns.pass(count - 1);
  }

  // How many blocks from this one on are whole: all of their rows and the warp's keys see each other, and the next
  // block is of the same head and has all of its rows.
  FLASHSPARK_DEVICE int32_t whole_blocks(const RowWalk &at) const {
    const Interval unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    if (q.columns != T::kHeadDim || dout.columns != T::kHeadDimV || at.block * T::kRows < unmasked.begin) return 0;
    return min_of(min_of(at.end, q.tokens / T::kRows) - 1, unmasked.end / T::kRows) - at.block;
  }
  FLASHSPARK_DEVICE int32_t whole_blocks(const TurnWalk &at) const {
    if (at.step > 0) return min_of(whole_blocks(static_cast<const RowWalk &>(at)), at.following());
    const Interval unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    const bool is_whole = (at.block + 1) * T::kRows <= min_of(q.tokens, unmasked.end);
    if (q.columns != T::kHeadDim || dout.columns != T::kHeadDimV || !is_whole) return 0;
    return min_of(at.block + 1 - ceil_div(unmasked.begin, T::kRows), at.following());
  }
};

// All are done with the loop.
template <class T>
FLASHSPARK_DEVICE void invalidate_barriers(ptx::SharedAddress shared) {
  if (ptx::thread_index() != 0) return;
  ptx::mbarrier_invalidate(shared + T::kMemory.barriers);
  ptx::mbarrier_invalidate(shared + T::kMemory.barriers + 8);
  if constexpr (T::kDropout) ptx::mbarrier_invalidate(shared + T::kMemory.barriers + 16);
}

}  // namespace flashspark
