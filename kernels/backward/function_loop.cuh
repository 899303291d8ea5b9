// The backward pass with the user's functions and block lists: the loop of backward.cuh over those blocks of rows that
// the lists name, with scores that functions change. Of a pair of warps one computes P^T and sums dV. The other one
// gets P^T from it, where the instance's pairs hand it on (kHandsOn); else it computes all, but for dV, by itself.
#pragma once

#include "backward/backward.cuh"
#include "backward/function_pairs.cuh"
#include "backward/function_turns.cuh"
#include "backward/function_walk.cuh"

namespace flashspark {

template <class T>
struct FunctionLoop {
  const FunctionBackwardArguments &a;
  KeyMask mask;
  FunctionRow row;  // of the sequence; h and q_idx are each row's own
  ListedWalk<T> walk;
  int32_t first_key, end_head;  // of the CTA
  int32_t first_padded_row;
  QueryLoader<T> q;
  GradientLoader<T> dout;
  ptx::SharedAddress shared;
  BackwardOffsets<T> lane;
  PhiloxKey dropout_key;
  FunctionTurns<T> turns;

  KeyOperand<T, T::kHeadDim, T::kTile.keys_in_registers> keys;
  KeyOperand<T, T::kHeadDimV, T::kTile.values_in_registers> values;
  KeyGradient<T, T::kHeadDim> dk;  // of a pair, what the warp sums
  KeyGradient<T, T::kHeadDimV> dv;
  CapturedSums<T> sums;

  FLASHSPARK_DEVICE ptx::SharedAddress queries(int32_t stage) const {
    return shared + BackwardLoop<T>::of_stage(stage, T::kMemory.queries, T::kMemory.second_queries);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress douts(int32_t stage) const {
    return shared + BackwardLoop<T>::of_stage(stage, T::kMemory.dout, T::kMemory.second_dout);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress dscores(int32_t stage) const {
    return shared + BackwardLoop<T>::of_stage(stage, T::kMemory.dscores, T::kMemory.second_dscores);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress words(int32_t stage) const {
    return shared + T::kMemory.words + stage * T::kMemory.word_stage;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress rows(int32_t stage) const {
    return shared + T::kMemory.rows + stage * T::kMemory.row_stage;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress kept(int32_t stage) const {
    return shared + T::kMemory.kept + stage * T::kMemory.kept_stage;
  }
  FLASHSPARK_DEVICE int32_t warp_key() const { return first_key + lane.warp_key; }

  FLASHSPARK_DEVICE void copy_queries(const RowWalk &at, int32_t stage) {
    q.copy(at, queries(stage), lane.thread);
    copy_row_values<T>(a, first_padded_row, at, rows(stage), lane.thread);
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
    const int32_t at = warp_key() + ptx::lane() / 4 + 8 * key, first = token + ptx::lane() % 4 * 2;
    if (at >= mask.end) return {0, 0};
    return {at + mask.low - first, min_of(at + mask.high, row.seqlen_q) - first};
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
    ScoreTile<T> scores{}, products{};
    score_product<T, typename T::KeyLayout>(scores, keys, shared, q_rows, lane);
    if constexpr (of_keys)
      score_product<T, typename T::ValueLayout>(products, values, shared + T::kMemory.values, dout_rows, lane);
    const FunctionTile tile{warp_key(),       first_row,   {kept_rows(0, token), kept_rows(1, token)},
                            listed != kWhole, lse,         lse + T::kRows * 4,
                            kept(stage),      words(stage)};
    function_scores<T, of_keys>(a, tile, scores, products, p, ds, sums);
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

  FLASHSPARK_DEVICE float *dq_rows(const RowWalk &at) const {
    const int64_t first = static_cast<int64_t>(at.head) * a.padded_rows + first_padded_row + at.block * T::kRows;
    return a.dq_sum + first * T::kHeadDim;
  }
  FLASHSPARK_DEVICE void add_to_dq(const RowWalk &at, int32_t stage) {
    float *const to = dq_rows(at);
    QueryGradient<T> dq{};
    query_product(dq, dscores(stage), shared, lane);
    add_query_gradient(to, dq, lane);
  }

  // K and V are in flight, and block `at` is the first.
  FLASHSPARK_DEVICE void run(const ListedRows &at) {
    copy_queries(at, 0);
    dout.copy(at, douts(0), lane.thread);
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
      if (next.head != at.head) sums.end_head();
      if constexpr (T::kInTurns) last = at;
      if (!has_next) break;
      at = next;
    }
    if constexpr (T::kInTurns) {
      ptx::cta_barrier();  // all have added
      turns.pass(last);
    }
  }

  // As in backward.cuh; a block's words are ready, too.
  FLASHSPARK_DEVICE ptx::SharedAddress ready() const { return shared + T::kMemory.barriers; }
  FLASHSPARK_DEVICE ptx::SharedAddress done() const { return shared + T::kMemory.barriers + 8; }
  FLASHSPARK_DEVICE void arrive_ready() {
    ptx::cp_async_wait<0>();
    ptx::mbarrier_arrive(ready());
  }

  // Whether a block's scores are all of rows and keys that see each other.
  FLASHSPARK_DEVICE bool is_whole(const ListedRows &at) const {
    constexpr uint32_t kTiles = (1u << 2 * (T::kRows / T::kScoreRows)) - 1;
    const uint32_t wanted = T::Functions::Mask::kExists ? kTiles : kTiles & 0x55555555;
    const Interval unmasked = mask.unmasked(warp_key(), T::kWarpKeys);
    return (at.statuses & wanted) == wanted && at.block * T::kRows >= unmasked.begin &&
           (at.block + 1) * T::kRows <= min_of(unmasked.end, row.seqlen_q);
  }

  // dQ of the last block, this block's scores, and the copies and words of the next one (pair_block.cuh).
  template <bool values_summed>
  FLASHSPARK_DEVICE void add_whole_block(const RowWalk &last, const RowWalk &next, int32_t stage) {
    using Score = typename T::Functions::Score;
    const int32_t warp = ptx::uniform(ptx::warp());
    const ptx::SharedAddress sum_keys = shared + T::KeyLayout::step(0, warp * (T::kSumColumns / 8));
    const PairRows of_stage{values_summed ? queries(stage) : douts(stage),
                            values_summed ? douts(stage) : queries(stage), rows(stage) + lane.thread % 4 * 8,
                            dscores(stage)};
    const auto copy = [&] {
      ptx::mbarrier_wait(done(), static_cast<uint32_t>(1 - stage));
      q.copy_full(next, queries(1 - stage), lane.thread);
      copy_row_values<T>(a, first_padded_row, next, rows(1 - stage), lane.thread);
      dout.copy_full(next, douts(1 - stage), lane.thread);
      ptx::cp_async_commit();
      if constexpr (!values_summed) write_words(next, 1 - stage);
    };
    const auto add_dq = [&](const QueryGradient<T> &dq) { add_query_gradient(dq_rows(last), dq, lane); };
    const auto arrive = [&] { arrive_ready(); };
    if constexpr (values_summed) {
      WholeFunctionTile<T> tile{{}, a, warp_key(), words(stage)};
      tile.scale = Score::kIsBias ? bias_scale(a) * kLog2E : a.scale_log2;
      flashspark::add_whole_block<T>(tile, dk, keys, of_stage, sum_keys, dscores(1 - stage), lane, copy, add_dq,
                                     arrive);
    } else {
      flashspark::add_whole_block<T>(PairTile<T, false>{}, dk, keys, of_stage, sum_keys, dscores(1 - stage), lane, copy,
                                     add_dq, arrive);
    }
    ptx::mbarrier_arrive(done());
  }

  // A block's scores and dQ of the one before, as in backward.cuh.
  FLASHSPARK_DEVICE void run_whole_blocks(ListedRows at) {
    const bool values_summed = ptx::uniform(T::sums_values()) != 0;
    if (lane.thread == 0) {
      ptx::mbarrier_init(ready(), T::kWarps);
      ptx::mbarrier_init(done(), T::kWarps);
    }
    ptx::cta_barrier();
    arrive_ready();  // of the first block
    RowWalk last{at.begin, at.end, end_head, at.begin};
    FLASHSPARK_NO_UNROLL
    for (int32_t stage = 0; at.head < end_head || last.head < end_head; stage ^= 1) {
      const ListedRows next = walk.find(at.next());
      const bool has_next = next.head < end_head, has_dq = last.head < end_head && a.dq_sum != nullptr;
      const bool whole = has_dq && has_next && is_whole(at) && q.is_full(next) && dout.is_full(next);
      ptx::mbarrier_wait(ready(), static_cast<uint32_t>(stage));
      if (whole) {
        if (values_summed) {
          add_whole_block<true>(last, next, stage);
        } else {
          add_whole_block<false>(last, next, stage);
        }
      } else {
        ptx::mbarrier_wait(done(), static_cast<uint32_t>(1 - stage));
        if (has_next) {
          copy_queries(next, 1 - stage);
          dout.copy(next, douts(1 - stage), lane.thread);
        }
        ptx::cp_async_commit();
        if (has_next) write_words(next, 1 - stage);
        if (has_dq) add_to_dq(last, 1 - stage);
        if (at.head < end_head) {
          add_block(at, stage);
          arrive_ready();
          ptx::mbarrier_arrive(done());
        }
      }
      last = at;
      at = next;
    }
  }
};

template <class T>
FLASHSPARK_DEVICE void function_backward(const FunctionBackwardArguments &a) {
  const KeyTile tile = find_key_tile(a, static_cast<int32_t>(ptx::cta_x()));
  if (!tile.valid) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    return;
  }
  const SequenceRows in_use = queries_of(a, read_query_lengths(a, tile.seq));
  RowTile rows{};
  rows.seq = tile.seq;
  rows.head_kv = tile.head_kv;
  rows.seqlen_q = ptx::uniform(in_use.tokens);
  rows.q_row = ptx::uniform(in_use.row);
  const Keys keys = find_keys(a, tile.seq);
  const SequenceMask mask = sequence_mask(a, rows, keys, is_causal(a, tile.seq));
  const int32_t last_key = min_of(tile.first + T::kKeys, keys.end) - 1;
  const Interval all = uniform(visited_blocks<T, false>(a, mask, tile.first, rows.seqlen_q));
  const int32_t end_head = tile.head_q + tile.num_heads_q;
  const ptx::SharedAddress shared = ptx::shared_memory();
  const BackwardOffsets<T> lane = backward_offsets<T>();
  const int32_t padded = first_padded_row(a, tile.seq, rows.q_row);
  const FunctionRow row{
      tile.seq, 0, 0, rows.seqlen_q, keys.end - keys.begin, rows.q_row, static_cast<int32_t>(keys.row)};
  // Before it is known whether the lists name any row for these keys.
  if (!is_empty(all)) {
    KeyBounds visited = no_keys();
    visited.visited[0] = {tile.first, last_key + 1};
    const KeyTileCopy<T> copy = make_tile_copy<T>(a, keys, visited);
    make_tile_loader<T, KVOperand::key>(a, rows, keys).copy(copy, tile.first / T::kKeys, shared);
    make_tile_loader<T, KVOperand::value>(a, rows, keys).copy(copy, tile.first / T::kKeys, shared + T::kMemory.values);
    ptx::cp_async_commit();
  }
  // Of what comes now the lists are of the kernel before the previous one.
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  // clang-format off
  FunctionLoop<T> loop{a, key_mask(a, mask), row,
                       {{a.blocks, a.blocks.data + tile.seq * a.blocks.batch_stride}, tile.first, last_key,
                        tile.first + lane.warp_key, rows.seqlen_q, end_head, INT32_MAX, -1, 0, {}, {}},
                       tile.first, end_head, padded,
                       make_row_loader<QueryLoader<T>>(a, rows, a.q, a.q_strides, a.head_dim),
                       make_row_loader<GradientLoader<T>>(a, rows, a.dout, a.dout_strides, a.head_dim_v),
                       shared, lane, dropout_key(a.dropout),
                       {a, mask, tile.first / T::kKeys, ceil_div(tile.held, T::kKeys), rows.seqlen_q, padded / T::kRows},
                       {}, {}, {}, {}, {}};
  // clang-format on
  const Interval blocks = loop.walk.narrowed({all.begin, all.end, tile.head_q, all.begin});
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
