// The backward pass with the user's functions and block lists: the loop of backward.cuh over those blocks of rows that
// the lists name, with scores that functions change. Of a pair of warps one computes P^T and sums dV. The other one
// gets P^T from it, where the instance's pairs hand it on (kHandsOn); else it computes all, but for dV, by itself.
#pragma once

#include "backward/backward.cuh"
#include "backward/function_blocks.cuh"
#include "backward/function_turns.cuh"
#include "backward/piece_rows.cuh"

namespace flashspark {

template <class T>
struct FunctionLoop : RowLoop<T, FunctionBackwardArguments> {
  using Base = RowLoop<T, FunctionBackwardArguments>;
  using Base::a, Base::first_key, Base::first_padded_row, Base::q, Base::dout, Base::shared, Base::lane, Base::keys,
      Base::values, Base::dk, Base::dv;
  using Base::copy_queries, Base::copy_dout, Base::add_to_dq, Base::ready, Base::done, Base::begin_barriers,
      Base::arrive_ready, Base::lies_in;
  using Base::queries, Base::douts, Base::dscores, Base::rows, Base::row_values, Base::kept, Base::warp_key;

  std::conditional_t<T::kNativeScores, RowMasks<T>, KeyMask> mask;
  FunctionRow row;  // of the sequence; h and q_idx are each row's own
  ListedWalk<T> walk;
  int32_t end_head;  // of the CTA
  PhiloxKey dropout_key;
  FunctionTurns<T> turns;
  CapturedSums<T> sums;
  float slope_sum;  // of the head's gradient of alibi_slopes, with kNativeScores

  FLASHSPARK_DEVICE ptx::SharedAddress words(int32_t stage) const {
    return shared + T::kMemory.words + stage * T::kMemory.word_stage;
  }
  FLASHSPARK_DEVICE void draw(const RowWalk &at, int32_t stage) {
    if constexpr (!T::kHandsOn) {
      if (a.dropout.scale != 1.0f) draw_kept<T>(a, dropout_key, row.b, first_key, at, kept(stage));
    }
  }

  // With two stages of words a warp that waits for P^T in any case writes them.
  FLASHSPARK_DEVICE void write_words(const RowWalk &at, int32_t stage) const {
    FunctionRow of_head = row;
    of_head.h = at.head;
    write_function_words<T>(a, of_head, at.block * T::kRows, words(stage));
  }

  // Of the lane's keys, which of the tile's rows keep them, counted from the lane's first row.
  FLASHSPARK_DEVICE Interval kept_rows(int32_t key, int32_t token) const {
    if constexpr (T::kNativeScores) {
      return {0, 0};  // FunctionNative::kept says it
    } else {
      const int32_t at = warp_key() + ptx::lane() / 4 + 8 * key, first = token + ptx::lane() % 4 * 2;
      if (at >= mask.end) return {0, 0};
      return {at + mask.low - first, min_of(at + mask.high, row.seqlen_q) - first};
    }
  }

  FLASHSPARK_DEVICE FunctionNative<T> native_scores(int32_t head, int32_t token) const {
    if constexpr (T::kNativeScores) {
      return {{a, mask.of, head, warp_key(), token}, native_kept(mask, warp_key(), token)};
    } else {
      return {};
    }
  }

  // What kScoreRows rows of a block add to dV, or to dK and dQ, or to all.
  template <bool of_values, bool of_keys>
  FLASHSPARK_DEVICE void add_function_rows(const ListedRows &at, int32_t stage, int32_t first_row) {
    const int32_t token = at.block * T::kRows + first_row;
    const ptx::SharedAddress q_rows = queries(stage) + first_row * T::KeyLayout::kPitch;
    const ptx::SharedAddress dout_rows = shared + T::kMemory.dout + first_row * T::ValueLayout::kPitch;
    const ptx::SharedAddress lse = rows(stage) + first_row * 4, to = dscores(stage);
    const Interval visited = mask.visited(warp_key(), T::kWarpKeys);
    ScoreOperand<T> p{}, ds{};
    const uint32_t listed = at.status(first_row / T::kScoreRows);
    if (listed == kUnlisted || token >= visited.end || token + T::kScoreRows <= visited.begin) {
      if constexpr (of_keys) store_scores(ds, to, lane.score_store, first_row);
      return;
    }
    if constexpr (T::kNativeScores) {
      if (!any_row_keeps<T>(mask, warp_key(), token)) {
        if constexpr (of_keys) store_scores(ds, to, lane.score_store, first_row);
        return;
      }
    }
    ScoreTile<T> scores{}, products{};
    score_product<T, typename T::KeyLayout>(scores, keys, shared, q_rows, lane);
    if constexpr (of_keys)
      score_product<T, typename T::ValueLayout>(products, values, shared + T::kMemory.values, dout_rows, lane);
    const FunctionTile tile{warp_key(),       first_row,   {kept_rows(0, token), kept_rows(1, token)},
                            listed != kWhole, lse,         lse + T::kRows * 4,
                            kept(stage),      words(stage)};
    FunctionNative<T> native = native_scores(at.head, token);
    function_scores<T, of_keys>(a, tile, scores, products, p, ds, sums, native);
    if constexpr (T::kNativeScores) slope_sum += native.of.slope_sum;
    if constexpr (of_keys) store_scores(ds, to, lane.score_store, first_row);
    // Of a pair both sums lie in dk.
    if constexpr (of_values && of_keys) {
      gradient_product<T, typename T::ValueLayout>(dv, p, dout_rows, lane);
    } else if constexpr (of_values) {
      gradient_product<T, typename T::ValueLayout>(dk, p, dout_rows, lane);
    }
    if constexpr (of_keys) gradient_product<T, typename T::KeyLayout>(dk, ds, q_rows, lane);
  }

  // The same by a pair of warps of which one hands on P^T, as in backward.cuh.
  FLASHSPARK_DEVICE void add_rows_of_pair(const ListedRows &at, int32_t stage, int32_t first_row) {
    const int32_t token = at.block * T::kRows + first_row;
    const bool values_summed = T::sums_values();
    const ptx::SharedAddress q_rows = queries(stage) + first_row * T::KeyLayout::kPitch;
    const ptx::SharedAddress dout_rows = douts(stage) + first_row * T::ValueLayout::kPitch;
    const ptx::SharedAddress lse = rows(stage) + first_row * 4 + lane.thread % 4 * 8, to = dscores(stage);
    const int32_t pair = lane.warp_key / T::kWarpKeys, number = first_row / T::kScoreRows;
    ScoreTile<T> scores{};
    ScoreOperand<T> operand{};
    const Interval visited = mask.visited(warp_key(), T::kWarpKeys), unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    const uint32_t listed = at.status(number);
    if (listed == kUnlisted || token >= visited.end || token + T::kScoreRows <= visited.begin) {
      if (!values_summed) store_scores(operand, to, lane.score_store, first_row);
      return;
    }
    const int32_t end = token + T::kScoreRows;
    const bool asks = T::Functions::Mask::kExists && listed != kWhole;
    const FunctionPairTile tile{
        warp_key(), token, first_row,   asks || token < unmasked.begin || end > min_of(unmasked.end, row.seqlen_q),
        asks,       lse,   words(stage)};
    if (values_summed) {
      begin_with_bias(a, tile, scores);
    } else {
      begin_with_delta<T>(scores, lse + T::kRows * 4);
    }
    score_product<T, typename T::KeyLayout>(scores, keys, shared, values_summed ? q_rows : dout_rows, lane);
    if (values_summed) {
      ScoreOperand<T> handed;
      pair_probabilities(a, mask, row.seqlen_q, tile, scores, operand, handed);
      store_scores(handed, to, lane.score_store, first_row);
      ptx::pair_arrive(pair, number);
    } else {
      ptx::pair_wait(pair, number);  // P^T is here
      multiply_by_stored(scores, to, lane.score_store, first_row);
      pack_scores(operand, scores);
      store_scores(operand, to, lane.score_store, first_row);
    }
    gradient_product<T, typename T::KeyLayout>(dk, operand, values_summed ? dout_rows : q_rows, lane);
  }

  FLASHSPARK_DEVICE void add_block(const ListedRows &at, int32_t stage) {
    FLASHSPARK_NO_UNROLL
    for (int32_t row = 0; row < T::kRows; row += T::kScoreRows) {
      if constexpr (T::kHandsOn) {
        add_rows_of_pair(at, stage, row);
      } else if constexpr (!T::kPaired) {
        add_function_rows<true, true>(at, stage, row);
      } else if (T::sums_values()) {
        add_function_rows<true, false>(at, stage, row);
      } else {
        add_function_rows<false, true>(at, stage, row);
      }
    }
  }

  // K and V are in flight, and block `at` is the first.
  FLASHSPARK_DEVICE void run(const ListedRows &at) {
    copy_queries(at, 0);
    copy_dout(at, 0);
    ptx::cp_async_commit();
    draw(at, 0);
    ptx::cp_async_wait<1>();
    ptx::cta_barrier();  // K and V are here
    if constexpr (T::kHandsOn) {
      load_key_operand<T, typename T::KeyLayout>(keys, T::sums_values() ? shared : shared + T::kMemory.values, lane);
    } else {
      load_key_operand<T, typename T::KeyLayout>(keys, shared, lane);
      load_key_operand<T, typename T::ValueLayout>(values, shared + T::kMemory.values, lane);
    }
    ptx::cta_barrier();  // all have V in registers, where words take its memory
    write_words(at, 0);
    if constexpr (T::kHandsOn) {
      run_whole_blocks(at);
    } else {
      run_phases(at);
    }
  }

  // A block's scores, then its dQ.
  FLASHSPARK_DEVICE void run_phases(ListedRows at) {
    RowWalk last{at.begin, at.end, end_head, at.begin};
    FLASHSPARK_NO_UNROLL
    for (int32_t stage = 0;; stage = 1 - stage) {
      const ListedRows next = walk.find(at.next());
      const bool has_next = next.head < end_head;
      ptx::cp_async_wait<0>();
      ptx::cta_barrier();  // Q, dO and the rows' words are here; all are done with dS^T and the other stage
      const bool next_turn = T::kInTurns && !FunctionTurns<T>::same_group(last, at);
      if (next_turn && last.head < end_head) turns.pass(last);
      if (T::kStages != RowStages::one && has_next) copy_queries(next, 1 - stage);
      ptx::cp_async_commit();
      add_block(at, stage);
      if (has_next) draw(next, 1 - stage);
      if (next_turn) turns.wait(walk.blocks, at);
      ptx::cta_barrier();  // dS^T is here; all are done with dO and the words
      if (has_next) {
        if constexpr (T::kStages == RowStages::one) copy_queries(next, 1 - stage);
        dout.copy(next, shared + T::kMemory.dout, lane.thread);
        write_words(next, 0);
      }
      ptx::cp_async_commit();
      if (a.dq_sum != nullptr) add_to_dq(at, stage);
      if (next.head != at.head) sums.end_head(a);
      if constexpr (T::kNativeScores) {
        if (next.head != at.head) store_slope_sum<T>(a, at.head, slope_sum);
      }
      if constexpr (T::kInTurns) last = at;
      if (!has_next) break;
      at = next;
    }
    if constexpr (T::kInTurns) {
      ptx::cta_barrier();  // all have added
      turns.pass(last);
    }
  }

  // Whether a block's scores are all of rows and keys that see each other; and whether any are.
  FLASHSPARK_DEVICE bool is_whole(const ListedRows &at) const {
    constexpr uint32_t kTiles = (1u << 2 * (T::kRows / T::kScoreRows)) - 1;
    const uint32_t wanted = T::Functions::Mask::kExists ? kTiles : kTiles & 0x55555555;
    return (at.statuses & wanted) == wanted && lies_in(at, unmasked_rows());
  }
  FLASHSPARK_DEVICE bool is_seen(const ListedRows &at) const { return at.statuses != 0 && lies_in(at, seen_rows()); }
  FLASHSPARK_DEVICE Interval unmasked_rows() const {
    const Interval unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    return {unmasked.begin, min_of(unmasked.end, row.seqlen_q)};
  }
  FLASHSPARK_DEVICE Interval seen_rows() const { return Base::seen_rows(mask); }
  // How many blocks from this one on, one at least, are whole, or seen, each but for the first one being followed by
  // one that the walk visits and that has all of its rows.
  FLASHSPARK_DEVICE int32_t run_of(const ListedRows &at, bool is_whole) const {
    const int32_t end = min_of(is_whole ? unmasked_rows().end : seen_rows().end, row.seqlen_q - T::kRows);
    return max_of(1, min_of(walk.run_of(at, is_whole), end / T::kRows - at.block));
  }
  // What add_listed_blocks() asks for.
  template <PairWork work>
  FLASHSPARK_DEVICE auto tile(const ListedRows &at, int32_t stage) const {
    if constexpr (work == PairWork::keys) {
      return PairTile<T, false>{};
    } else {
      FunctionScoreTile<T, work == PairWork::cut_values> tile{{}, a, warp_key(), words(stage), 0};
      tile.scale = T::Functions::Score::kIsBias ? bias_scale(a) * kLog2E : a.scale_log2;
      if constexpr (work == PairWork::cut_values) tile.kept = kept_scores(at, stage);
      return tile;
    }
  }
  FLASHSPARK_DEVICE uint32_t kept_scores(const ListedRows &at, int32_t stage) const {
    uint32_t kept = 0;
    const bool masks = !lies_in(at, unmasked_rows());
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kRows / T::kScoreRows; ++n) {
      const uint32_t listed = at.status(n);
      const int32_t first_row = n * T::kScoreRows;
      const FunctionPairTile tile{warp_key(),
                                  at.block * T::kRows + first_row,
                                  first_row,
                                  masks,
                                  T::Functions::Mask::kExists && listed != kWhole,
                                  0,
                                  words(stage)};
      if (listed != kUnlisted) kept |= flashspark::kept_scores<T>(a, mask, row.seqlen_q, tile) << 16 * n;
    }
    return kept;
  }

  // A block's scores and dQ of the one before, as in backward.cuh.
  FLASHSPARK_DEVICE void run_whole_blocks(ListedRows at) {
    const bool values_summed = ptx::uniform(T::sums_values()) != 0;
    begin_barriers();
    arrive_ready();  // a block's words are, too
    const BlockCopies<T> copies = block_copies<T>(a, q, dout, lane.thread);
    RowWalk last{at.begin, at.end, end_head, at.begin};
    int32_t stage = 0;
    FLASHSPARK_NO_UNROLL
    while (at.head < end_head || last.head < end_head) {
      // For ptxas, which spills them otherwise.
      at.head = ptx::uniform(at.head), at.block = ptx::uniform(at.block), stage = ptx::uniform(stage);
      last.head = ptx::uniform(last.head), last.block = ptx::uniform(last.block);
      int32_t blocks = values_summed && !is_whole(at) ? 1 : run_of(at, values_summed);
      ListedRows next = walk.find(at.next());
      const bool has_next = next.head < end_head, has_dq = last.head < end_head && a.dq_sum != nullptr;
      if (has_dq && has_next && q.is_full(next) && dout.is_full(next) && is_seen(at)) {
        if (!values_summed) {
          add_listed_blocks<PairWork::keys>(*this, copies, last, at, next, stage, blocks);
        } else if (is_whole(at)) {
          add_listed_blocks<PairWork::values>(*this, copies, last, at, next, stage, blocks);
        } else {
          add_listed_blocks<PairWork::cut_values>(*this, copies, last, at, next, stage, 1);
        }
        last = {at.begin, at.end, at.head, at.block + blocks - 1};
        if (blocks > 1) next = walk.find(last.next());
        at = next;
        stage ^= blocks & 1;
        continue;
      }
      ptx::mbarrier_wait(ready(), static_cast<uint32_t>(stage));
      ptx::mbarrier_wait(done(), static_cast<uint32_t>(1 - stage));
      if (has_next) {
        copy_queries(next, 1 - stage);
        copy_dout(next, 1 - stage);
      }
      ptx::cp_async_commit();
      if (has_next) write_words(next, 1 - stage);
      if (has_dq) add_to_dq(last, 1 - stage);
      if (at.head < end_head) {
        add_block(at, stage);
        arrive_ready();
        ptx::mbarrier_arrive(done());
      }
      last = at;
      at = next;
      stage ^= 1;
    }
  }
};

// first_key: of the warp.
template <class T>
FLASHSPARK_DEVICE auto function_mask(const FunctionBackwardArguments &a, const SequenceMask &mask, int32_t first_key) {
  if constexpr (T::kNativeScores) {
    return backward_mask<T>(a, mask, first_key);
  } else {
    return key_mask(a, mask);
  }
}

template <class T>
FLASHSPARK_DEVICE void function_backward(const FunctionBackwardArguments &a) {
  const Piece piece = whole_tile(a);
  const KeyTile &tile = piece.tile;
  if (!tile.valid) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    return;
  }
  const PieceRows w = rows_of<T, T::kNativeScores>(a, piece);
  const int32_t last_key = min_of(tile.first + T::kKeys, w.keys.end) - 1, end_head = tile.head_q + tile.num_heads_q;
  const ptx::SharedAddress shared = ptx::shared_memory();
  const BackwardOffsets<T> lane = backward_offsets<T>();
  const int32_t padded = first_padded_row(a, tile.seq, w.rows.q_row);
  const FunctionRow row{
      tile.seq, 0, 0, w.rows.seqlen_q, w.keys.end - w.keys.begin, w.rows.q_row, static_cast<int32_t>(w.keys.row)};
  // Before it is known whether the lists name any row for these keys.
  if (w.count > 0) copy_keys_and_values<T>(a, tile.first, w);
  // Of what comes now the lists are of the kernel before the previous one.
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  // clang-format off
  FunctionLoop<T> loop{{a, tile.first, padded,
                        make_row_loader<QueryLoader<T>>(a, w.rows, a.q, a.q_strides, a.head_dim),
                        make_row_loader<GradientLoader<T>>(a, w.rows, a.dout, a.dout_strides, a.head_dim_v),
                        shared, lane, {}, {}, {}, {}},
                       function_mask<T>(a, w.mask, tile.first + lane.warp_key), row,
                       {{a.blocks, a.blocks.data + tile.seq * a.blocks.batch_stride}, tile.first, last_key,
                         tile.first + lane.warp_key, w.rows.seqlen_q, end_head, INT32_MAX, -1, 0, {}, {}},
                        end_head, dropout_key(a.dropout),
                        {a, w.mask, tile.first / T::kKeys, ceil_div(tile.held, T::kKeys), w.rows.seqlen_q,
                         padded / T::kRows}, {}, 0};
  // clang-format on
  const Interval blocks = loop.walk.narrowed({w.blocks.begin, w.blocks.end, tile.head_q, w.blocks.begin});
  const ListedRows first = loop.walk.find({blocks.begin, blocks.end, tile.head_q, blocks.begin});
  if (first.head < end_head) {
    loop.run(first);
  } else {
    ptx::cp_async_wait<0>();
  }
  ptx::cta_barrier();  // all are done with K, whose memory the results pass through
  store_gradients<T>(a, loop.dk, loop.dv, shared);
}

}  // namespace flashspark
