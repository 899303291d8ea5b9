// The loop over tiles of keys, in two schedules. All copies are asynchronous and each schedule names what a barrier
// protects; a copy group that has nothing to copy is still committed, so that counts stay the same on the last tiles.
#pragma once

#include "forward/products.cuh"
#include "forward/softmax.cuh"
#include "forward/tile_memory.cuh"

namespace flashspark {

// What a block keeps through the loop. Tiles are numbered 0, 1, ... in the order of `tiles`.
template <class T>
struct Block {
  using Number = typename T::Number;

  const ForwardArguments &a;
  const Work &work;
  const Mask &mask;
  KeyLoader<T> loader;
  KeyTiles tiles;
  int32_t begin, end;  // this split's piece
  // Tiles [plain_begin, plain_end) need no mask and their copies look at no key: the loops run them without a question.
  int32_t plain_begin, plain_end;
  Hull warp_hull;
  ptx::SharedAddress shared;
  LaneOffsets lane;
  LaneRow<T> rows[T::kLaneRows];
  Queries<T> q;
  Output<T> o;
  LaneState<T> state;
  float converted_scale;  // softmax_scale times the factors of q and k

  // The first tile takes the first stage: queries on their way to registers lie in the second.
  FLASHSPARK_DEVICE ptx::SharedAddress stage(int32_t n) const {
    return shared + (T::kStages == 1 ? 0 : (n - begin) % 2 * T::kStageBytes);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress queries() const { return shared + T::kQueryOffset; }

  // Pages of tile n are looked up one step before they are used.
  FLASHSPARK_DEVICE void look_up(int32_t n) {
    if (n < end) loader.look_up(tiles.at(n));
  }
  FLASHSPARK_DEVICE void copy_keys(int32_t n) {
    if (n < end) loader.template copy<false>(tiles.at(n), stage(n));
  }
  FLASHSPARK_DEVICE void copy_values(int32_t n) {
    if (n < end) loader.template copy<true>(tiles.at(n), stage(n));
  }
  // A whole tile, whose pages were looked up last, and the pages of the tile behind it.
  FLASHSPARK_DEVICE void copy(int32_t n) {
    copy_keys(n);
    copy_values(n);
    ptx::cp_async_commit();
    look_up(n + 1);
  }

  // A warp goes through its key group's part of a tile in pieces of kScoreKeys keys: piece 0, 1, ... pieces() - 1.
  static constexpr int32_t kPieces = T::kKeys / (T::kScoreKeys * T::kKeyGroups);
  FLASHSPARK_DEVICE int32_t pieces() const {
    return T::kFlexible && side_by_side<T>(a) ? T::kKeyGroups * kPieces : kPieces;
  }
  FLASHSPARK_DEVICE int32_t row_of(int32_t piece) const {
    return ((T::kKeyGroups > 1 ? key_group<T>(a) * kPieces : 0) + piece) * T::kScoreKeys;
  }
  FLASHSPARK_DEVICE int32_t first_key(int32_t n, int32_t piece) const { return tiles.at(n) * T::kKeys + row_of(piece); }

  // Whether any of the warp's rows keeps a key of this piece.
  FLASHSPARK_DEVICE bool meets(int32_t first) const {
    bool some = first < warp_hull.hull[0].end && first + T::kScoreKeys > warp_hull.hull[0].begin;
    if constexpr (T::kChanged)
      some = some || (first < warp_hull.hull[1].end && first + T::kScoreKeys > warp_hull.hull[1].begin);
    return some;
  }
  FLASHSPARK_DEVICE void scores(Scores<T> &s, int32_t n, int32_t piece) const {
    multiply_keys<T>(s, q, queries(), stage(n) + row_of(piece) * T::KeyLayout::kPitch, lane);
  }
  // Of q k, in natural units for instances that change scores, else in those of log2.
  FLASHSPARK_DEVICE float softmax_scale() const { return T::kConverts ? converted_scale : a.softmax_scale; }
  FLASHSPARK_DEVICE float scale() const { return T::kChanged ? 1.0f : softmax_scale(); }
  // What a piece of a tile that is not plain asks for: scale, caps and biases, and the mask where some row drops a key.
  FLASHSPARK_DEVICE void change_and_mask(Scores<T> &s, int32_t first) {
    bool full = first >= warp_hull.core[0].begin && first + T::kScoreKeys <= warp_hull.core[0].end;
    if constexpr (T::kChanged) {
      full = full || (first >= warp_hull.core[1].begin && first + T::kScoreKeys <= warp_hull.core[1].end);
      change_scores<T>(s, rows, a, softmax_scale(), first);
    }
    if (!full) mask_scores<T>(s, rows, a, work, mask, first);
  }
  // Softmax and product with V.
  FLASHSPARK_DEVICE void finish(const Scores<T> &s, int32_t n, int32_t piece) {
    move_maxima<T>(row_maxima<T>(s), o, state, scale());
    multiply_values<T>(o, s, state, scale(), stage(n) + T::kKeyBytes + row_of(piece) * T::ValueLayout::kPitch, lane);
    set_limits<T>(state);
  }
};

// The copies of the first tile, or two, whose pages have been looked up: what else the loop needs is worked out while
// they are on their way.
template <class T>
FLASHSPARK_DEVICE void start(Block<T> &block) {
  if constexpr (T::kAhead) {
    FLASHSPARK_NO_UNROLL
    for (int32_t n = block.begin; n < block.begin + 2; ++n) block.copy(n);
    return;
  }
  block.copy_keys(block.begin);
  if constexpr (T::kSchedule == Schedule::single) ptx::cp_async_commit();
  block.copy_values(block.begin);
  ptx::cp_async_commit();
}

// What a tile's copies are for: the warps of the block, or the warp itself.
template <class T>
FLASHSPARK_DEVICE void copies_barrier() {
  if constexpr (T::kOwnKeys) {
    ptx::warp_barrier();
  } else {
    ptx::block_barrier();
  }
}

// One buffer of K and one of V. Every barrier does two things: the copy awaited before it becomes visible to all, and
// all are done with the other buffer, which is refilled after it.
template <class T>
FLASHSPARK_DEVICE void run_single(Block<T> &block) {
  ptx::cp_async_wait<1>();  // Q and the first K
  ptx::block_barrier();
  static_assert(T::kSchedule != Schedule::single || Block<T>::kPieces == 1, "K is gone when V is used");
  FLASHSPARK_NO_UNROLL
  for (int32_t n = block.begin; n < block.end; ++n) {
    const int32_t first = block.first_key(n, 0);
    const bool meets = block.meets(first);
    Scores<T> s;
    block.look_up(n + 1);
    if (meets) block.scores(s, n, 0);
    ptx::cp_async_wait<0>();  // V of this tile
    copies_barrier<T>();      // ... for all; and all are done with K
    block.copy_keys(n + 1);
    ptx::cp_async_commit();
    if (meets) {
      block.change_and_mask(s, first);
      block.finish(s, n, 0);
    }
    ptx::cp_async_wait<0>();  // K of the next tile
    copies_barrier<T>();      // ... for all; and all are done with V
    block.copy_values(n + 1);
    ptx::cp_async_commit();
  }
}

// Two buffers of each; one barrier a tile.
template <class T>
FLASHSPARK_DEVICE void run_ring(Block<T> &block) {
  if constexpr (!T::kAhead) block.look_up(block.begin + 1);
  if constexpr (T::kQueriesInRegisters) {
    ptx::cp_async_wait<T::kAhead ? 2 : 1>();  // Q
    ptx::block_barrier();
    load_queries<T>(block.q, block.queries(), block.lane);
  }
  const auto asked_for = [&block](int32_t n) { return T::kAhead && n == block.begin; };  // the tile behind n
  const auto wait = [&asked_for](int32_t n) {
    if (asked_for(n)) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
  };
  const auto step = [&](int32_t n) {
    wait(n);              // for this tile
    copies_barrier<T>();  // ... for all; and all are done with the tile before (and with Q's passage)
    if (!asked_for(n)) block.copy(n + 1);
    FLASHSPARK_NO_UNROLL
    for (int32_t piece = 0; piece < block.pieces(); ++piece) {
      const int32_t first = block.first_key(n, piece);
      if (!block.meets(first)) continue;
      Scores<T> s;
      block.scores(s, n, piece);
      block.change_and_mask(s, first);
      block.finish(s, n, piece);
    }
  };
  int32_t n = block.begin;
  FLASHSPARK_NO_UNROLL
  while (n < block.end) {
    if (n < block.plain_begin || n >= block.plain_end) {
      step(n++);
      continue;
    }
    block.loader.step(block.tiles.begin[0] + n + 1);
    FLASHSPARK_NO_UNROLL
    for (; n < block.plain_end; ++n) {
      wait(n);  // as in step()
      copies_barrier<T>();
      FLASHSPARK_NO_UNROLL
      for (int32_t piece = 0; piece < block.pieces(); ++piece) {
        Scores<T> s;
        block.scores(s, n, piece);
        if (piece == 0) {  // not before the first products: all warps would work out addresses at once
          const int32_t next = block.tiles.begin[0] + n + 1;
          if (!asked_for(n)) {
            block.loader.template copy_whole<false>(next, block.loader.k, block.stage(n + 1));
            block.loader.template copy_whole<true>(next, block.loader.v, block.stage(n + 1));
          }
          block.loader.step(1);
          if (!asked_for(n)) {
            ptx::cp_async_commit();
            block.loader.look_up_whole(next + 1);
          }
        }
        block.finish(s, n, piece);
      }
    }
    block.loader.step(-(block.tiles.begin[0] + n + 1));
  }
}

template <class T>
FLASHSPARK_DEVICE void run(Block<T> &block) {
  if constexpr (T::kSchedule == Schedule::single) {
    run_single(block);
  } else {
    run_ring(block);
  }
}

}  // namespace flashspark
