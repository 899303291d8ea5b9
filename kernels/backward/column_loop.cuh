// The main loop where warps share out the columns of dK and dV (KeySharing::columns), as heads of 192 and 256 columns
// need it. Two warps have the same 16 keys: one computes P^T of them and sums dV, the other one dS^T and dK.
//
//   for each step of 16 rows                             the next step's Q and dO are copied meanwhile
//     dQ += dS K of two steps before                     all keys
//     wait for step_done() of the step before
//     S^T = K Q^T, dP^T = V dO^T                         warp's keys
//     dV += P^T dO, dK += dS^T Q of the step before      all keys, warp's columns; beside it P^T, dS^T of this step
//     arrive at step_done()
//
// What a warp adds to dQ holds up what it then reads of shared memory. All that this needs has been there for a step,
// so that it fills the time in which warps wait for each other.
#pragma once

#include "backward/column_products.cuh"
#include "backward/column_state.cuh"
#include "backward/modifications.cuh"
#include "backward/row_loader.cuh"
#include "backward/turns.cuh"

namespace flashspark {

template <class T>
struct ColumnLoop {
  using Element = typename T::Element;
  using Layout = typename T::KeyLayout;
  static constexpr int32_t kStep = T::kScoreRows, kBlockSteps = 2;
  static constexpr int32_t kLateBlocks = 2;                              // so late all have added to dq of a block
  static constexpr int32_t kRowBytes = kStep * Layout::kPitch;           // of Q or dO of a step
  static constexpr int32_t kScoreBytes = T::kKeys * StepLayout::kPitch;  // of P^T or dS^T
  static constexpr int32_t kRowThreads = T::kThreads / 2 / kStep;
  // Beside which columns of dV and dK P^T and dS^T of the next step are computed, and P^T waited for.
  static constexpr int32_t kProbabilitiesAfter = 0, kWaitBefore = T::kGradientColumns / 16 - 2,
                           kDscoresAfter = kWaitBefore;
  static_assert(T::kRows == kBlockSteps * kStep && T::kMAtoms == 1 && kRowThreads == Layout::kGroup);

  const BackwardArguments &a;
  ptx::SharedAddress shared;
  int32_t warp;  // uniform
  Turns<T> turns;
  ColumnLane<T> lane;
  // What the thread copies next, of Q in half of the warps, of dO in the other half; and where to in a slot.
  const Element *from;
  ptx::SharedAddress to;

  KeyOperand<T, T::kHeadDim, true> keys = {};  // or values
  ColumnGradient<T> gradient = {};
  float slope_sum = 0;  // of the head's gradient of alibi_slopes

  FLASHSPARK_DEVICE bool values_summed() const { return (warp % 2 == 0) == (warp / 4 % 2 == 0); }
  FLASHSPARK_DEVICE int32_t pair() const { return warp / 2; }
  // 0, of which the compiler does not know it, and that both are the same: otherwise it would keep in registers, from
  // one half of a block to the other, where a lane reads.
  FLASHSPARK_DEVICE uint32_t nothing(int32_t half) const {
    return static_cast<uint32_t>((half == 0 ? a.num_seqs : a.num_heads_kv) >> 31);
  }
  FLASHSPARK_DEVICE bool copies_queries() const { return warp < T::kWarps / 2; }
  FLASHSPARK_DEVICE const Strides &strides() const { return copies_queries() ? a.q_strides : a.dout_strides; }

  FLASHSPARK_DEVICE ptx::SharedAddress queries(int32_t slot) const {
    return shared + T::kMemory.queries + slot * (2 * kRowBytes);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress douts(int32_t slot) const { return queries(slot) + kRowBytes; }
  FLASHSPARK_DEVICE ptx::SharedAddress probabilities(int32_t half) const {
    return shared + T::kMemory.probabilities + half * kScoreBytes;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress dscores(int32_t slot) const {
    return shared + T::kMemory.dscores + slot * kScoreBytes;
  }
  FLASHSPARK_DEVICE ColumnState<T> state() const {
    return {shared + T::kMemory.state + warp * kStateBytes, a, pair() * T::kWarpKeys};
  }
  // An mbarrier: all that the next step needs is here, P^T and dS^T of this one, too, and all are done with the rows of
  // the step before.
  FLASHSPARK_DEVICE ptx::SharedAddress step_done() const { return shared + T::kMemory.barriers; }
  FLASHSPARK_DEVICE ptx::SharedAddress rows(int32_t stage) const {
    return shared + T::kMemory.rows + stage * T::kMemory.row_stage;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress kept(int32_t stage) const {
    return shared + T::kMemory.kept + stage * T::kMemory.kept_stage;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress modified() const {
    return shared + T::kMemory.modified + pair() * kModifiedBytes;
  }
  // lse of the lane's first two rows of a step; delta lies T::kRows floats behind it.
  FLASHSPARK_DEVICE ptx::SharedAddress row_values(const ColumnWalk &w, int32_t half) const {
    return rows(w.values()) + half * (kStep * 4) + lane.score_store % 16 * 2;  // lane % 4 * 8
  }

  // The thread's row of a step, and its first chunk of 16 bytes.
  static FLASHSPARK_DEVICE int32_t copied_row() {
    return static_cast<int32_t>(ptx::thread_index()) / kRowThreads % kStep;
  }
  static FLASHSPARK_DEVICE int32_t copied_chunk() { return static_cast<int32_t>(ptx::thread_index()) % kRowThreads; }

  FLASHSPARK_DEVICE void copy_whole_step(int32_t slot) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < Layout::kChunks / kRowThreads; ++n)
      ptx::cp_async_16(Layout::step(to + slot * (2 * kRowBytes), n * kRowThreads), from + n * kRowThreads * 8);
    from += kStep * strides().token;
  }
  // Steps are copied in order, each of them once. Rows past the sequence and columns past the head become 0.
  FLASHSPARK_DEVICE void copy_step(int32_t half, const RowWalk &at, int32_t slot) {
    constexpr int32_t kLoads = Layout::kChunks / kRowThreads;
    const int32_t first = at.block * T::kRows + half * kStep;
    const int32_t columns = copies_queries() ? a.head_dim : a.head_dim_v;
    const ptx::SharedAddress target = to + slot * (2 * kRowBytes);
    const int32_t tokens = state().tokens();
    if (first + kStep <= tokens && columns == T::kHeadDim) {
      copy_whole_step(slot);
    } else {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < kLoads; ++n) {
        const bool valid = first + copied_row() < tokens && (copied_chunk() + n * kRowThreads) * 8 < columns;
        const void *any = a.q;
        ptx::cp_async_16_or_zero(Layout::step(target, n * kRowThreads), valid ? from + n * kRowThreads * 8 : any,
                                 valid);
      }
      from += kStep * strides().token;
    }
    if (half == 1 && at.is_last_of_head()) from += strides().head - (at.end - at.begin) * T::kRows * strides().token;
  }
  FLASHSPARK_DEVICE void copy_values(int32_t row, int32_t stage) const {
    if (warp != 0) return;
    ptx::warp_barrier();  // a branch, which the other warps do not take
    copy_row_values<T>(a, row, rows(stage), static_cast<uint32_t>(ptx::lane()));
  }

  FLASHSPARK_DEVICE void draw(const RowWalk &at, int32_t stage) const {
    if constexpr (T::kNative) {
      if (a.dropout.scale != 1.0f)
        draw_kept<T>(a, state().dropout_key(), state().of().seq, state().first_key(), at, kept(stage));
    }
  }

  // S^T or dP^T of a step; false where the warp's keys and the step's rows do not see each other, where zeros are all
  // there is.
  FLASHSPARK_DEVICE bool begin_scores(int32_t half, ScoreTile<T> &scores, const ColumnWalk &w) {
    const int32_t token = w.at.block * T::kRows + half * kStep;
    const BackwardMask<T> mask = state().mask();
    const int32_t key = state().warp_key();
    const Interval visited = mask.visited(key, T::kWarpKeys), unmasked = mask.unmasked(key, T::kWarpKeys);
    if (token >= visited.end || token + kStep <= visited.begin || !any_row_keeps<T>(mask, key, token)) {
      ScoreOperand<T> zeros{};
      store_scores(zeros, values_summed() ? probabilities(half) : dscores(w.now), lane);
      return false;
    }
    if (!T::kNative && !values_summed()) begin_with_delta<T>(scores, row_values(w, half) + T::kRows * 4);
    score_product(scores, keys, queries(w.now) + (values_summed() ? 0 : kRowBytes), lane.row_columns ^ nothing(half));
    if (values_summed() && (token < unmasked.begin || token + kStep > unmasked.end))
      mask_score_tile(scores, mask, key, token);
    return true;
  }
  // P^T from S^T.
  FLASHSPARK_DEVICE void end_probabilities(int32_t half, ScoreTile<T> &scores, const ColumnWalk &w) {
    ScoreOperand<T> operand{};
    if constexpr (T::kNative) {
      const SequenceMask of = state().of();
      const NativeScores<T> mod(a, of, w.at.head, state().warp_key(), w.at.block * T::kRows + half * kStep);
      modified_probabilities(mod, scores, row_values(w, half), kept(w.values()), half * kStep, modified(), operand);
    } else {
      scores_to_probabilities(scores, a.scale_log2, row_values(w, half));
      pack_scores(operand, scores);
    }
    store_scores(operand, probabilities(half), lane);
    ptx::pair_arrive(pair(), half);
  }
  // dS^T from dP^T and the other warp's P^T, which pair_wait() has waited for.
  FLASHSPARK_DEVICE void end_dscores(int32_t half, ScoreTile<T> &scores, const ColumnWalk &w) {
    ScoreOperand<T> operand{};
    if constexpr (T::kNative) {
      const SequenceMask of = state().of();
      NativeScores<T> mod(a, of, w.at.head, state().warp_key(), w.at.block * T::kRows + half * kStep);
      modified_gradients(mod, scores, row_values(w, half) + T::kRows * 4, kept(w.values()), half * kStep, modified(),
                         operand);
      slope_sum += mod.slope_sum;
    } else {
      multiply_by_stored(scores, probabilities(half), lane);
      pack_scores(operand, scores);
    }
    store_scores(operand, dscores(w.now), lane);
  }
  // dV or dK of the step before one of this half.
  template <class Before, class After>
  FLASHSPARK_DEVICE void add_gradient(int32_t half, const ColumnWalk &w, bool of_values, Before &&before,
                                      After &&after) {
    gradient_product(gradient, of_values ? probabilities(1 - half) : dscores(w.before()),
                     queries(w.before()) + (of_values ? kRowBytes : 0), lane, before, after);
  }
  // The same beside P^T or dS^T of this step.
  template <bool of_values>
  FLASHSPARK_DEVICE void add_gradient_beside(int32_t half, ScoreTile<T> &scores, const ColumnWalk &w) {
    const auto before = [&](int32_t n) {
      if (!of_values && n == kWaitBefore) ptx::pair_wait(pair(), half);
    };
    const auto after = [&](int32_t n) {
      if (n != (of_values ? kProbabilitiesAfter : kDscoresAfter)) return;
      if (of_values) {
        end_probabilities(half, scores, w);
      } else {
        end_dscores(half, scores, w);
      }
    };
    add_gradient(half, w, of_values, before, after);
  }
  // P^T or dS^T of the step, and dV or dK of the one before.
  FLASHSPARK_DEVICE void end_step(int32_t half, ScoreTile<T> &scores, const ColumnWalk &w, bool of_values, bool seen,
                                  bool gradient_left) {
    if (seen && of_values) end_probabilities(half, scores, w);
    if (gradient_left) {
      const auto nothing = [](int32_t) {};
      add_gradient(half, w, of_values, nothing, nothing);
    }
    if (seen && !of_values) {
      ptx::pair_wait(pair(), half);
      end_dscores(half, scores, w);
    }
  }

  // Of a block's first row in scratch memory, of which there are fewer than 2^31 on any device: the sums of one take
  // hundreds of bytes.
  FLASHSPARK_DEVICE int32_t padded_row(const RowWalk &at) const {
    return at.head * a.padded_rows + state().first_padded_row() + at.block * T::kRows;
  }
  // dQ of two steps before one of this half; last: the last block's row in scratch memory.
  FLASHSPARK_DEVICE void add_to_dq(int32_t half, const ColumnWalk &w, int32_t last) {
    ColumnSums<T> dq{};
    const int32_t part = warp ^ static_cast<int32_t>(nothing(half));
    query_product(dq, dscores(w.after()), shared, lane, part % 2);
    int64_t row = last + half * kStep;
    if (Turns<T>::kSums > 1) row += state().first_key() / T::kKeys % Turns<T>::kSums * a.dq_sum_rows;
    add_query_gradient(a.dq_sum + row * T::kHeadDim, dq, part);
  }
  // Whether a warp has a part of it.
  FLASHSPARK_DEVICE bool sums_queries(int32_t half) const {
    return ColumnSums<T>::kHalf || values_summed() == (half == 0);
  }

  // The block's step `half`, where it has one; and what is left to do of the steps before.
  FLASHSPARK_DEVICE void step(int32_t half, ColumnWalk &w) {
    const bool in_turn = Turns<T>::are_taken(a);
    const bool here = w.left > 0, has_last = w.left < w.count, gradient_left = half == 1 ? here : has_last;
    if (a.dq_sum != nullptr && has_last && sums_queries(half)) add_to_dq(half, w, padded_row(w.at.previous()));
    ptx::mbarrier_wait(step_done(), 1 - half);
    if (in_turn && half == 0 && w.left + 1 < w.count) turns.pass(w.at.previous().previous());
    if (half == 0) {
      if (here) copy_step(1, w.at, w.after());
    } else if (w.left > 1) {
      const RowWalk next = w.at.next();
      copy_step(0, next, w.after());
      copy_values(padded_row(next), 1 - w.values());
    }
    ptx::cp_async_commit();
    ScoreTile<T> scores{};
    const bool seen = here && begin_scores(half, scores, w);
    end_step(half, scores, w, values_summed(), seen, gradient_left);
    if (T::kNative && half == 1) {
      if (here && !values_summed() && w.at.is_last_of_head()) store_slope_sum<T>(a, w.at.head, slope_sum);
      if (w.left > 1) draw(w.at.next(), 1 - w.values());
    }
    // The next step's barrier, of which it is before, is before the first addition to this block.
    if (in_turn && half == 0 && here) turns.wait(state().mask(), w.at);
    ptx::cp_async_wait<0>();
    ptx::mbarrier_arrive(step_done());
    w.now = w.after();
  }

  // Makes a turn known that ends two blocks before. It takes about half of a step, and is in the middle of one: the
  // other warps have products to go on with before they wait for this one.
  FLASHSPARK_DEVICE void pass_turn(const RowWalk &at) const {
    if ((at.block - 1) % Turns<T>::kBlocks == 0) turns.pass({at.begin, at.end, at.head, at.block - 2});
  }

  // The same in whole blocks: all of their rows and the warp's keys see each other, and the next block is of the same
  // head and has all of its rows.
  template <bool of_values>
  FLASHSPARK_DEVICE void whole_step(int32_t half, ColumnWalk &w, int32_t last) {
    if (sums_queries(half)) add_to_dq(half, w, last);
    ptx::mbarrier_wait(step_done(), 1 - half);
    if (T::kInTurns && half == 0) turns.look(w.at);
    copy_whole_step(w.after());
    if (half == 1) copy_values(last + 2 * T::kRows, 1 - w.values());
    ptx::cp_async_commit();
    ScoreTile<T> scores{};
    if (!T::kNative && !of_values) begin_with_delta<T>(scores, row_values(w, half) + T::kRows * 4);
    score_product(scores, keys, queries(w.now) + (of_values ? 0 : kRowBytes), lane.row_columns ^ nothing(half));
    if (T::kInTurns && half == 0) pass_turn(w.at);
    if constexpr (T::kNative) {
      end_step(half, scores, w, of_values, true, true);
    } else {
      add_gradient_beside<of_values>(half, scores, w);
    }
    if (T::kNative && half == 1) draw({w.at.begin, w.at.end, w.at.head, w.at.block + 1}, 1 - w.values());
    ptx::cp_async_wait<0>();
    if (T::kInTurns && half == 0) turns.wait_looked(state().mask(), w.at);
    ptx::mbarrier_arrive(step_done());
    w.now = w.after();
  }
  template <bool of_values>
  FLASHSPARK_DEVICE void run_whole_blocks(ColumnWalk &w, int32_t count) {
    int32_t last = padded_row(w.at) - T::kRows;
    FLASHSPARK_NO_UNROLL
    for (const int32_t end = w.left - count; w.left > end; --w.left) {
      whole_step<of_values>(0, w, last);
      whole_step<of_values>(1, w, last);
      last += T::kRows;
      ++w.at.block;
    }
  }
  // How many blocks from w.at on are whole.
  FLASHSPARK_DEVICE int32_t whole_blocks(const ColumnWalk &w) const {
    const Interval unmasked = state().mask().unmasked(state().warp_key(), T::kWarpKeys);
    if (a.head_dim != T::kHeadDim || a.head_dim_v != T::kHeadDim || a.dq_sum == nullptr || w.at.block == w.at.begin ||
        w.at.block * T::kRows < unmasked.begin)
      return 0;
    // The turns that begin and end in whole blocks are all of this head.
    if (T::kInTurns && w.at.block < w.at.begin + kLateBlocks) return 0;
    return min_of(min_of(min_of(w.at.end, state().tokens() / T::kRows) - 1, unmasked.end / T::kRows) - w.at.block,
                  w.left - 1);
  }

  // How many of them have the turn that the block before has. The one before that may have been the last of another.
  FLASHSPARK_DEVICE int32_t whole_blocks_of_turn(const ColumnWalk &w) const {
    const int32_t whole = whole_blocks(w);
    if (whole <= 0 || Turns<T>::begins(w.at)) return 0;
    if (w.left + 1 < w.count) {
      ptx::mbarrier_wait(step_done(), 1);
      turns.pass(w.at.previous().previous());
    }
    return min_of(whole, Turns<T>::kBlocks - w.at.block % Turns<T>::kBlocks);
  }

  // K and V are in flight.
  FLASHSPARK_DEVICE void run(Interval blocks, int32_t first_head, int32_t count) {
    const RowWalk at{blocks.begin, blocks.end, first_head, blocks.begin};
    from += at.head * strides().head + at.block * T::kRows * strides().token;
    copy_step(0, at, 0);
    copy_values(padded_row(at), count % 2);
    ptx::cp_async_commit();
    draw(at, count % 2);
    ptx::cp_async_wait<1>();
    ptx::cta_barrier();  // K and V are here
    load_keys(values_summed() ? shared : shared + T::kMemory.values);
    if (ptx::thread_index() == 0) ptx::mbarrier_init(step_done(), T::kWarps);
    ptx::cp_async_wait<0>();
    ptx::cta_barrier();  // all have V in registers; the first rows are here, and the barrier
    ColumnWalk w{at, count, count, 0};
    FLASHSPARK_NO_UNROLL
    for (int32_t half = 0;; half = 1 - half) {
      if (half == 0) {
        const int32_t whole = !T::kInTurns && Turns<T>::are_taken(a) ? whole_blocks_of_turn(w) : whole_blocks(w);
        if (whole > 0) {
          if (values_summed()) {
            run_whole_blocks<true>(w, whole);
          } else {
            run_whole_blocks<false>(w, whole);
          }
        }
      }
      step(half, w);
      if (w.left == 0) break;
      if (half == 1) w.at = w.at.next(), --w.left;
    }
    if (a.dq_sum != nullptr && sums_queries(1)) add_to_dq(1, w, padded_row(w.at.previous()));
    if (Turns<T>::are_taken(a)) {
      ptx::cta_barrier();  // all have added
      turns.pass(w.at.previous());
    }
  }

 private:
  FLASHSPARK_DEVICE void load_keys(ptx::SharedAddress memory) {
    memory += pair() * T::kWarpKeys * Layout::kPitch;
    const uint32_t of_rows = T::Mma::template value_lane_offset<Layout>(static_cast<uint32_t>(ptx::lane()));
    FLASHSPARK_UNROLL
    for (int32_t d = 0; d < T::kHeadDim / 16; ++d)
      ptx::ldmatrix_x4(keys.at[0][d], memory + Layout::step(of_rows, 2 * d));
  }
};

template <class T>
FLASHSPARK_DEVICE ColumnLoop<T> make_column_loop(const BackwardArguments &a, const SequenceMask &mask,
                                                 const RowTile &rows, int32_t first_key, int32_t first_padded_row,
                                                 PhiloxKey dropout_key, const Turns<T> &turns) {
  using Loop = ColumnLoop<T>;
  const int32_t warp = ptx::uniform(ptx::warp()), row = Loop::copied_row(), chunk = Loop::copied_chunk();
  const auto q = make_row_loader<QueryLoader<T>>(a, rows, a.q, a.q_strides, a.head_dim);
  const auto dout = make_row_loader<GradientLoader<T>>(a, rows, a.dout, a.dout_strides, a.head_dim_v);
  const ptx::SharedAddress shared = ptx::shared_memory();
  Loop loop{a, shared, warp, turns, column_lane<T>(warp), nullptr, 0};
  loop.state().keep(backward_mask<T>(a, mask, first_key + warp / 2 * T::kWarpKeys), first_key, first_padded_row,
                    q.tokens, dropout_key);
  const bool of_queries = loop.copies_queries();
  loop.from = (of_queries ? q.data : dout.data) + row * loop.strides().token + chunk * 8;
  loop.to = keep_in_register((of_queries ? loop.queries(0) : loop.douts(0)) +
                             Loop::Layout::offset(static_cast<uint32_t>(row), static_cast<uint32_t>(chunk)));
  return loop;
}

}  // namespace flashspark
