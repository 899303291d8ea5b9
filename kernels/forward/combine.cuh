// Combines the partial results of split row tiles: out = sum of 2^(lse_n - lse) out_n; attention sinks enter here.
//
// CTA (x, y, z) is for a row tile, some of its rows, and columns [128 z, 128 z + 128). Where x counts Stream-K ranges,
// all ranges that end in a row tile and go on with it in the next range combine it together: a row tile with many
// partials, one long sequence's among short ones, has as many CTAs. One warp combines a row, or up to eight where there
// are many partials, through shared memory. Everything that follows from the lengths is computed while the forward
// kernel runs.
#pragma once

#include "forward/output.cuh"
#include "forward/scheduler/stream_k.cuh"

namespace flashspark {

// The sum of some partials of a row, relative to row_max in units of log2: two columns of a lane, and the two that lie
// partial_pair_distance further.
struct PartialSum {
  float row_max, row_sum, at[4];
};

FLASHSPARK_DEVICE float finite_max(float maximum) {
  return maximum == minus_infinity() ? 0.0f : maximum;
}

FLASHSPARK_DEVICE void rebase(PartialSum &sums, float row_max) {
  const float factor = ptx::exp2_approx(sums.row_max - finite_max(row_max));
  sums.row_max = row_max;
  sums.row_sum *= factor;
  FLASHSPARK_UNROLL
  for (int32_t x = 0; x < 4; ++x) sums.at[x] *= factor;
}

// What a CTA combines.
struct CombineTile {
  RowTile rows;
  int32_t count;             // partials; < 2: nothing to do
  int32_t first, rest;       // their slots: first, then rest + 1, rest + 2, ...
  int32_t worker, workers;   // the CTA's index among the x that combine the row tile, and how many there are
  bool surplus;              // the CTA has no range and may end at once
  bool launches_next_early;  // the next kernel may begin before the forward kernel has ended
};

// The position that leads to the CTA's row tile where x counts row tiles; -1: there is none.
FLASHSPARK_DEVICE int32_t position_of_row_tile(const CombineArguments &a, const Decomposition &all, SequenceWork w) {
  const auto cta = static_cast<int32_t>(ptx::cta_x());
  const int32_t tiles = a.row_tiles * a.num_heads_kv, seq = quotient(cta, tiles), inside = cta - seq * tiles;
  const int32_t lane = seq % 32;
  int32_t before = 0;
  for (int32_t first_seq = 32; first_seq <= seq; first_seq += 32) {
    before += ptx::shuffle(w.tiles_through + all.tile_start_cost * w.row_tiles_through, 31);
    w = sequence_work<true>(a, a.tile_rows, a.tile_keys, first_seq);
  }
  const int32_t row_tiles = ptx::shuffle(w.row_tiles, lane), each = ptx::shuffle(w.tiles, lane) + all.tile_start_cost;
  const int32_t head = quotient(inside, a.row_tiles), row_tile = inside - head * a.row_tiles;
  if (row_tile >= row_tiles) return -1;
  return before + ptx::shuffle(w.tiles_through + all.tile_start_cost * w.row_tiles_through, lane) -
         ((a.num_heads_kv - head) * row_tiles - row_tile) * each;
}

FLASHSPARK_DEVICE CombineTile find_combine_tile(const CombineArguments &a) {
  auto cta = static_cast<int32_t>(ptx::cta_x());
  CombineTile tile{};
  tile.workers = 1;
  if (a.stream_k.ctas == 0) {
    tile.rows = single_tile(a, grid_coordinate(a), a.tile_rows);
    tile.count = tile.rows.valid ? a.num_splits : 0;
    tile.first = tile.rest = cta * a.num_splits;
    return tile;
  }
  // With the intervals of score modifications, which are off unless the forward kernel has them: both kernels find the
  // same ranges.
  const SequenceWork w = sequence_work<true>(a, a.tile_rows, a.tile_keys, 0);
  const Decomposition all = find_decomposition<true>(a, a.stream_k, a.tile_rows, a.tile_keys, w);
  // The next kernel's start-up then passes beside this one; only where there is little work in tiles of 16 rows, since
  // CTAs that come in while many SMs are still busy end up unevenly spread (docs/experiments.md E42).
  tile.launches_next_early = a.tile_rows == 16 && all.total < a.stream_k.small_problem_tiles;
  int32_t position;
  if (a.row_tiles > 0) {
    position = position_of_row_tile(a, all, w);
    if (position < 0) return tile;
  } else {  // the row tile in which the CTA's range ends; CTAs without a range come first and make room for others
    cta = a.stream_k.ctas - 1 - cta;
    const auto [begin, end] = all.contiguous_range(cta);
    tile.surplus = begin >= end && cta > 0;
    if (begin >= end) return tile;
    position = end - 1;
  }
  BatchPrefix prefix{0, 0};
  const PositionedRowTile found =
      row_tile_at<true>(a, a.tile_rows, a.tile_keys, position, all.tile_start_cost, w, prefix);
  const Contributors contributors = contributors_of(all, found.begin, found.count);
  if (a.row_tiles == 0) {
    const int32_t worker = cta - contributors.first_cta, workers = contributors.count - 1;
    if (worker == workers) return tile;  // the last contributor's range may end in a later row tile, which it combines
    tile.worker = worker;
    tile.workers = workers;
  }
  tile.rows = found.rows;
  tile.count = contributors.count;
  tile.first = contributors.first_cta;
  tile.rest = a.stream_k.ctas + contributors.first_cta - 1;
  return tile;
}

// A row that a warp combines: where its partials lie and where its result goes to, all known before they are computed.
struct CombineRow {
  bool in_use;
  int32_t column;              // the first of the lane's 16
  int32_t partial_out_offset;  // of the lane's four columns, in a slot
  int32_t partial_lse_row;
  OutputRow result;
  int64_t out;  // offset of the row in out
  float sink;
};

FLASHSPARK_DEVICE CombineRow find_row(const CombineArguments &a, const CombineTile &tile, int32_t tile_row, bool in_use,
                                      int32_t lane) {
  CombineRow row{};
  row.in_use = in_use;
  if (!in_use) return row;
  row.column = static_cast<int32_t>(ptx::cta_z()) * kCombineColumns + lane / 4 * 16;
  row.partial_out_offset = static_cast<int32_t>(partial_row(a, tile_row)) + partial_column(lane, row.column);
  row.partial_lse_row = tile_row;
  row.result = output_row(a, tile.rows, tile.rows.first_row + tile_row);
  row.out = out_offset(a, tile.rows, row.result);
  row.sink = sink_of(a, row.result.head);
  return row;
}

// Sums up partials first, first + step, ... of a row. A lane loads kCombinePartials of them before it uses one, since
// dependent loads would each cost a round trip. Scratch memory is 1 GiB at most, and offsets in it are 32 bits.
FLASHSPARK_DEVICE PartialSum sum_partials(const CombineArguments &a, const CombineTile &tile, const CombineRow &in,
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

// Adds the sums of a row's other warps to those of its first warp.
FLASHSPARK_DEVICE void reduce_warps(PartialSum &sums, int32_t warp, int32_t lane, int32_t warps) {
  const auto memory = [](int32_t of_warp) { return ptx::shared_memory() + of_warp * kCombineWarpBytes; };
  const auto of_lane = static_cast<uint32_t>(lane) * 16;
  const bool first = (warp & (warps - 1)) == 0;
  if (!first) {
    store_4(memory(warp) + of_lane, sums.at[0], sums.at[1], sums.at[2], sums.at[3]);
    if (lane == 0) store_4(memory(warp) + kCombineColumns * 4, sums.row_max, sums.row_sum, 0, 0);
  }
  ptx::cta_barrier();  // the other warps' sums are visible
  if (!first) return;
  // Load all partial sums before using one: dependent loads would each cost a shared-memory round trip.
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
FLASHSPARK_DEVICE void store_row(const CombineArguments &a, const RowTile &rows, const CombineRow &row,
                                 const PartialSum &sums, int32_t lane) {
  const SinkRescale joined = add_sink(sums.row_max, row.sink);
  const float sum = sums.row_sum * joined.factor + joined.sink;
  const float inverse = sum == 0 ? 0.0f : joined.factor * ptx::reciprocal_approx(sum);
  if (lane == 0 && row.column == 0) store_lse(a, rows, row.result, lse_of(joined.maximum, sum));
  const int32_t own = row.column + lane % 4 * (a.partial_pair_distance == 8 ? 2 : 4);
  auto *to = static_cast<Element *>(a.out) + row.out + own;
  if (own < a.head_dim_v) store_2(to, ptx::pack<Element>(sums.at[0] * inverse, sums.at[1] * inverse));
  if (own + a.partial_pair_distance < a.head_dim_v)
    store_2(to + a.partial_pair_distance, ptx::pack<Element>(sums.at[2] * inverse, sums.at[3] * inverse));
}

template <class Element>
FLASHSPARK_DEVICE void combine(const CombineArguments &a) {
  // Lengths may be read before the forward kernel has ended: it lets this one begin once the kernel before it has
  // ended.
  const CombineTile tile = find_combine_tile(a);
  const int32_t warp = ptx::warp(), lane = ptx::lane();
  // The CTA's rows, and the warps of each: as many as there is room for and partials to load.
  const int32_t rows = max_of(0, min_of(a.tile_rows, tile.rows.end_row - tile.rows.first_row));
  const int32_t ctas = tile.workers * a.ctas_per_tile;
  const int32_t cta = tile.worker * a.ctas_per_tile + static_cast<int32_t>(ptx::cta_y());
  const int32_t each = quotient(rows + ctas - 1, ctas);
  int32_t shift = 0;
  while ((each << shift) * 2 <= kCombineWarps && kCombinePartials << shift < tile.count) ++shift;
  const int32_t warps = 1 << shift, of_row = warp & (warps - 1);
  const int32_t at_once = kCombineWarps >> shift;  // rows
  const auto row_of = [&](int32_t of_cta) {
    const int32_t tile_row = cta * each + of_cta;
    return find_row(a, tile, tile_row, of_cta < each && tile_row < rows, lane);
  };
  CombineRow row = row_of(warp >> shift);
  if (tile.launches_next_early) ptx::grid_dependency_launch();
  // This kernel must not end before the forward kernel has: the CTA of range 0 always waits for that.
  if (tile.surplus) return;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (tile.count < 2) return;
  // More than once only where a row is one warp's.
  for (int32_t first = 0;;) {
    PartialSum sums{minus_infinity(), 0, {}};
    if (row.in_use) sums = sum_partials(a, tile, row, of_row, warps);
    if (warps > 1) reduce_warps(sums, warp, lane, warps);
    if (row.in_use && of_row == 0) store_row<Element>(a, tile.rows, row, sums, lane);
    first += at_once;
    if (first >= each) return;
    row = row_of(first + (warp >> shift));
  }
}

}  // namespace flashspark
