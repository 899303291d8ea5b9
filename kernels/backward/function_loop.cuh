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
struct FunctionLoop : BackwardLoop<T> {
  const FunctionBackwardArguments &f;
  FunctionRow row;  // of the sequence; h and q_idx are each row's own
  SequenceBlocks blocks;
  int32_t end_head, last_key;  // of the CTA
  CapturedSums<T> sums;

  // The first block of rows from `at` on that the lists name; its head is end_head if there is none. A lane looks at a
  // block of rows.
  FLASHSPARK_DEVICE RowWalk find(RowWalk at) const {
    if (at.begin >= at.end) return {at.begin, at.end, end_head, at.begin};
    if constexpr (T::kBlockSparse) {
      while (at.head < end_head) {
        for (; at.block < at.end; at.block += 32) {
          const int32_t first = (at.block + ptx::lane()) * T::kRows, last = min_of(first + T::kRows, row.seqlen_q) - 1;
          const bool listed =
              at.block + ptx::lane() < at.end && blocks.any(at.head, first, last, this->first_key, last_key);
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
    write_function_words<T>(f, of_head, at.block * T::kRows, this->shared + T::kMemory.words);
  }

  FLASHSPARK_DEVICE uint32_t status(int32_t head, int32_t token) const {
    if constexpr (!T::kBlockSparse) return kListed;
    if (token >= row.seqlen_q) return kUnlisted;
    return blocks.at(head, blocks.query_block(token), blocks.key_block(min_of(this->warp_key(), last_key)));
  }

  // Of the lane's keys, which of the tile's rows keep them, counted from the lane's first row.
  FLASHSPARK_DEVICE Interval kept_rows(int32_t key, int32_t token) const {
    const int32_t at = this->warp_key() + ptx::lane() / 4 + 8 * key, first = token + ptx::lane() % 4 * 2;
    if (at >= this->mask.end) return {0, 0};
    return {at + this->mask.low - first, min_of(at + this->mask.high, row.seqlen_q) - first};
  }

  // As BackwardLoop::add_rows() does it: for dV, or for dK and dQ, or for all.
  template <bool of_values, bool of_keys>
  FLASHSPARK_DEVICE void add_function_rows(const RowWalk &at, int32_t stage, int32_t first_row) {
    const int32_t token = at.block * T::kRows + first_row;
    const ptx::SharedAddress q_rows = this->queries(stage) + first_row * T::KeyLayout::kPitch;
    const ptx::SharedAddress dout_rows = this->shared + T::kMemory.dout + first_row * T::ValueLayout::kPitch;
    const ptx::SharedAddress lse = this->rows(stage) + first_row * 4, dscores = this->shared + T::kMemory.dscores;
    const Interval visited = this->mask.visited(this->warp_key(), T::kWarpKeys);
    ScoreOperand<T> p{}, ds{};
    const uint32_t listed = status(at.head, token);
    if (listed == kUnlisted || token >= visited.end || token + T::kScoreRows <= visited.begin) {
      if constexpr (of_keys) store_scores(ds, dscores, this->lane.score_store, first_row);
      return;
    }
    ScoreTile<T> scores{}, products{};
    score_product<T, typename T::KeyLayout>(scores, this->keys, this->shared, q_rows, this->lane);
    if constexpr (of_keys)
      score_product<T, typename T::ValueLayout>(products, this->values, this->shared + T::kMemory.values, dout_rows,
                                                this->lane);
    const FunctionTile tile{this->warp_key(),
                            first_row,
                            {kept_rows(0, token), kept_rows(1, token)},
                            listed != kWhole,
                            lse,
                            lse + T::kRows * 4,
                            this->kept(stage),
                            this->shared + T::kMemory.words};
    function_scores<T, of_keys>(f, tile, scores, products, p, ds, sums);
    if constexpr (of_keys) store_scores(ds, dscores, this->lane.score_store, first_row);
    // Of a pair both sums lie in dk.
    if constexpr (of_values && of_keys) {
      gradient_product<T, typename T::ValueLayout>(this->dv, p, dout_rows, this->lane);
    } else if constexpr (of_values) {
      gradient_product<T, typename T::ValueLayout>(this->dk, p, dout_rows, this->lane);
    }
    if constexpr (of_keys) gradient_product<T, typename T::KeyLayout>(this->dk, ds, q_rows, this->lane);
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
  FLASHSPARK_DEVICE void run_listed(RowWalk at) {
    this->copy_queries(at, 0);
    this->dout.copy(at, this->shared + T::kMemory.dout);
    ptx::cp_async_commit();
    this->draw(at, 0);
    ptx::cp_async_wait<1>();
    ptx::cta_barrier();  // K and V are here
    load_key_operand<T, typename T::KeyLayout>(this->keys, this->shared, this->lane);
    load_key_operand<T, typename T::ValueLayout>(this->values, this->shared + T::kMemory.values, this->lane);
    ptx::cta_barrier();  // all have V in registers, where words take its memory
    write_words(at);
    FLASHSPARK_NO_UNROLL
    for (int32_t stage = 0;; stage = 1 - stage) {
      const RowWalk next = find(at.next());
      const bool has_next = next.head < end_head;
      ptx::cp_async_wait<0>();
      ptx::cta_barrier();  // Q, dO and the rows' words are here; all are done with dS^T and the other stage
      if (T::kStages > 1 && has_next) this->copy_queries(next, 1 - stage);
      ptx::cp_async_commit();
      add_block(at, stage);
      if (has_next) this->draw(next, 1 - stage);
      ptx::cta_barrier();  // dS^T is here; all are done with dO and the words
      if (has_next) {
        if constexpr (T::kStages == 1) this->copy_queries(next, 1 - stage);
        this->dout.copy(next, this->shared + T::kMemory.dout);
        write_words(next);
      }
      ptx::cp_async_commit();
      if (this->a.dq_sum != nullptr) this->add_to_dq(at);
      if (next.head != at.head) sums.end_head();
      if (!has_next) break;
      at = next;
    }
  }

  FLASHSPARK_DEVICE void store() {
    ptx::cta_barrier();  // all are done with K, whose memory the results pass through
    const KeyTile tile = find_key_tile(f, T::kKeys);
    const float value_scale = f.dropout.scale;
    if constexpr (!T::kPaired) {
      store_gradient<T, typename T::KeyLayout>(f.dk, f.dk_strides, tile, this->dk, f.softmax_scale, f.head_dim,
                                               this->shared);
      store_gradient<T, typename T::ValueLayout>(f.dv, f.dv_strides, tile, this->dv, value_scale, f.head_dim_v,
                                                 this->shared);
    } else {
      const bool of_values = T::sums_values();
      store_gradient<T, typename T::KeyLayout>(of_values ? f.dv : f.dk, of_values ? f.dv_strides : f.dk_strides, tile,
                                               this->dk, of_values ? value_scale : f.softmax_scale,
                                               of_values ? f.head_dim_v : f.head_dim,
                                               this->shared + (of_values ? T::kKeys * T::KeyLayout::kPitch : 0));
    }
  }
};

template <class T>
FLASHSPARK_DEVICE void function_backward(const FunctionBackwardArguments &a) {
  const KeyTile tile = find_key_tile(a, T::kKeys);
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
  const auto group = static_cast<int32_t>(a.group.value);
  const int32_t begin = tokens.begin / T::kRows, end = is_empty(tokens) ? begin : ceil_div(tokens.end, T::kRows);
  const ptx::SharedAddress shared = ptx::shared_memory();
  const FunctionRow row{
      tile.seq, 0, 0, rows.seqlen_q, keys.end - keys.begin, rows.q_row, static_cast<int32_t>(keys.row)};
  // clang-format off
  FunctionLoop<T> loop{{a, key_mask(a, mask), tile.seq, tile.first,
                        first_padded_row(a, tile.seq, rows.q_row),
                        make_row_loader<QueryLoader<T>>(a, rows, a.q, a.q_strides, a.head_dim),
                        make_row_loader<GradientLoader<T>>(a, rows, a.dout, a.dout_strides, a.head_dim_v),
                        shared, backward_offsets<T>(), dropout_key(a.dropout), {}, {}, {}, {}},
                       a, row, {a.blocks, a.blocks.data + tile.seq * a.blocks.batch_stride},
                       (tile.head_kv + 1) * group, own.end - 1, {}};
  // clang-format on
  const RowWalk first = loop.find({begin, end, tile.head_kv * group, begin});
  if (first.head < loop.end_head) {
    KeyBounds visited = no_keys();
    visited.visited[0] = own;
    const KeyTileCopy<T> copy = make_tile_copy<T>(a, keys, visited);
    make_tile_loader<T, KVOperand::key>(a, rows, keys).copy(copy, tile.first / T::kKeys, shared);
    make_tile_loader<T, KVOperand::value>(a, rows, keys).copy(copy, tile.first / T::kKeys, shared + T::kMemory.values);
    ptx::cp_async_commit();
    loop.run_listed(first);
  }
  loop.store();
}

}  // namespace flashspark
