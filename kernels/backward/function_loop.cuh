// The backward pass with the user's functions and block lists: the loop of backward.cuh over those blocks of rows that
// the lists name, with scores that functions change. Of a pair of warps one computes P^T and sums dV; the other
// computes all, but for dV, and hands on dS^T: nothing passes between them.
#pragma once

#include "backward/backward.cuh"
#include "backward/function_mod.cuh"

namespace flashspark {

// What the user's lists say of rows and keys of a sequence.
struct SequenceBlocks {
  const BlockStatusTable &table;
  const uint8_t *statuses;  // of the sequence's first head

  FLASHSPARK_DEVICE int32_t query_block(int32_t token) const {
    return min_of(divide(token, table.block_tokens).quotient, table.query_blocks - 1);
  }
  FLASHSPARK_DEVICE int32_t key_block(int32_t key) const {
    return min_of(divide(key, table.block_keys).quotient, table.key_blocks - 1);
  }
  FLASHSPARK_DEVICE uint8_t at(int32_t head, int32_t query_block, int32_t key_block) const {
    return statuses[head * table.head_stride + static_cast<int64_t>(key_block) * table.query_blocks + query_block];
  }
  // Whether some of the tokens has a listed block among the keys; both ends belong to them.
  FLASHSPARK_DEVICE bool any(int32_t head, int32_t first_token, int32_t last_token, int32_t first_key,
                             int32_t last_key) const {
    uint32_t found = 0;
    for (int32_t k = key_block(first_key); k <= key_block(last_key); ++k) {
      for (int32_t q = query_block(first_token); q <= query_block(last_token); ++q) found |= at(head, q, k);
    }
    return found != kUnlisted;
  }
};

template <class T>
struct FunctionLoop {
  const FunctionBackwardArguments &a;
  KeyMask mask;
  FunctionRow row;  // of the sequence; h and q_idx are each row's own
  SequenceBlocks blocks;
  int32_t first_key, last_key, end_head;  // of the CTA
  int32_t first_padded_row;
  QueryLoader<T> q;
  GradientLoader<T> dout;
  ptx::SharedAddress shared;
  BackwardOffsets<T> lane;
  PhiloxKey dropout_key;

  KeyOperand<T, T::kHeadDim, T::kTile.keys_in_registers> keys;
  KeyOperand<T, T::kHeadDimV, T::kTile.values_in_registers> values;
  KeyGradient<T, T::kHeadDim> dk;  // of a pair, what the warp sums
  KeyGradient<T, T::kHeadDimV> dv;
  CapturedSums<T> sums;

  FLASHSPARK_DEVICE ptx::SharedAddress queries(int32_t stage) const {
    return shared + (stage == 0 ? T::kMemory.queries : T::kMemory.second_queries);
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
    if (a.dropout.scale != 1.0f) draw_kept<T>(a, dropout_key, row.b, first_key, at, kept(stage));
  }

  // The first block of rows from `at` on that the lists name; its head is end_head if there is none. A lane looks at a
  // block of rows.
  FLASHSPARK_DEVICE RowWalk find(RowWalk at) const {
    if (at.begin >= at.end) return {at.begin, at.end, end_head, at.begin};
    if constexpr (T::kBlockSparse) {
      while (at.head < end_head) {
        for (; at.block < at.end; at.block += 32) {
          const int32_t first = (at.block + ptx::lane()) * T::kRows, last = min_of(first + T::kRows, row.seqlen_q) - 1;
          const bool listed = at.block + ptx::lane() < at.end && blocks.any(at.head, first, last, first_key, last_key);
          const uint32_t found = ptx::ballot(listed);
          if (found == 0) continue;
          at.block = ptx::uniform(at.block + static_cast<int32_t>(ptx::lowest_bit(found)));
          return at;
        }
        at = {at.begin, at.end, at.head + 1, at.begin};
      }
    }
    return at;
  }

  FLASHSPARK_DEVICE void write_words(const RowWalk &at) const {
    FunctionRow of_head = row;
    of_head.h = at.head;
    write_function_words<T>(a, of_head, at.block * T::kRows, shared + T::kMemory.words);
  }

  FLASHSPARK_DEVICE uint32_t status(int32_t head, int32_t token) const {
    if constexpr (!T::kBlockSparse) return kListed;
    if (token >= row.seqlen_q) return kUnlisted;
    return blocks.at(head, blocks.query_block(token), blocks.key_block(min_of(warp_key(), last_key)));
  }

  // Of the lane's keys, which of the tile's rows keep them, counted from the lane's first row.
  FLASHSPARK_DEVICE Interval kept_rows(int32_t key, int32_t token) const {
    const int32_t at = warp_key() + ptx::lane() / 4 + 8 * key, first = token + ptx::lane() % 4 * 2;
    if (at >= mask.end) return {0, 0};
    return {at + mask.low - first, min_of(at + mask.high, row.seqlen_q) - first};
  }

  // What kScoreRows rows of a block add to dV, or to dK and dQ, or to all.
  template <bool of_values, bool of_keys>
  FLASHSPARK_DEVICE void add_function_rows(const RowWalk &at, int32_t stage, int32_t first_row) {
    const int32_t token = at.block * T::kRows + first_row;
    const ptx::SharedAddress q_rows = queries(stage) + first_row * T::KeyLayout::kPitch;
    const ptx::SharedAddress dout_rows = shared + T::kMemory.dout + first_row * T::ValueLayout::kPitch;
    const ptx::SharedAddress lse = rows(stage) + first_row * 4, dscores = shared + T::kMemory.dscores;
    const Interval visited = mask.visited(warp_key(), T::kWarpKeys);
    ScoreOperand<T> p{}, ds{};
    const uint32_t listed = status(at.head, token);
    if (listed == kUnlisted || token >= visited.end || token + T::kScoreRows <= visited.begin) {
      if constexpr (of_keys) store_scores(ds, dscores, lane.score_store, first_row);
      return;
    }
    ScoreTile<T> scores{}, products{};
    score_product<T, typename T::KeyLayout>(scores, keys, shared, q_rows, lane);
    if constexpr (of_keys)
      score_product<T, typename T::ValueLayout>(products, values, shared + T::kMemory.values, dout_rows, lane);
    const FunctionTile tile{warp_key(),
                            first_row,
                            {kept_rows(0, token), kept_rows(1, token)},
                            listed != kWhole,
                            lse,
                            lse + T::kRows * 4,
                            kept(stage),
                            shared + T::kMemory.words};
    function_scores<T, of_keys>(a, tile, scores, products, p, ds, sums);
    if constexpr (of_keys) store_scores(ds, dscores, lane.score_store, first_row);
    // Of a pair both sums lie in dk.
    if constexpr (of_values && of_keys) {
      gradient_product<T, typename T::ValueLayout>(dv, p, dout_rows, lane);
    } else if constexpr (of_values) {
      gradient_product<T, typename T::ValueLayout>(dk, p, dout_rows, lane);
    }
    if constexpr (of_keys) gradient_product<T, typename T::KeyLayout>(dk, ds, q_rows, lane);
  }

  FLASHSPARK_DEVICE void add_block(const RowWalk &at, int32_t stage) {
    FLASHSPARK_NO_UNROLL
    for (int32_t row = 0; row < T::kRows; row += T::kScoreRows) {
      if constexpr (!T::kPaired) {
        add_function_rows<true, true>(at, stage, row);
      } else if (T::sums_values()) {
        add_function_rows<true, false>(at, stage, row);
      } else {
        add_function_rows<false, true>(at, stage, row);
      }
    }
  }

  // K and V are in flight, and block `at` is the first.
  FLASHSPARK_DEVICE void run(RowWalk at) {
    copy_queries(at, 0);
    dout.copy(at, shared + T::kMemory.dout, lane.thread);
    ptx::cp_async_commit();
    draw(at, 0);
    ptx::cp_async_wait<1>();
    ptx::cta_barrier();  // K and V are here
    load_key_operand<T, typename T::KeyLayout>(keys, shared, lane);
    load_key_operand<T, typename T::ValueLayout>(values, shared + T::kMemory.values, lane);
    ptx::cta_barrier();  // all have V in registers, where words take its memory
    write_words(at);
    FLASHSPARK_NO_UNROLL
    for (int32_t stage = 0;; stage = 1 - stage) {
      const RowWalk next = find(at.next());
      const bool has_next = next.head < end_head;
      ptx::cp_async_wait<0>();
      ptx::cta_barrier();  // Q, dO and the rows' words are here; all are done with dS^T and the other stage
      if (T::kStages != RowStages::one && has_next) copy_queries(next, 1 - stage);
      ptx::cp_async_commit();
      add_block(at, stage);
      if (has_next) draw(next, 1 - stage);
      ptx::cta_barrier();  // dS^T is here; all are done with dO and the words
      if (has_next) {
        if constexpr (T::kStages == RowStages::one) copy_queries(next, 1 - stage);
        dout.copy(next, shared + T::kMemory.dout, lane.thread);
        write_words(next);
      }
      ptx::cp_async_commit();
      if (a.dq_sum != nullptr) {
        const int64_t row = static_cast<int64_t>(at.head) * a.padded_rows + first_padded_row + at.block * T::kRows;
        QueryGradient<T> dq{};
        query_product(dq, shared + T::kMemory.dscores, shared, lane);
        add_query_gradient(a.dq_sum + row * T::kHeadDim, dq, lane);
      }
      if (next.head != at.head) sums.end_head();
      if (!has_next) break;
      at = next;
    }
  }
};

template <class T>
FLASHSPARK_DEVICE void function_backward(const FunctionBackwardArguments &a) {
  const KeyTile tile = find_key_tile(a, static_cast<int32_t>(ptx::cta_x()));
  // Of the lists, what the kernel before the previous one has made of them.
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (!tile.valid) return;
  const SequenceRows in_use = queries_of(a, read_query_lengths(a, tile.seq));
  RowTile rows{};
  rows.seq = tile.seq;
  rows.head_kv = tile.head_kv;
  rows.seqlen_q = ptx::uniform(in_use.tokens);
  rows.q_row = ptx::uniform(in_use.row);
  const Keys keys = find_keys(a, tile.seq);
  const SequenceMask mask = sequence_mask(a, rows, keys, is_causal(a, tile.seq));
  const Interval own{tile.first, min_of(tile.first + T::kKeys, keys.end)};
  const Interval tokens = uniform(tokens_of_keys<false>(a, mask, own, rows.seqlen_q).visited);
  const int32_t begin = tokens.begin / T::kRows, end = is_empty(tokens) ? begin : ceil_div(tokens.end, T::kRows);
  const ptx::SharedAddress shared = ptx::shared_memory();
  const FunctionRow row{
      tile.seq, 0, 0, rows.seqlen_q, keys.end - keys.begin, rows.q_row, static_cast<int32_t>(keys.row)};
  // clang-format off
  FunctionLoop<T> loop{a, key_mask(a, mask), row, {a.blocks, a.blocks.data + tile.seq * a.blocks.batch_stride},
                       tile.first, own.end - 1, tile.head_q + tile.num_heads_q, first_padded_row(a, tile.seq, rows.q_row),
                       make_row_loader<QueryLoader<T>>(a, rows, a.q, a.q_strides, a.head_dim),
                       make_row_loader<GradientLoader<T>>(a, rows, a.dout, a.dout_strides, a.head_dim_v),
                       shared, backward_offsets<T>(), dropout_key(a.dropout), {}, {}, {}, {}, {}};
  // clang-format on
  const RowWalk first = loop.find({begin, end, tile.head_q, begin});
  if (first.head < loop.end_head) {
    KeyBounds visited = no_keys();
    visited.visited[0] = own;
    const KeyTileCopy<T> copy = make_tile_copy<T>(a, keys, visited);
    make_tile_loader<T, KVOperand::key>(a, rows, keys).copy(copy, tile.first / T::kKeys, shared);
    make_tile_loader<T, KVOperand::value>(a, rows, keys).copy(copy, tile.first / T::kKeys, shared + T::kMemory.values);
    ptx::cp_async_commit();
    loop.run(first);
  }
  ptx::cta_barrier();  // all are done with K, whose memory the results pass through
  store_gradients<T>(a, loop.dk, loop.dv, shared);
}

}  // namespace flashspark
