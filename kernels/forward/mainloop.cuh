// The loop over tiles of keys, in two schedules. All copies are asynchronous and each schedule names what a barrier
// protects; a copy group that has nothing to copy is still committed, so that counts stay the same on the last tiles.
#pragma once

#include "forward/mma.cuh"
#include "forward/softmax.cuh"
#include "forward/tile_loader.cuh"

namespace flashspark {

// What a block keeps through the loop. Tiles are numbered 0, 1, ... in the order of `tiles`.
template <class T>
struct Mainloop {
  using Element = typename T::Element;

  const ForwardArguments &a;
  const RowTile &row_tile;
  const SequenceMask &mask;
  TileLoader<T> loader;
  KeyTiles tiles;
  int32_t begin, end;  // this split's piece
  // Tiles [plain_begin, plain_end) need no mask and their copies look at no key: the loops run them without a question.
  int32_t unmasked_begin, unmasked_end;
  KeyBounds warp_bounds;
  ptx::SharedAddress shared;
  LaneOffsets lane;
  LaneRowContext<T> rows[T::kLaneRows];
  Queries<T> q;
  Output<T> o;
  RowState<T> state;
  float qk_scale;  // softmax_scale times the factors of q and k

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
  static constexpr int32_t kSubtiles = T::kKeys / (T::kScoreKeys * T::kKeyGroups);
  FLASHSPARK_DEVICE int32_t num_subtiles() const {
    return T::kRuntimeKeyGroups && warps_split_rows<T>(a) ? T::kKeyGroups * kSubtiles : kSubtiles;
  }
  FLASHSPARK_DEVICE int32_t first_row_of(int32_t subtile) const {
    return ((T::kKeyGroups > 1 ? key_group<T>(a) * kSubtiles : 0) + subtile) * T::kScoreKeys;
  }
  FLASHSPARK_DEVICE int32_t first_key(int32_t n, int32_t subtile) const {
    return tiles.at(n) * T::kKeys + first_row_of(subtile);
  }

  // Whether any of the warp's rows keeps a key of this piece.
  FLASHSPARK_DEVICE bool visits(int32_t first) const {
    bool some = first < warp_bounds.visited[0].end && first + T::kScoreKeys > warp_bounds.visited[0].begin;
    if constexpr (T::kHasScoreMod)
      some = some || (first < warp_bounds.visited[1].end && first + T::kScoreKeys > warp_bounds.visited[1].begin);
    return some;
  }
  FLASHSPARK_DEVICE void qk(Scores<T> &s, int32_t n, int32_t subtile) const {
    multiply_keys<T>(s, q, queries(), stage(n) + first_row_of(subtile) * T::KeyLayout::kPitch, lane);
  }
  // Of q k, in natural units for instances that change scores, else in those of log2.
  FLASHSPARK_DEVICE float softmax_scale() const { return T::kDequantizeKV ? qk_scale : a.softmax_scale; }
  FLASHSPARK_DEVICE float scale() const { return T::kHasScoreMod ? 1.0f : softmax_scale(); }
  // What a piece of a tile that is not plain asks for: scale, caps and biases, and the mask where some row drops a key.
  FLASHSPARK_DEVICE void apply_score_mod_and_mask(Scores<T> &s, int32_t first) {
    bool full = first >= warp_bounds.unmasked[0].begin && first + T::kScoreKeys <= warp_bounds.unmasked[0].end;
    if constexpr (T::kHasScoreMod) {
      full = full || (first >= warp_bounds.unmasked[1].begin && first + T::kScoreKeys <= warp_bounds.unmasked[1].end);
      apply_score_mod<T>(s, rows, a, softmax_scale(), first);
    }
    if (!full) mask_scores<T>(s, rows, a, row_tile, mask, first);
  }
  // Softmax and product with V.
  FLASHSPARK_DEVICE void softmax_and_pv(const Scores<T> &s, int32_t n, int32_t subtile) {
    update_row_max<T>(row_maxima<T>(s), o, state, scale());
    multiply_values<T>(o, s, state, scale(), stage(n) + T::kKeyBytes + first_row_of(subtile) * T::ValueLayout::kPitch,
                       lane);
    update_rescale_thresholds<T>(state);
  }
};

// The copies of the first tile, or two, whose pages have been looked up: what else the loop needs is worked out while
// they are on their way.
template <class T>
FLASHSPARK_DEVICE void prologue(Mainloop<T> &mainloop) {
  if constexpr (T::kTwoTilePrologue) {
    FLASHSPARK_NO_UNROLL
    for (int32_t n = mainloop.begin; n < mainloop.begin + 2; ++n) mainloop.copy(n);
    return;
  }
  mainloop.copy_keys(mainloop.begin);
  if constexpr (T::kBuffering == Buffering::single_buffer) ptx::cp_async_commit();
  mainloop.copy_values(mainloop.begin);
  ptx::cp_async_commit();
}

// What a tile's copies are for: the warps of the block, or the warp itself.
template <class T>
FLASHSPARK_DEVICE void copy_barrier() {
  if constexpr (T::kWarpPrivateKV) {
    ptx::warp_barrier();
  } else {
    ptx::cta_barrier();
  }
}

// One buffer of K and one of V. Every barrier does two things: the copy awaited before it becomes visible to all, and
// all are done with the other buffer, which is refilled after it.
template <class T>
FLASHSPARK_DEVICE void run_single_buffered(Mainloop<T> &mainloop) {
  ptx::cp_async_wait<1>();  // Q and the first K
  ptx::cta_barrier();
  static_assert(T::kBuffering != Buffering::single_buffer || Mainloop<T>::kSubtiles == 1, "K is gone when V is used");
  FLASHSPARK_NO_UNROLL
  for (int32_t n = mainloop.begin; n < mainloop.end; ++n) {
    const int32_t first = mainloop.first_key(n, 0);
    const bool visits = mainloop.visits(first);
    Scores<T> s;
    mainloop.look_up(n + 1);
    if (visits) mainloop.qk(s, n, 0);
    ptx::cp_async_wait<0>();  // V of this tile
    copy_barrier<T>();        // ... for all; and all are done with K
    mainloop.copy_keys(n + 1);
    ptx::cp_async_commit();
    if (visits) {
      mainloop.apply_score_mod_and_mask(s, first);
      mainloop.softmax_and_pv(s, n, 0);
    }
    ptx::cp_async_wait<0>();  // K of the next tile
    copy_barrier<T>();        // ... for all; and all are done with V
    mainloop.copy_values(n + 1);
    ptx::cp_async_commit();
  }
}

// Two buffers of each; one barrier a tile.
template <class T>
FLASHSPARK_DEVICE void run_double_buffered(Mainloop<T> &mainloop) {
  if constexpr (!T::kTwoTilePrologue) mainloop.look_up(mainloop.begin + 1);
  if constexpr (T::kQueriesInRegisters) {
    ptx::cp_async_wait<T::kTwoTilePrologue ? 2 : 1>();  // Q
    ptx::cta_barrier();
    load_queries<T>(mainloop.q, mainloop.queries(), mainloop.lane);
  }
  const auto asked_for = [&mainloop](int32_t n) {
    return T::kTwoTilePrologue && n == mainloop.begin;
  };  // the tile behind n
  const auto wait = [&asked_for](int32_t n) {
    if (asked_for(n)) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
  };
  const auto step = [&](int32_t n) {
    wait(n);            // for this tile
    copy_barrier<T>();  // ... for all; and all are done with the tile before (and with Q's passage)
    if (!asked_for(n)) mainloop.copy(n + 1);
    FLASHSPARK_NO_UNROLL
    for (int32_t subtile = 0; subtile < mainloop.num_subtiles(); ++subtile) {
      const int32_t first = mainloop.first_key(n, subtile);
      if (!mainloop.visits(first)) continue;
      Scores<T> s;
      mainloop.qk(s, n, subtile);
      mainloop.apply_score_mod_and_mask(s, first);
      mainloop.softmax_and_pv(s, n, subtile);
    }
  };
  int32_t n = mainloop.begin;
  FLASHSPARK_NO_UNROLL
  while (n < mainloop.end) {
    if (n < mainloop.unmasked_begin || n >= mainloop.unmasked_end) {
      step(n++);
      continue;
    }
    mainloop.loader.step(mainloop.tiles.begin[0] + n + 1);
    FLASHSPARK_NO_UNROLL
    for (; n < mainloop.unmasked_end; ++n) {
      wait(n);  // as in step()
      copy_barrier<T>();
      FLASHSPARK_NO_UNROLL
      for (int32_t subtile = 0; subtile < mainloop.num_subtiles(); ++subtile) {
        Scores<T> s;
        mainloop.qk(s, n, subtile);
        if (subtile == 0) {  // not before the first products: all warps would work out addresses at once
          const int32_t next = mainloop.tiles.begin[0] + n + 1;
          if (!asked_for(n)) {
            mainloop.loader.template copy_whole<false>(next, mainloop.loader.k, mainloop.stage(n + 1));
            mainloop.loader.template copy_whole<true>(next, mainloop.loader.v, mainloop.stage(n + 1));
          }
          mainloop.loader.step(1);
          if (!asked_for(n)) {
            ptx::cp_async_commit();
            mainloop.loader.look_up_whole(next + 1);
          }
        }
        mainloop.softmax_and_pv(s, n, subtile);
      }
    }
    mainloop.loader.step(-(mainloop.tiles.begin[0] + n + 1));
  }
}

template <class T>
FLASHSPARK_DEVICE void run(Mainloop<T> &mainloop) {
  if constexpr (T::kBuffering == Buffering::single_buffer) {
    run_single_buffered(mainloop);
  } else {
    run_double_buffered(mainloop);
  }
}

}  // namespace flashspark
