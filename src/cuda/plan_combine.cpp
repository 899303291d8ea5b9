// The grid of the combine kernel, which joins the partial results of split row tiles.
#include <algorithm>

#include "cuda/heuristics.hpp"
#include "cuda/planner.hpp"

namespace flashspark::cuda {
namespace {

// CTAs of y for one row tile: each row gets as many warps as its contributors keep busy, within one CTA an SM, since a
// second wave would come after the forward kernel's other work: E51.
int64_t ctas_per_tile(int64_t rows, int64_t contributors, int64_t tile_ctas, const Machine &machine) {
  const int64_t most_warps = machine.sm_count * kCombineWarps / (tile_ctas * rows);
  const int64_t wanted = std::min<int64_t>({kCombineWarps, most_warps, ceil_div(contributors, kCombinePartials)});
  int64_t warps = 1;
  while (warps < wanted) warps *= 2;
  return ceil_div(rows * warps, kCombineWarps);
}

}  // namespace

CombineGrid combine_grid(const Shape &shape, const Grid &grid, const Machine &machine) {
  const bool stream_k = grid.stream_k.ctas > 0;
  const int64_t rows = std::min<int64_t>(grid.tile_rows, shape.rows);
  const int64_t row_tiles = ceil_div(shape.rows, grid.tile_rows), all_row_tiles = row_tiles * shape.seq_heads;
  const int64_t z = ceil_div(shape.head_dim_v, kCombineColumns);
  // With Stream-K one CTA (of x) for each row tile, if there are so few that each has many contributors; else for each
  // range, since the host does not know which of them meet in one row tile.
  if (stream_k && all_row_tiles * kCombinePartials > grid.ctas()) {
    return {grid.ctas(), ceil_div(rows, heuristics_of(machine.arch).combine_rows), z, 0};
  }
  const int64_t x = stream_k ? all_row_tiles : grid.ctas();
  const int64_t contributors = stream_k ? grid.ctas() / x : grid.num_splits;
  return {x, ctas_per_tile(rows, contributors, x * z, machine), z, stream_k ? row_tiles : 0};
}

}  // namespace flashspark::cuda
