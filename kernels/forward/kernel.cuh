// Forward attention: every CTA computes row tiles (the query heads of one KV head share K and V, so their rows are
// packed into one tile) over the keys that those rows keep, or over a part of these.
#pragma once

#include "forward/epilogue.cuh"
#include "forward/mainloop.cuh"
#include "forward/scheduler/metadata.cuh"

namespace flashspark {

// Stores what the mainloop has computed: rows of out, or a partial result.
template <class T>
FLASHSPARK_DEVICE void store(const typename T::KernelArguments &a, const RowTile &rows, const Mainloop<T> &mainloop,
                             const KeyTileRange &range, int32_t first_column) {
  if (T::kKeyGroups > 1 || range.is_final)
    ptx::cta_barrier();  // all are done with K, V and Q, whose memory the results pass through
  const EpilogueTile<T> result = reduce_key_groups<T>(a, rows, mainloop.o, mainloop.state, mainloop.shared);
  const int32_t column = first_column + EpilogueTile<T>::column();
  if (!range.is_final) {
    store_partial<T>(a, rows, result, mainloop.scales, column, range.partial_slot);
  } else if constexpr (T::kWarpPrivateKV) {
    store_out_direct<T>(a, rows, result, mainloop.scales, column);
  } else {
    store_out<T>(a, rows, result, mainloop.scales, mainloop.shared, column);
  }
}

// Computes a work tile and stores it. Where the scheduler has taken it from metadata that turns out to be stale,
// nothing is stored.
template <class T, class Scheduler>
FLASHSPARK_DEVICE void compute(const typename T::KernelArguments &a, Scheduler &scheduler, WorkTile work) {
  const RowTile &rows = work.rows;
  const auto start_queries = [&] {
    copy_queries<T>(a, rows, ptx::shared_memory() + T::kSharedMemory.queries);
    ptx::cp_async_commit();  // a group of its own, which ends even where no keys follow
  };
  const Keys keys = scheduler.keys(work);
  // Q is in flight while the masks are worked out, unless the previous kernel may still write it.
  if constexpr (T::Mma::kAsyncQueries && !T::kStreamK) start_queries();
  const SequenceMask mask = sequence_mask(a, rows, keys, scheduler.causal(work));
  const int32_t end_row = min_of(rows.first_row + T::rows(a), rows.end_row);
  const KeyBounds bounds = key_bounds<T::ScoreMod::kNative>(a, mask, rows.first_row, end_row);
  const KeyTilesOf<T> tiles = key_tiles_of<T>(a, rows, bounds);
  const auto [begin, end] = scheduler.key_tiles(work, tiles);
  const int32_t first_column = static_cast<int32_t>(ptx::cta_z()) * T::kHeadDimV;

  const int32_t warp_row = rows.first_row + ptx::uniform(T::first_warp_row(a));
  const int32_t warp_end = min_of(warp_row + T::kWarpRows, rows.end_row);
  // A warp without rows keeps no key. Where registers are scarce its bounds are found before the copies: otherwise
  // d128_prefill would spill (docs/experiments.md E22).
  const auto find_warp_bounds = [&] {
    return warp_row < warp_end ? key_bounds<T::ScoreMod::kNative>(a, mask, warp_row, warp_end) : no_keys();
  };
  const KeyBounds warp_bounds = T::kTwoTilePrologue ? no_keys() : find_warp_bounds();
  const RowTile kv_rows = with_kv_head<T>(a, rows);
  // clang-format off
  Mainloop<T> mainloop{a, rows, mask, make_tile_copy<T>(a, keys, bounds),
                       make_tile_loader<T, KVOperand::key>(a, kv_rows, keys),
                       make_tile_loader<T, KVOperand::value>(a, kv_rows, keys),
                       tiles, begin, end, 0, 0, warp_bounds, ptx::shared_memory(), lane_offsets<T>(a),
                       {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  // clang-format on
  scheduler.wait();
  mainloop.open_lists();
  mainloop.look_up(begin);
  // Page numbers are in flight. A stale record's keys are within the page table, too.
  if (!scheduler.confirm()) return;
  if constexpr (T::Mma::kAsyncQueries && T::kStreamK) start_queries();
  prologue(mainloop);
  if constexpr (T::kTwoTilePrologue) mainloop.warp_bounds = find_warp_bounds();
  if constexpr (!T::Mma::kAsyncQueries) copy_queries<T>(a, rows, mainloop.queries());
  mainloop.scales = T::Mma::scales(a, kv_rows);
  if constexpr (!T::ScoreMod::kNative && !T::ScoreMod::kBlockSparse) {
    // The two tiles behind an unmasked one, which are copied meanwhile, are full.
    const Interval full = full_tiles(mainloop.tile_copy, mainloop.k, mainloop.v);
    mainloop.unmasked_begin =
        max_of(begin, max_of(ceil_div(bounds.unmasked[0].begin, T::kKeys), full.begin) - tiles.begin[0]);
    mainloop.unmasked_end = min_of(end - 2, min_of(bounds.unmasked[0].end / T::kKeys, full.end - 2) - tiles.begin[0]);
  }
  if constexpr (!T::ScoreMod::kNative && T::ScoreMod::kBlockSparse) {
    // Begins of wild lengths may lie at the end of 32 bits.
    const Interval visited = mainloop.tile_copy.visited[0];
    const bool all_columns = mainloop.k.columns() >= T::kHeadDim && mainloop.v.columns() >= T::kHeadDimV;
    mainloop.unmasked_begin = static_cast<int32_t>((static_cast<uint32_t>(visited.begin) + T::kKeys - 1) / T::kKeys);
    mainloop.unmasked_end = all_columns ? visited.end / T::kKeys : 0;
  }
  if constexpr (T::ScoreMod::kDropout) mainloop.dropout_key = dropout_key(a.dropout);
  if constexpr (T::ScoreMod::kFunction)
    write_function_rows<T>(a, rows, keys, 1.0f / mainloop.natural_scale(), mainloop.dropout_key,
                           mainloop.shared + T::kFunctionRows);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    if constexpr (T::ScoreMod::kNative)
      mainloop.contexts[n] = T::ScoreMod::context(a, rows, mask, lane_row<T>(a, rows, n));
    mainloop.state.row_max[n] = mainloop.state.rescale_threshold[n] = kLowest;
  }
  if (begin < end) run(mainloop);
  ptx::cp_async_wait<0>();
  // Kernels without Stream-K find this and the slot again, instead of keeping both through the loop.
  const KeyTileRange range = T::kStreamK ? work.keys : even_split(a);
  store(a, rows, mainloop, range, first_column);
}

template <class T>
FLASHSPARK_DEVICE void forward(const typename T::KernelArguments &a) {
  using Scheduler = std::conditional_t<T::kStreamK, StreamKScheduler<T>, SingleTileScheduler<T>>;
  Scheduler scheduler{a};
  if (!scheduler.begin()) return;
  WorkTile work{};
  do {
    if (!scheduler.next(work)) return;
    if (work.rows.valid) compute<T>(a, scheduler, work);
  } while (scheduler.goes_on(work));
}

}  // namespace flashspark
