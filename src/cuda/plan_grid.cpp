// The grid of the forward kernel: row tiles, splits of their keys, and the order of heads.
#include <algorithm>

#include "cuda/heuristics.hpp"
#include "cuda/planner.hpp"

namespace flashspark::cuda {
namespace {

// Heads whose row tiles run side by side, so that they find K and V in the L2. At least one wave of CTAs, or the
// sections themselves would leave SMs idle.
int64_t l2_section_heads(const Shape &shape, int64_t num_m_blocks, int64_t slots, const Machine &machine) {
  const int64_t bytes = machine.l2_bytes * heuristics_of(machine.arch).l2_section_percent / 100;
  const int64_t fit = bytes / std::max<int64_t>(1, shape.max_seqlen_k * shape.key_bytes);
  const int64_t wave = ceil_div(slots, std::max<int64_t>(1, num_m_blocks));
  return std::clamp<int64_t>(std::max(fit, wave), 1, shape.grid_heads);
}

Grid stream_k_grid(const Shape &shape, const Config &config, const Machine &machine) {
  const Tile &tile = *config.tile;
  const bool warps_split_rows = tile.runtime_key_groups() && shape.rows > tile.rows();
  Grid grid{};
  grid.stream_k = stream_k_limits(shape, config, machine);
  // The grid is flat: so many tiles of one head, in one section.
  grid.num_m_blocks = grid.stream_k.ctas;
  grid.num_heads_times_batch = grid.l2_section_heads = grid.num_splits = 1;
  grid.tile_rows = warps_split_rows ? tile.max_rows() : tile.rows();
  grid.key_groups = warps_split_rows ? 1 : tile.key_groups;
  return grid;
}

}  // namespace

int64_t choose_splits(const Shape &shape, const Config &config, const Machine &machine) {
  const Tile &tile = *config.tile;
  const int64_t keys = std::max<int64_t>(1, shape.visible_keys(ceil_div(tile.rows(), shape.group)));
  const int64_t key_tiles = ceil_div(keys, tile.keys);
  const int64_t row_tiles = shape.num_m_blocks(tile.rows()) * shape.grid_heads;
  if (shape.num_splits > 0) {
    const int64_t row_bytes = shape.partial_columns * static_cast<int64_t>(sizeof(float));
    const int64_t fit = kMaxScratchBytes / (row_tiles * tile.rows() * row_bytes);
    return std::max<int64_t>(1, std::min<int64_t>({shape.num_splits, key_tiles, kMaxSplits, fit}));
  }
  // A sequence must not depend on its neighbours, whose number sets the splits.
  if (shape.deterministic) return 1;
  const int64_t min_keys = heuristics_of(machine.arch).min_split_keys;
  const int64_t ctas = row_tiles * config.value_ctas;
  if (ctas * 2 > config.slots || keys <= min_keys * tile.key_groups) return 1;
  return std::clamp<int64_t>(config.slots / ctas, 1, std::min({kMaxSplits, key_tiles, ceil_div(keys, min_keys)}));
}

Grid choose_grid(const Shape &shape, const Config &config, const Machine &machine) {
  if (config.stream_k) return stream_k_grid(shape, config, machine);
  const int32_t tile_rows = config.tile->rows();
  const int64_t num_m_blocks = shape.num_m_blocks(tile_rows);
  return {.num_m_blocks = num_m_blocks,
          .num_heads_times_batch = shape.grid_heads,
          .l2_section_heads = l2_section_heads(shape, num_m_blocks, config.slots, machine),
          .num_splits = choose_splits(shape, config, machine),
          .tile_rows = tile_rows,
          .key_groups = config.tile->key_groups,
          .stream_k = {}};
}

}  // namespace flashspark::cuda
