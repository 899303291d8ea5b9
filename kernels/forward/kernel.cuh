// Forward attention: one block computes a tile of packed query rows (the query heads of one KV head share K and V) over
// the keys that those rows keep, or over one piece of them (split-KV).
#pragma once

#include "forward/epilogue.cuh"
#include "forward/mainloop.cuh"
#include "forward/scheduler_metadata.cuh"

namespace flashspark {

// The wait for the kernel ahead: of every block, or the next kernel might start before the one before this has ended.
FLASHSPARK_DEVICE void wait_for_previous_kernel() {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
}

// Computes a piece of a row tile and stores it. Before the wait for the kernel ahead it comes from a line of a schedule
// (`from_metadata`), and is left alone, with false, where that turns out to be of other lengths.
template <class T>
FLASHSPARK_DEVICE bool compute(const ForwardArguments &a, const RowTile &row_tile, KeyTileRange range,
                               bool from_metadata, MetadataRecord record) {
  const auto start_queries = [&] {
    copy_queries<T>(a, row_tile, ptx::shared_memory() + T::kQueryOffset);
    ptx::cp_async_commit();  // a group of its own, which ends even where no keys follow
  };
  const Keys keys = T::kStreamK && from_metadata ? keys_of(a, record) : find_keys(a, row_tile.seq);
  // Q is on its way while the masks are worked out, unless the kernel ahead may still write it.
  if constexpr (!T::kDequantizeKV && !T::kStreamK) start_queries();
  const SequenceMask mask = sequence_mask(
      a, row_tile, keys, T::kStreamK && from_metadata ? record[kCausal] != 0 : is_causal(a, row_tile.seq));
  const int32_t end_row = min_of(row_tile.first_row + rows_of<T>(a), row_tile.end_row);
  const KeyBounds bounds = key_bounds<T::kHasScoreMod>(a, mask, row_tile.first_row, end_row);
  const KeyTiles tiles = key_tiles<T::kKeys>(bounds);
  int32_t begin, end;
  if (T::kStreamK && a.stream_k.ctas > 0) {
    // The sequence's tiles, of which these rows may keep fewer.
    begin = min_of(max_of(range.first - tiles.begin[0], 0), tiles.total());
    end = min_of(max_of(range.first + range.count - tiles.begin[0], 0), tiles.total());
  } else {
    const int32_t count = ceil_div(tiles.total(), a.num_splits);
    begin = min_of(static_cast<int32_t>(ptx::cta_y()) * count, tiles.total());
    end = min_of(begin + count, tiles.total());
  }
  const int32_t first_column = static_cast<int32_t>(ptx::cta_z()) * T::kHeadDimV;

  const int32_t warp_row = row_tile.first_row + ptx::uniform(first_warp_row<T>(a));
  const int32_t warp_end = min_of(warp_row + T::kWarpRows, row_tile.end_row);
  // A warp without rows keeps no key. Where registers are scarce its hull is found before the copies: d128_prefill
  // would spill.
  const auto find_warp_bounds = [&] {
    return warp_row < warp_end ? key_bounds<T::kHasScoreMod>(a, mask, warp_row, warp_end) : no_keys();
  };
  const KeyBounds warp_bounds = T::kTwoTilePrologue ? no_keys() : find_warp_bounds();
  Mainloop<T> mainloop{a,
                       row_tile,
                       mask,
                       make_loader<T>(a, row_tile, keys, bounds),
                       tiles,
                       begin,
                       end,
                       0,
                       0,
                       warp_bounds,
                       ptx::shared_memory(),
                       lane_offsets<T>(a),
                       {},
                       {},
                       {},
                       {},
                       0};
  if (T::kStreamK && from_metadata) wait_for_previous_kernel();
  mainloop.look_up(begin);
  // Page numbers are on their way; the line's keys are within the table, whatever lengths they are of.
  if (T::kStreamK && from_metadata && lengths_checksum(a) != record[kLengthsChecksum]) return false;
  if constexpr (!T::kDequantizeKV && T::kStreamK) start_queries();
  prologue(mainloop);
  if constexpr (T::kTwoTilePrologue) mainloop.warp_bounds = find_warp_bounds();
  float value_scale = 1;
  if constexpr (T::kDequantizeKV) {
    copy_queries<T>(a, row_tile, mainloop.queries());
    mainloop.qk_scale =
        larger(a.softmax_scale * scale_of(a.q_descale, row_tile) * scale_of(a.k_descale, row_tile), 1e-30f);
    value_scale = scale_of(a.v_descale, row_tile);
  }
  if constexpr (!T::kHasScoreMod) {
    // Of a plain tile every row keeps every key, and the two tiles behind it, which are copied meanwhile, are whole.
    const Interval whole = mainloop.loader.whole_tiles();
    mainloop.unmasked_begin =
        max_of(begin, max_of(ceil_div(bounds.unmasked[0].begin, T::kKeys), whole.begin) - tiles.begin[0]);
    mainloop.unmasked_end = min_of(end - 2, min_of(bounds.unmasked[0].end / T::kKeys, whole.end - 2) - tiles.begin[0]);
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    if constexpr (T::kHasScoreMod) mainloop.rows[n] = make_row_context(a, row_tile, mask, lane_row<T>(a, row_tile, n));
    mainloop.state.row_max[n] = mainloop.state.rescale_threshold[n] = kLowest;
  }
  if (begin < end) run(mainloop);
  ptx::cp_async_wait<0>();
  // Kernels without shares find it and the place again here, instead of keeping both through the loop.
  const bool is_final = T::kStreamK ? range.is_final : a.num_splits == 1;
  if (T::kKeyGroups > 1 || is_final)
    ptx::cta_barrier();  // all are done with K, V and Q, whose memory the results pass through
  const EpilogueTile<T> result = reduce_key_groups<T>(a, row_tile, mainloop.o, mainloop.state, mainloop.shared);
  const int32_t column = first_column + EpilogueTile<T>::column();
  if (!is_final) {
    store_partial<T>(a, row_tile, result, value_scale, column,
                     T::kStreamK ? range.partial_slot : even_split(a).partial_slot);
  } else if constexpr (T::kWarpPrivateKV) {
    store_out_direct<T>(a, row_tile, result, value_scale, column);
  } else {
    store_out<T>(a, row_tile, result, value_scale, mainloop.shared, column);
  }
  return true;
}

template <class T>
FLASHSPARK_DEVICE void forward(const ForwardArguments &a) {
  MetadataRecord record{};
  // Before all else: the rest up to the wait takes as long as its way.
  if (T::kStreamK && a.scheduler_metadata != nullptr) record = read_record(a);
  const GridCoordinate coordinate = grid_coordinate(a);
  // Never: but what it asks for has to be there before the wait, and not after it.
  if (coordinate.rank < 0 || !warm_constant_cache(a)) return;
  const bool shared = T::kStreamK && a.stream_k.ctas > 0;
  const ptx::SharedAddress memory = ptx::shared_memory() + T::kLoopBytes + ptx::thread_index() / 32 * kWorkRangeBytes;
  // Whether the next piece is the line's, and the wait still to come.
  bool from_metadata = T::kStreamK && a.scheduler_metadata != nullptr && matches(a, record);
  if (!from_metadata) wait_for_previous_kernel();
  for (bool first = true;;) {
    RowTile row_tile;
    KeyTileRange range;
    if (T::kStreamK && from_metadata) {
      row_tile = row_tile_of(a, record);
      range = key_range_of(a, record);
      if (range.has_next) save_range(memory, work_range_of(a, record));
      if (!row_tile.valid) {
        wait_for_previous_kernel();
        if (lengths_checksum(a) == record[kLengthsChecksum]) return;
        from_metadata = false;
        continue;
      }
    } else if (shared) {
      range = next_key_range(a, rows_of<T>(a), T::kKeys, first, memory, row_tile);
    } else {
      row_tile = single_tile(a, coordinate, T::kRows);
      range = even_split(a);
    }
    if (!row_tile.valid) return;  // surplus blocks have read no tensor
    first = !compute<T>(a, row_tile, range, from_metadata, record);
    from_metadata = false;
    if (first) continue;  // with the piece that the lengths say
    if (!range.has_next) return;
    ptx::cta_barrier();  // all are done with this range's shared memory
  }
}

}  // namespace flashspark
