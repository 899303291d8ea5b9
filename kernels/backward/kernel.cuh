// What a CTA of the backward kernel does: its piece of the work, or one after another; keys and values before, dK and
// dV behind the loop over blocks of rows (backward.cuh).
#pragma once

#include "backward/backward.cuh"
#include "backward/column_epilogue.cuh"
#include "backward/piece_rows.cuh"

namespace flashspark {

// Of the others a CTA has a whole tile.
template <class T>
inline constexpr bool kHasPieces = !T::kNative && !T::kColumns && !T::kInTurns;

// The CTA's first piece, or the one where the piece before says that there is more.
template <class T>
FLASHSPARK_DEVICE Piece next_piece(const BackwardArguments &a, int32_t rest) {
  if constexpr (T::kHasWalks) {
    return Walks<T>{a}.find_piece(rest);
  } else {
    return find_piece<T>(a, rest);
  }
}
// Where a piece leaves its sums.
template <class T>
FLASHSPARK_DEVICE int32_t slot_of(const BackwardArguments &a, bool of_second_tile) {
  if constexpr (T::kHasWalks) {
    const Walks<T> walks{a};
    return walks.slot(walks.place(), of_second_tile);
  } else {
    return static_cast<int32_t>(ptx::cta_x());
  }
}
// The first piece of several has left its sums, if it leaves any.
template <class T>
FLASHSPARK_DEVICE void raise_first_flag(const BackwardArguments &a) {
  if constexpr (T::kHasWalks) {
    const Walks<T> walks{a};
    if (!walks.leaves_sums(walks.place())) return;
  }
  PieceSums<T>{a}.raise_flag(slot_of<T>(a, false));
}

// Whether the CTA has all sums of the piece's tile, and is to store them.
template <class T>
FLASHSPARK_DEVICE bool join_piece(const BackwardArguments &a, const Piece &piece, KeyGradient<T, T::kHeadDim> &dk,
                                  KeyGradient<T, T::kHeadDimV> &dv) {
  const PieceSums<T> sums{a};
  if (piece.ends_tile) {
    if constexpr (T::kHasWalks) {
      Walks<T>{a}.join(piece, dk, dv);
    } else {
      sums.join(piece, dk, dv);
    }
  } else if (piece.first < piece.end) {
    const int32_t slot = slot_of<T>(a, piece.is_second);
    sums.leave(slot, dk, dv);
    if (piece.rest < 0) sums.raise_flag(slot);
  }
  return piece.ends_tile;
}

// dK and dV of a piece. Returns where the rest of the CTA's part ends (Piece::rest).
template <class T>
FLASHSPARK_DEVICE int32_t store_piece(BackwardLoop<T> &loop, bool has_pieces) {
  const BackwardArguments &a = loop.a;
  if constexpr (!kHasPieces<T>) {
    store_gradients<T>(a, loop.dk, loop.dv, loop.shared);
    return -1;
  } else {
    const Piece done = load_piece<T>();
    if (a.added_blocks != nullptr) count_added_blocks<T>(a, done);
    if (T::kStages == RowStages::all && done.rest >= 0 && done.first < done.end) invalidate_barriers<T>(loop.shared);
    if (!has_pieces || join_piece<T>(a, done, loop.dk, loop.dv))
      store_gradients<T>(a, done.tile, loop.dk, loop.dv, loop.shared);
    return done.rest;
  }
}

FLASHSPARK_DEVICE RowWalk first_row_block(const Piece &piece, const PieceRows &rows) {
  RowWalk at{rows.blocks.begin, rows.blocks.end, piece.tile.head_q, rows.blocks.begin};
  if (piece.first == 0) return at;
  const Quotient passed = split(piece.first, rows.blocks.end - rows.blocks.begin);
  at.head += ptx::uniform(passed.quotient);
  at.block += ptx::uniform(passed.remainder);
  return at;
}

template <class T>
FLASHSPARK_DEVICE WalkOf<T> first_block(const BackwardArguments &a, const Piece &piece, const PieceRows &rows) {
  if constexpr (T::kHasWalks) {
    return Walks<T>{a}.first_block(piece, rows.blocks);
  } else {
    return first_row_block(piece, rows);
  }
}

template <class T>
FLASHSPARK_DEVICE TurnsOf<T> make_turns(const BackwardArguments &a, const typename Turns<T>::State &state) {
  if constexpr (T::kHasWalks) {
    return {a};
  } else {
    return {a, state};
  }
}

// Where the rest of the CTA's part ends (Piece::rest).
template <class T>
FLASHSPARK_DEVICE int32_t backward_piece(const BackwardArguments &a, int32_t rest) {
  const ptx::SharedAddress shared = ptx::shared_memory();
  const bool has_pieces = T::kHasWalks || (kHasPieces<T> && a.num_pieces > 0);
  const Piece piece = has_pieces ? next_piece<T>(a, rest) : whole_tile(a);
  const KeyTile &tile = piece.tile;
  if (!tile.valid) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    return -1;
  }
  PieceRows w = rows_of<T>(a, piece);
  if constexpr (T::kHasWalks) w.blocks = Walks<T>{a}.blocks(w.blocks);
  if (w.count > 0) copy_keys_and_values<T>(a, tile.first, w);
  if constexpr (kHasPieces<T>) keep_piece<T>(piece, w.blocks.end - w.blocks.begin);
  if (has_pieces && rest != INT32_MAX) raise_first_flag<T>(a);
  // Keys, values and lengths are not of the previous kernel, which has waited itself for those that wrote them.
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  PhiloxKey key{};
  if constexpr (T::kNative || T::kDropout) key = dropout_key(a.dropout);
  if constexpr (T::kDropout) keep_draws<T>(key, tile.seq, tile.first);
  const int32_t padded = first_padded_row(a, tile.seq, w.rows.q_row);
  typename Turns<T>::State turns{};
  if constexpr (T::kHasWalks) {
    WalkTurns<T>::keep(a, piece, w.blocks);
  } else if (Turns<T>::are_taken(a)) {
    turns = {tile.first / T::kKeys, ceil_div(w.keys.end, T::kKeys), {0, 0}, padded / T::kRows};
    constexpr int32_t kSums = Turns<T>::kSums;
    if (turns.tile + kSums < turns.tiles) {
      const Interval before = visited_blocks<T>(a, w.mask, tile.first + kSums * T::kKeys, w.rows.seqlen_q);
      turns.before = uniform(Turns<T>::groups(before));
    }
    if constexpr (!T::kNative || T::kColumns) Turns<T>::keep(turns);
  }
  if constexpr (T::kColumns) {
    auto loop = make_column_loop<T>(a, w.mask, w.rows, tile.first, padded, key, Turns<T>{a, turns});
    if (w.count > 0) loop.run(w.blocks, tile.head_q, w.count);
    ptx::cta_barrier();  // as below
    store_column_gradients<T>(loop);
    return -1;
  } else {
    const BackwardMask<T> own_mask = backward_mask<T>(a, w.mask, tile.first + T::key_warp() * T::kWarpKeys);
    // clang-format off
    BackwardLoop<T> loop{{a, tile.first, padded,
                          make_row_loader<QueryLoader<T>>(a, w.rows, a.q, a.q_strides, a.head_dim),
                          make_row_loader<GradientLoader<T>>(a, w.rows, a.dout, a.dout_strides, a.head_dim_v),
                          shared, backward_offsets<T>(), {}, {}, {}, {}},
                         own_mask, key,
                         make_turns<T>(a, turns), 0};
    // clang-format on
    if (w.count > 0) loop.run(first_block<T>(a, piece, w), w.count);
    ptx::cta_barrier();  // all are done with K, whose memory the results pass through
    return store_piece<T>(loop, has_pieces);
  }
}

template <class T>
FLASHSPARK_DEVICE void backward(const BackwardArguments &a) {
  ptx::warm_constant_cache(a);
  // A second way into the loop, which no call takes, keeps the compiler from moving out of it what does not change in
  // it: there are no registers for that.
  int32_t rest = INT32_MAX;
  if (a.num_pieces >= 0) goto first;
  do {
    ptx::cta_barrier();  // all are done with shared memory
  first:
    rest = backward_piece<T>(a, rest);
  } while (kHasPieces<T> && rest >= 0);
}

}  // namespace flashspark
