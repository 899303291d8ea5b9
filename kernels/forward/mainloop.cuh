// The loop over key tiles, with two buffers of K and V or with one. All copies are asynchronous, and every barrier says
// what it protects. A copy group that has nothing to copy is committed all the same, so that the counts of groups in
// flight stay the same on the last tiles.
#pragma once

#include "attention/block_status.cuh"
#include "attention/mma/products.cuh"
#include "attention/query_loader.cuh"
#include "attention/tile_loader.cuh"
#include "forward/traits.cuh"

namespace flashspark {

// What a CTA keeps through the loop. Key tiles are numbered 0, 1, ... in the order of `tiles`.
template <class T>
struct Mainloop {
  using ScoreMod = typename T::ScoreMod;

  const typename T::KernelArguments &a;
  const RowTile &row_tile;
  const SequenceMask &mask;
  KeyTileCopy<T> tile_copy;
  TileLoader<T, KVOperand::key> k;
  TileLoader<T, KVOperand::value> v;
  KeyTilesOf<T> tiles;
  int32_t begin, end;  // of this split or range
  // Tiles [unmasked_begin, unmasked_end) are full, as are the two behind them, and every row keeps all their keys: the
  // loop over them needs no predicates. Of block lists: key tiles that are full.
  int32_t unmasked_begin, unmasked_end;
  KeyBounds warp_bounds;
  ptx::SharedAddress shared;
  LaneOffsets lane;
  typename ScoreMod::RowContext contexts[T::kLaneRows];
  Queries<T> q;
  Output<T> o;
  RowState<T> state;
  typename T::Mma::Scales scales;
  PhiloxKey dropout_key;
  // Of block lists: tile `current` of `tiles` is key tile `tile`, the one behind it is `next`, which lies in `run`.
  // Looked up one step ahead, so that nothing waits for the list.
  int32_t current, tile, next;
  KeyTileRun run;

  // The key tile that is tile n of `tiles`.
  FLASHSPARK_DEVICE int32_t tile_at(int32_t n) const {
    if constexpr (ScoreMod::kBlockSparse) {
      if (n == current) return tile;
      if (n == current + 1) return next;
    }
    return tiles.at(n);
  }
  // Before the first tile is copied.
  FLASHSPARK_DEVICE void open_lists() {
    if constexpr (ScoreMod::kBlockSparse) {
      current = begin - 1;
      if (begin >= end) return;
      run = tiles.run_at(begin);
      next = begin + run.offset;
    }
  }
  // Tile n is next in the loop.
  FLASHSPARK_DEVICE void enter(int32_t n) {
    if constexpr (ScoreMod::kBlockSparse) {
      current = n;
      tile = next;
      if (n + 1 >= end) return;
      if (n + 1 >= run.end) run = tiles.run_at(n + 1);
      next = n + 1 + run.offset;
    }
  }

  // The first tile takes the first stage: queries on their way to registers lie in the second.
  FLASHSPARK_DEVICE ptx::SharedAddress stage(int32_t n) const {
    return shared + (T::kStages == 1 ? 0 : (n - begin) % 2 * static_cast<uint32_t>(T::kSharedMemory.stage));
  }
  FLASHSPARK_DEVICE ptx::SharedAddress value_stage(int32_t n) const { return stage(n) + T::kSharedMemory.keys; }
  FLASHSPARK_DEVICE ptx::SharedAddress queries() const { return shared + T::kSharedMemory.queries; }

  // Pages of tile n are looked up one step before they are used.
  FLASHSPARK_DEVICE void look_up(int32_t n) {
    if (n < end) tile_copy.look_up(tile_at(n));
  }
  FLASHSPARK_DEVICE void copy_keys(int32_t n) {
    if (n < end) k.copy(tile_copy, tile_at(n), stage(n));
  }
  FLASHSPARK_DEVICE void copy_values(int32_t n) {
    if (n < end) v.copy(tile_copy, tile_at(n), value_stage(n));
  }
  // A tile, whose pages were looked up last, and the pages of the tile behind it.
  FLASHSPARK_DEVICE void copy(int32_t n) {
    copy_keys(n);
    copy_values(n);
    ptx::cp_async_commit();
    look_up(n + 1);
  }

  // Of block lists: whether all keys of the next tile, n, which may not exist, take the short path of copies.
  FLASHSPARK_DEVICE bool is_full(int32_t n) const {
    if constexpr (!ScoreMod::kNative) return n < end && next >= unmasked_begin && next < unmasked_end;
    return n < end && k.columns() >= T::kHeadDim && v.columns() >= T::kHeadDimV && tile_copy.visits_all(tile_at(n));
  }

  // Moves the pointers on by `by` tiles of contiguous keys; pages are counted from where they began. Pointers of its
  // own for the unmasked loop would take registers that it needs (docs/experiments.md E11).
  FLASHSPARK_DEVICE void step_pointers(int32_t by) {
    if (tile_copy.pages != nullptr) return;
    k.data += by * (T::kKeys * a.k_strides.token);
    v.data += by * (T::kKeys * a.v_strides.token);
  }

  // A warp goes through its key group's part of a tile in subtiles of kScoreKeys keys.
  static constexpr int32_t kSubtiles = T::kKeys / (T::kScoreKeys * T::kKeyGroups);
  FLASHSPARK_DEVICE int32_t num_subtiles() const {
    return T::kRuntimeKeyGroups && T::warps_split_rows(a) ? T::kKeyGroups * kSubtiles : kSubtiles;
  }
  FLASHSPARK_DEVICE int32_t first_row_of(int32_t subtile) const {
    return ((T::kKeyGroups > 1 ? T::key_group(a) * kSubtiles : 0) + subtile) * T::kScoreKeys;
  }
  FLASHSPARK_DEVICE int32_t first_key(int32_t n, int32_t subtile) const {
    return tile_at(n) * T::kKeys + first_row_of(subtile);
  }

  // Whether any of the warp's rows keeps a key of the subtile that begins at key `first`.
  FLASHSPARK_DEVICE bool visits(int32_t first) const {
    bool some = first < warp_bounds.visited[0].end && first + T::kScoreKeys > warp_bounds.visited[0].begin;
    if constexpr (ScoreMod::kNative)
      some = some || (first < warp_bounds.visited[1].end && first + T::kScoreKeys > warp_bounds.visited[1].begin);
    return some;
  }
  FLASHSPARK_DEVICE void qk(Scores<T> &s, int32_t n, int32_t subtile) const {
    if constexpr (ScoreMod::kScoreBias)
      apply_score_function<T>(s, a.functions, function_rows(), natural_scale(), first_key(n, subtile) - mask.begin);
    qk_product<T>(s, q, queries(), stage(n) + first_row_of(subtile) * T::KeyLayout::kPitch, lane);
  }
  // From scores to units of log2. A score function's are relative to softmax_scale, other modifications' are in them.
  FLASHSPARK_DEVICE float scale() const {
    if constexpr (ScoreMod::kScoreFunction) return natural_scale() * kLog2E;
    return ScoreMod::kNative ? 1.0f : scales.qk(a);
  }
  // From Q K^T to natural units, for score functions, which divide by it: not too small.
  FLASHSPARK_DEVICE float natural_scale() const { return larger(scales.qk(a), kMinFunctionScale); }
  // Scales and modifies the scores of a subtile.
  FLASHSPARK_DEVICE void modify(Scores<T> &s, ScoreOffsets<T> &offsets, int32_t first) {
    if constexpr (ScoreMod::kNative) apply_score_mod<T>(s, contexts, a, scales.qk(a), first);
    if constexpr (ScoreMod::kScoreFunction && !ScoreMod::kScoreBias) {
      if constexpr (ScoreMod::kNative) to_raw_scores<T>(s, kLn2 / natural_scale());
      apply_score_function<T>(s, a.functions, function_rows(), natural_scale(), first - mask.begin);
    }
    if constexpr (ScoreMod::kScoreOffset)
      find_score_offsets<T>(offsets, a.functions, function_rows(), natural_scale(), first - mask.begin);
  }
  FLASHSPARK_DEVICE ptx::SharedAddress function_rows() const {
    return shared + T::kFunctionRows + T::first_warp_row(a) * 4;
  }
  FLASHSPARK_DEVICE ptx::SharedAddress dropout_rows() const {
    return dropout_rows_of<T>(shared + T::kFunctionRows) + T::first_warp_row(a) * 8;
  }
  // Asks the user's mask, unless tile n keeps all its keys.
  FLASHSPARK_DEVICE void ask_mask(Scores<T> &s, int32_t n, int32_t first) const {
    if constexpr (ScoreMod::kBlockStatus) {
      if (!tiles.keeps_all(n)) apply_blocks<T>(s, a, tiles, row_tile, function_rows(), first - mask.begin);
    } else if constexpr (ScoreMod::kFunction) {
      if (!tiles.keeps_all(n)) apply_mask_function<T>(s, a.functions, function_rows(), first - mask.begin);
    }
  }
  // The mask, but for the user's; only where some row drops a key.
  FLASHSPARK_DEVICE void mask_subtile(Scores<T> &s, int32_t first) const {
    bool unmasked = first >= warp_bounds.unmasked[0].begin && first + T::kScoreKeys <= warp_bounds.unmasked[0].end;
    if constexpr (ScoreMod::kNative)
      unmasked =
          unmasked || (first >= warp_bounds.unmasked[1].begin && first + T::kScoreKeys <= warp_bounds.unmasked[1].end);
    if (!unmasked) mask_scores<T>(s, contexts, a, row_tile, mask, first);
  }
  FLASHSPARK_DEVICE auto dropout(int32_t n, int32_t subtile) const {
    if constexpr (ScoreMod::kDropout) {
      return Dropout<T>{
          dropout_key, row_tile.seq, a.dropout.limit, a.dropout.flip, dropout_rows(), first_key(n, subtile), {}};
    } else {
      return NoDropout{};
    }
  }
  FLASHSPARK_DEVICE void softmax_and_pv(const Scores<T> &s, const ScoreOffsets<T> &offsets, int32_t n,
                                        int32_t subtile) {
    update_row_max<T>(row_maxima<T>(s), o, state, scale(), offsets);
    pv_product<T>(o, s, state, scale(), offsets, value_stage(n) + first_row_of(subtile) * T::ValueLayout::kPitch, lane,
                  dropout(n, subtile));
    update_rescale_thresholds<T>(state);
  }
};

// Starts the copies of the first tile, or two, whose pages have been looked up. What else the loop needs is computed
// while they are in flight.
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

// Those who use a tile's copies meet: the CTA, or a warp with keys of its own.
template <class T>
FLASHSPARK_DEVICE void copy_barrier() {
  if constexpr (T::kWarpPrivateKV) {
    ptx::warp_barrier();
  } else {
    ptx::cta_barrier();
  }
}

// Waits for a tile's copies; those of the next one may be in flight, as one group.
FLASHSPARK_DEVICE void wait_for_tile(bool next_is_in_flight) {
  if (next_is_in_flight) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
}

// One buffer of K and one of V. Every barrier does two things: it makes the copy awaited before it visible to all, and
// it says that all are done with the other buffer, which is refilled after it.
template <class T>
FLASHSPARK_DEVICE void run_single_buffered(Mainloop<T> &mainloop) {
  ptx::cp_async_wait<1>();  // Q and the first K
  ptx::cta_barrier();
  static_assert(T::kBuffering != Buffering::single_buffer || Mainloop<T>::kSubtiles == 1, "K is gone when V is used");
  FLASHSPARK_NO_UNROLL
  for (int32_t n = mainloop.begin; n < mainloop.end; ++n) {
    mainloop.enter(n);
    const int32_t first = mainloop.first_key(n, 0);
    const bool visits = mainloop.visits(first);
    Scores<T> s;
    ScoreOffsets<T> offsets;
    mainloop.look_up(n + 1);
    if (visits) mainloop.qk(s, n, 0);
    ptx::cp_async_wait<0>();  // V of this tile
    copy_barrier<T>();        // ... for all; and all are done with K
    mainloop.copy_keys(n + 1);
    ptx::cp_async_commit();
    if (visits) {
      mainloop.modify(s, offsets, first);
      mainloop.ask_mask(s, n, first);
      mainloop.mask_subtile(s, first);
      mainloop.softmax_and_pv(s, offsets, n, 0);
    }
    ptx::cp_async_wait<0>();  // K of the next tile
    copy_barrier<T>();        // ... for all; and all are done with V
    mainloop.copy_values(n + 1);
    ptx::cp_async_commit();
  }
}

// Two buffers of each: the next tile is in flight while this one is used, with one barrier a tile.

// Whether the prologue has started the copy of the tile behind n.
template <class T>
FLASHSPARK_DEVICE bool prologue_started_next(const Mainloop<T> &mainloop, int32_t n) {
  return T::kTwoTilePrologue && n == mainloop.begin;
}

// Tile n, whatever it is.
template <class T>
FLASHSPARK_DEVICE void step(Mainloop<T> &mainloop, int32_t n) {
  const bool in_flight = prologue_started_next(mainloop, n);
  wait_for_tile(in_flight);  // for this tile
  copy_barrier<T>();  // ... for all; and all are done with the tile before, or with Q where it passes on to registers
  if (!in_flight) mainloop.copy(n + 1);
  FLASHSPARK_NO_UNROLL
  for (int32_t subtile = 0; subtile < mainloop.num_subtiles(); ++subtile) {
    const int32_t first = mainloop.first_key(n, subtile);
    if (!mainloop.visits(first)) continue;
    Scores<T> s;
    ScoreOffsets<T> offsets;
    mainloop.qk(s, n, subtile);
    mainloop.modify(s, offsets, first);
    mainloop.ask_mask(s, n, first);
    mainloop.mask_subtile(s, first);
    mainloop.softmax_and_pv(s, offsets, n, subtile);
  }
}

// Tile n of unmasked ones, which are contiguous: the pointers are at the tile behind it.
template <class T>
FLASHSPARK_DEVICE void unmasked_step(Mainloop<T> &mainloop, int32_t n) {
  const bool in_flight = prologue_started_next(mainloop, n);
  wait_for_tile(in_flight);  // as in step()
  copy_barrier<T>();
  FLASHSPARK_NO_UNROLL
  for (int32_t subtile = 0; subtile < mainloop.num_subtiles(); ++subtile) {
    Scores<T> s;
    ScoreOffsets<T> offsets;
    mainloop.qk(s, n, subtile);
    if (subtile == 0) {  // behind the first products: before them, all warps would compute addresses at once (E9)
      const int32_t next = mainloop.tiles.begin[0] + n + 1;
      if (!in_flight) {
        mainloop.k.copy_full(mainloop.tile_copy, next, mainloop.k.data, mainloop.stage(n + 1));
        mainloop.v.copy_full(mainloop.tile_copy, next, mainloop.v.data, mainloop.value_stage(n + 1));
      }
      mainloop.step_pointers(1);
      if (!in_flight) {
        ptx::cp_async_commit();
        mainloop.tile_copy.look_up_full(next + 1);
      }
    }
    if constexpr (T::ScoreMod::kFunction) {
      mainloop.modify(s, offsets, mainloop.first_key(n, subtile));
      mainloop.ask_mask(s, n, mainloop.first_key(n, subtile));
    }
    mainloop.softmax_and_pv(s, offsets, n, subtile);
  }
}

// Tile n of a list, whose keys every row keeps, where the next tile is full.
template <class T>
FLASHSPARK_DEVICE void listed_step(Mainloop<T> &mainloop, int32_t n) {
  wait_for_tile(false);  // as in step()
  copy_barrier<T>();
  FLASHSPARK_NO_UNROLL
  for (int32_t subtile = 0; subtile < mainloop.num_subtiles(); ++subtile) {
    Scores<T> s;
    ScoreOffsets<T> offsets;
    mainloop.qk(s, n, subtile);
    if (subtile == 0) {
      const int32_t next = mainloop.tile_at(n + 1);
      mainloop.k.copy_full(mainloop.tile_copy, next, mainloop.k.data + next * (T::kKeys * mainloop.a.k_strides.token),
                           mainloop.stage(n + 1));
      mainloop.v.copy_full(mainloop.tile_copy, next, mainloop.v.data + next * (T::kKeys * mainloop.a.v_strides.token),
                           mainloop.value_stage(n + 1));
      ptx::cp_async_commit();
      mainloop.look_up(n + 2);
    }
    mainloop.modify(s, offsets, mainloop.first_key(n, subtile));
    mainloop.softmax_and_pv(s, offsets, n, subtile);
  }
}

template <class T>
FLASHSPARK_DEVICE void run_tiles(Mainloop<T> &mainloop) {
  int32_t n = mainloop.begin;
  FLASHSPARK_NO_UNROLL
  while (n < mainloop.end) {
    if (n < mainloop.unmasked_begin || n >= mainloop.unmasked_end) {
      step(mainloop, n++);
      continue;
    }
    mainloop.step_pointers(mainloop.tiles.begin[0] + n + 1);
    FLASHSPARK_NO_UNROLL
    for (; n < mainloop.unmasked_end; ++n) unmasked_step(mainloop, n);
    mainloop.step_pointers(-(mainloop.tiles.begin[0] + n + 1));
  }
}

template <class T>
FLASHSPARK_DEVICE void run_listed_tiles(Mainloop<T> &mainloop) {
  static_assert(!T::kTwoTilePrologue);
  FLASHSPARK_NO_UNROLL
  for (int32_t n = mainloop.begin; n < mainloop.end; ++n) {
    mainloop.enter(n);
    const int32_t first = mainloop.tile * T::kKeys;
    const Interval unmasked = mainloop.warp_bounds.unmasked[0];
    const bool keeps_all = mainloop.tiles.keeps_all(n) && first >= unmasked.begin && first + T::kKeys <= unmasked.end;
    // Warps may differ here: both steps have the same barriers and copies.
    if (keeps_all && mainloop.is_full(n + 1)) {
      listed_step(mainloop, n);
    } else {
      step(mainloop, n);
    }
  }
}

template <class T>
FLASHSPARK_DEVICE void run_double_buffered(Mainloop<T> &mainloop) {
  if constexpr (!T::kTwoTilePrologue) mainloop.look_up(mainloop.begin + 1);
  if constexpr (T::kQueriesInRegisters) {
    ptx::cp_async_wait<T::kTwoTilePrologue ? 2 : 1>();  // Q
    ptx::cta_barrier();
    load_queries<T>(mainloop.q, mainloop.queries(), mainloop.lane);
  }
  if constexpr (T::ScoreMod::kBlockSparse) {
    run_listed_tiles(mainloop);
  } else {
    run_tiles(mainloop);
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
