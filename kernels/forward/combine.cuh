// Joins the pieces of split row tiles: out = sum of 2^(lse_n - lse) out_n, and the sink enters here. Block (x, y, z) is
// for a row tile, some of its rows and columns [128 z, 128 z + 128). Where x counts shares, all that end in a row tile
// and go on with it in the next share join it together: a tile of many pieces, one long sequence's among short ones,
// has as many blocks. One warp joins a row, or where there are many pieces up to eight, through shared memory. What
// follows from the lengths is worked out while the forward kernel runs.
#pragma once

#include "forward/epilogue.cuh"
#include "forward/stream_k.cuh"

namespace flashspark {

// What some pieces of a row add up to: two columns of a lane and the two that lie partial_pair_distance further,
// relative to `base` in units of log2.
struct PartialSum {
  float row_max, row_sum, at[4];
};

FLASHSPARK_DEVICE float finite_max(float maximum) {
  return maximum == minus_infinity() ? 0.0f : maximum;
}

FLASHSPARK_DEVICE void rebase(PartialSum &sums, float base) {
  const float factor = ptx::exp2_approx(sums.row_max - finite_max(base));
  sums.row_max = base;
  sums.row_sum *= factor;
  FLASHSPARK_UNROLL
  for (int32_t x = 0; x < 4; ++x) sums.at[x] *= factor;
}

// What the combine kernel has to join.
struct CombineTile {
  RowTile row_tile;
  int32_t count;             // pieces; < 2: nothing to do
  int32_t first, rest;       // places of the pieces: first, then rest + 1, rest + 2, ...
  int32_t worker, workers;   // among the x that join it
  bool surplus;              // no share is the block's: it may end at once
  bool launches_next_early;  // before the forward kernel has ended
};

FLASHSPARK_DEVICE CombineTile find_combine_tile(const ForwardArguments &a) {
  auto block = static_cast<int32_t>(ptx::cta_x());
  CombineTile split{};
  split.workers = 1;
  if (a.stream_k.ctas == 0) {
    split.row_tile = single_tile(a, grid_coordinate(a), a.tile_rows);
    split.count = split.row_tile.valid ? a.num_splits : 0;
    split.first = split.rest = block * a.num_splits;
    return split;
  }
  const SequenceWork w = sequence_work(a, a.tile_rows, a.tile_keys, 0);
  const Decomposition all = find_decomposition(a, a.tile_rows, a.tile_keys, w);
  // The next kernel's start-up passes beside this one: 32/2 D256 B1 2k 8.4 to 7.5 us, 64/8 B1 2k q=2 9.2 to 8.4,
  // B2 11.0 to 10.7 (H100). Only with little work in tiles of 16 rows, kind `decode`: blocks that come in while many
  // SMs are still busy lie unevenly (16/8 D64 B32 8k 182 to 198, 16/2 B8 2k q=8, which are `short_q`'s, 15.5 to 16.7).
  split.launches_next_early = a.tile_rows == 16 && all.total < a.stream_k.small_problem_tiles;
  int32_t position;
  if (a.combine_tiles > 0) {  // the block's own row tile
    const int32_t tiles = a.combine_tiles * a.num_heads_kv, seq = quotient(block, tiles), inside = block - seq * tiles;
    const int32_t lane = seq % 32;
    SequenceWork of = w;
    int32_t before = 0;
    for (int32_t first_seq = 32; first_seq <= seq; first_seq += 32) {
      before += ptx::shuffle(of.tiles_through + all.tile_start_cost * of.row_tiles_through, 31);
      of = sequence_work(a, a.tile_rows, a.tile_keys, first_seq);
    }
    const int32_t row_tiles = ptx::shuffle(of.row_tiles, lane),
                  each = ptx::shuffle(of.tiles, lane) + all.tile_start_cost;
    const int32_t head = quotient(inside, a.combine_tiles), row_tile = inside - head * a.combine_tiles;
    if (row_tile >= row_tiles) return split;
    position = before + ptx::shuffle(of.tiles_through + all.tile_start_cost * of.row_tiles_through, lane) -
               ((a.num_heads_kv - head) * row_tiles - row_tile) * each;
  } else {                                // the tile in which the block's share ends
    block = a.stream_k.ctas - 1 - block;  // shares that are too many first: their blocks leave room for others
    const auto [begin, end] = all.contiguous_range(block);
    split.surplus = begin >= end && block > 0;
    if (begin >= end) return split;
    position = end - 1;
  }
  BatchPrefix prefix{0, 0};
  const PositionedRowTile tile = row_tile_at(a, a.tile_rows, a.tile_keys, position, all.tile_start_cost, w, prefix);
  const Contributors contributors = contributors_of(all, tile.begin, tile.count);
  int32_t worker = 0, workers = 1;
  if (a.combine_tiles == 0) {
    worker = block - contributors.first_cta;
    workers = contributors.count - 1;
    if (worker == workers) return split;  // the last may as well go on with another tile, and end there
  }
  return {tile.row_tile,
          contributors.count,
          contributors.first_cta,
          a.stream_k.ctas + contributors.first_cta - 1,
          worker,
          workers,
          false,
          split.launches_next_early};
}

// A row that a warp joins: where its pieces lie, and where its result goes to. All that is known before they are there.
struct CombineRow {
  bool in_use;
  int32_t column;              // the first of the lane's 16
  int32_t partial_out_offset;  // of the lane's four columns among those of a place
  int32_t partial_lse_row;
  OutputRow result;
  int64_t out;  // offset of the row in out
  float sink;
};

FLASHSPARK_DEVICE CombineRow find_row(const ForwardArguments &a, const CombineTile &tile, int32_t tile_row, bool in_use,
                                      int32_t lane) {
  CombineRow row{};
  row.in_use = in_use;
  if (!in_use) return row;
  row.column = static_cast<int32_t>(ptx::cta_z()) * kCombineColumns + lane / 4 * 16;
  row.partial_out_offset = static_cast<int32_t>(partial_row(a, tile_row)) + partial_column(lane, row.column);
  row.partial_lse_row = tile_row;
  row.result = output_row(a, tile.row_tile, tile.row_tile.first_row + tile_row);
  row.out = out_offset(a, tile.row_tile, row.result);
  row.sink = sink_of(a, row.result.head);
  return row;
}

// Contributors first, first + step, ... of a row. What a lane needs of kCombinePartials of them is read before anything
// is looked at: scratch memory is 1 GiB at most, and offsets in it 32 bits.
FLASHSPARK_DEVICE PartialSum sum_partials(const ForwardArguments &a, const CombineTile &tile, const CombineRow &in,
                                          int32_t first, int32_t step) {
  PartialSum sums{minus_infinity(), 0, {}};
  const bool reads_out = in.column < a.head_dim_v;
  for (; first < tile.count; first += kCombinePartials * step) {
    float lse[kCombinePartials];
    ptx::Vector16 out[kCombinePartials];
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kCombinePartials; ++i) {
      const int32_t n = first + i * step;
      const int32_t row = (i == 0 && first == 0 ? tile.first : tile.rest + n) * a.tile_rows;
      lse[i] = minus_infinity();
      out[i] = {};
      if (n < tile.count) lse[i] = a.partial_lse[row + in.partial_lse_row];
      if (n < tile.count && reads_out)
        out[i] =
            *reinterpret_cast<const ptx::Vector16 *>(a.partial_out + (row * a.partial_columns + in.partial_out_offset));
    }
    float high = sums.row_max;
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kCombinePartials; ++i) {
      lse[i] *= kLog2E;
      high = larger(high, lse[i]);
    }
    rebase(sums, high);
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kCombinePartials; ++i) {
      const float weight = ptx::exp2_approx(lse[i] - finite_max(high));
      sums.row_sum += weight;
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 4; ++x) sums.at[x] += weight * ptx::as_float(out[i].word[x]);
    }
  }
  return sums;
}

// Adds the sums of the other warps of a row to those of its first.
FLASHSPARK_DEVICE void reduce_warps(PartialSum &sums, int32_t warp, int32_t lane, int32_t warps) {
  const auto memory = [](int32_t of_warp) { return ptx::shared_memory() + of_warp * kCombineWarpBytes; };
  const auto of_lane = static_cast<uint32_t>(lane) * 16;
  const bool first = (warp & (warps - 1)) == 0;
  if (!first) {
    store_4(memory(warp) + of_lane, sums.at[0], sums.at[1], sums.at[2], sums.at[3]);
    if (lane == 0) store_4(memory(warp) + kCombineColumns * 4, sums.row_max, sums.row_sum, 0, 0);
  }
  ptx::cta_barrier();  // the other warps' sums are there
  if (!first) return;
  // Of all that there may be at once: one after the other costs as many round trips.
  float base[kCombineWarps], sum[kCombineWarps];
  ptx::Vector16 at[kCombineWarps];
  float high = sums.row_max;
  FLASHSPARK_UNROLL
  for (int32_t w = 1; w < kCombineWarps; ++w) {
    const bool there = w < warps;
    const ptx::Vector16 ends = ptx::load_shared_16(memory(there ? warp + w : warp + 1) + kCombineColumns * 4);
    at[w] = ptx::load_shared_16(memory(there ? warp + w : warp + 1) + of_lane);
    base[w] = there ? ptx::as_float(ends.word[0]) : minus_infinity();
    sum[w] = ptx::as_float(ends.word[1]);
    high = larger(high, base[w]);
  }
  rebase(sums, high);
  FLASHSPARK_UNROLL
  for (int32_t w = 1; w < kCombineWarps; ++w) {
    const float weight = ptx::exp2_approx(base[w] - finite_max(high));
    sums.row_sum += sum[w] * weight;
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 4; ++x) sums.at[x] += ptx::as_float(at[w].word[x]) * weight;
  }
}

template <class Element>
FLASHSPARK_DEVICE void store_row(const ForwardArguments &a, const RowTile &row_tile, const CombineRow &row,
                                 const PartialSum &sums, int32_t lane) {
  const SinkRescale joined = add_sink(sums.row_max, row.sink);
  const float sum = sums.row_sum * joined.factor + joined.sink;
  const float inverse = sum == 0 ? 0.0f : joined.factor * ptx::reciprocal_approx(sum);
  if (lane == 0 && row.column == 0) store_lse(a, row_tile, row.result, lse_of(joined.maximum, sum));
  const int32_t own = row.column + lane % 4 * (a.partial_pair_distance == 8 ? 2 : 4);
  auto *to = static_cast<Element *>(a.out) + row.out + own;
  if (own < a.head_dim_v) store_2(to, ptx::pack<Element>(sums.at[0] * inverse, sums.at[1] * inverse));
  if (own + a.partial_pair_distance < a.head_dim_v)
    store_2(to + a.partial_pair_distance, ptx::pack<Element>(sums.at[2] * inverse, sums.at[3] * inverse));
}

template <class Element>
FLASHSPARK_DEVICE void combine(const ForwardArguments &a) {
  // Lengths may be read before the forward kernel has ended: it lets this one begin once what is before it has.
  const CombineTile tile = find_combine_tile(a);
  const auto warp = static_cast<int32_t>(ptx::thread_index() / 32),
             lane = static_cast<int32_t>(ptx::thread_index() % 32);
  // The block's rows, and the warps of each: as many as there is room for and pieces to do.
  const int32_t rows = max_of(0, min_of(a.tile_rows, tile.row_tile.end_row - tile.row_tile.first_row));
  const int32_t blocks = tile.workers * a.combine_ctas_per_tile;
  const int32_t block = tile.worker * a.combine_ctas_per_tile + static_cast<int32_t>(ptx::cta_y());
  const int32_t each = quotient(rows + blocks - 1, blocks);
  int32_t shift = 0;
  while ((each << shift) * 2 <= kCombineWarps && kCombinePartials << shift < tile.count) ++shift;
  const int32_t warps = 1 << shift, of_row = warp & (warps - 1);
  const int32_t at_once = kCombineWarps >> shift;  // rows
  const auto row_of = [&](int32_t of_block) {
    const int32_t tile_row = block * each + of_block;
    return find_row(a, tile, tile_row, of_block < each && tile_row < rows, lane);
  };
  CombineRow row = row_of(warp >> shift);
  if (tile.launches_next_early) ptx::grid_dependency_launch();
  // This kernel must not end before the forward kernel has: the block of share 0 always waits for that.
  if (tile.surplus) return;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (tile.count < 2) return;
  // More than once only where a row is one warp's.
  for (int32_t first = 0;;) {
    PartialSum sums{minus_infinity(), 0, {}};
    if (row.in_use) sums = sum_partials(a, tile, row, of_row, warps);
    if (warps > 1) reduce_warps(sums, warp, lane, warps);
    if (row.in_use && of_row == 0) store_row<Element>(a, tile.row_tile, row, sums, lane);
    first += at_once;
    if (first >= each) return;
    row = row_of(first + (warp >> shift));
  }
}

}  // namespace flashspark
