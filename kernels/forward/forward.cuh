// Forward attention: one block computes a tile of packed query rows (the query heads of one KV head share K and V) over
// the keys that those rows keep, or over one piece of them (split-KV).
#pragma once

#include "forward/pipeline.cuh"
#include "forward/results.cuh"
#include "forward/schedule.cuh"

namespace flashspark {

// The wait for the kernel ahead: of every block, or the next kernel might start before the one before this has ended.
FLASHSPARK_DEVICE void wait_for_kernel_ahead() {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
}

// Computes a piece of a row tile and stores it. Before the wait for the kernel ahead it comes from a line of a schedule
// (`scheduled`), and is left alone, with false, where that turns out to be of other lengths.
template <class T>
FLASHSPARK_DEVICE bool compute(const ForwardArguments &a, const Work &work, Piece piece, bool scheduled, Line line) {
  const auto start_queries = [&] {
    copy_queries<T>(a, work, ptx::shared_memory() + T::kQueryOffset);
    ptx::cp_async_commit();  // a group of its own, which ends even where no keys follow
  };
  const Keys keys = T::kShares && scheduled ? keys_of(a, line) : find_keys(a, work.seq);
  // Q is on its way while the masks are worked out, unless the kernel ahead may still write it.
  if constexpr (!T::kConverts && !T::kShares) start_queries();
  const Mask mask = find_mask(a, work, keys, T::kShares && scheduled ? line[kCausal] != 0 : is_causal(a, work.seq));
  const int32_t end_row = min_of(work.first_row + rows_of<T>(a), work.end_row);
  const Hull hull = hull_of<T::kChanged>(a, mask, work.first_row, end_row);
  const KeyTiles tiles = tiles_of<T::kKeys>(hull);
  int32_t begin, end;
  if (T::kShares && a.share_limits.shares > 0) {
    // The sequence's tiles, of which these rows may keep fewer.
    begin = min_of(max_of(piece.first - tiles.begin[0], 0), tiles.total());
    end = min_of(max_of(piece.first + piece.count - tiles.begin[0], 0), tiles.total());
  } else {
    const int32_t count = ceil_div(tiles.total(), a.num_splits);
    begin = min_of(static_cast<int32_t>(ptx::block_y()) * count, tiles.total());
    end = min_of(begin + count, tiles.total());
  }
  const int32_t first_column = static_cast<int32_t>(ptx::block_z()) * T::kHeadDimV;

  const int32_t warp_row = work.first_row + ptx::uniform(first_warp_row<T>(a));
  const int32_t warp_end = min_of(warp_row + T::kWarpRows, work.end_row);
  // A warp without rows keeps no key. Where registers are scarce its hull is found before the copies: d128 would spill.
  const auto find_warp_hull = [&] {
    return warp_row < warp_end ? hull_of<T::kChanged>(a, mask, warp_row, warp_end) : empty_hull();
  };
  const Hull warp_hull = T::kAhead ? empty_hull() : find_warp_hull();
  Block<T> block{a,
                 work,
                 mask,
                 make_loader<T>(a, work, keys, hull),
                 tiles,
                 begin,
                 end,
                 0,
                 0,
                 warp_hull,
                 ptx::shared_memory(),
                 lane_offsets<T>(a),
                 {},
                 {},
                 {},
                 {},
                 0};
  if (T::kShares && scheduled) wait_for_kernel_ahead();
  block.look_up(begin);
  // Page numbers are on their way; the line's keys are within the table, whatever lengths they are of.
  if (T::kShares && scheduled && sum_of_lengths(a) != line[kLengths]) return false;
  if constexpr (!T::kConverts && T::kShares) start_queries();
  start(block);
  if constexpr (T::kAhead) block.warp_hull = find_warp_hull();
  float value_scale = 1;
  if constexpr (T::kConverts) {
    copy_queries<T>(a, work, block.queries());
    block.converted_scale = larger(a.softmax_scale * scale_of(a.q_descale, work) * scale_of(a.k_descale, work), 1e-30f);
    value_scale = scale_of(a.v_descale, work);
  }
  if constexpr (!T::kChanged) {
    // Of a plain tile every row keeps every key, and the two tiles behind it, which are copied meanwhile, are whole.
    const Interval whole = block.loader.whole_tiles();
    block.plain_begin = max_of(begin, max_of(ceil_div(hull.core[0].begin, T::kKeys), whole.begin) - tiles.begin[0]);
    block.plain_end = min_of(end - 2, min_of(hull.core[0].end / T::kKeys, whole.end - 2) - tiles.begin[0]);
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    if constexpr (T::kChanged) block.rows[n] = changed_row(a, work, mask, lane_row<T>(a, work, n));
    block.state.base[n] = block.state.limit[n] = kLowest;
  }
  if (begin < end) run(block);
  ptx::cp_async_wait<0>();
  // Kernels without shares find it and the place again here, instead of keeping both through the loop.
  const bool whole = T::kShares ? piece.whole : a.num_splits == 1;
  if (T::kKeyGroups > 1 || whole)
    ptx::block_barrier();  // all are done with K, V and Q, whose memory the results pass through
  const Result<T> result = join_groups<T>(a, work, block.o, block.state, block.shared);
  const int32_t column = first_column + Result<T>::column();
  if (!whole) {
    store_partial<T>(a, work, result, value_scale, column, T::kShares ? piece.place : split_evenly(a).place);
  } else if constexpr (T::kOwnKeys) {
    store_columns<T>(a, work, result, value_scale, column);
  } else {
    store_final<T>(a, work, result, value_scale, block.shared, column);
  }
  return true;
}

template <class T>
FLASHSPARK_DEVICE void forward(const ForwardArguments &a) {
  Line line{};
  // Before all else: the rest up to the wait takes as long as its way.
  if (T::kShares && a.schedule != nullptr) line = read_line(a);
  const Place place = find_place(a);
  // Never: but what it asks for has to be there before the wait, and not after it.
  if (place.rank < 0 || !fetch(a)) return;
  const bool shared = T::kShares && a.share_limits.shares > 0;
  const ptx::SharedAddress memory = ptx::shared_memory() + T::kLoopBytes + ptx::thread_index() / 32 * kShareBytes;
  // Whether the next piece is the line's, and the wait still to come.
  bool scheduled = T::kShares && a.schedule != nullptr && is_of(a, line);
  if (!scheduled) wait_for_kernel_ahead();
  for (bool first = true;;) {
    Work work;
    Piece piece;
    if (T::kShares && scheduled) {
      work = work_of(a, line);
      piece = piece_of(a, line);
      if (piece.more) keep(memory, share_of(a, line));
      if (!work.found) {
        wait_for_kernel_ahead();
        if (sum_of_lengths(a) == line[kLengths]) return;
        scheduled = false;
        continue;
      }
    } else if (shared) {
      piece = take_piece(a, rows_of<T>(a), T::kKeys, first, memory, work);
    } else {
      work = find_work(a, place, T::kRows);
      piece = split_evenly(a);
    }
    if (!work.found) return;  // surplus blocks have read no tensor
    first = !compute<T>(a, work, piece, scheduled, line);
    scheduled = false;
    if (first) continue;  // with the piece that the lengths say
    if (!piece.more) return;
    ptx::block_barrier();  // all are done with this piece's shared memory
  }
}

}  // namespace flashspark
