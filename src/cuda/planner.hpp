// The parts of make_plan(), in the order in which it takes them: configuration, grid, scratch memory, combine grid.
#pragma once

#include "cuda/plan.hpp"
#include "cuda/shape.hpp"

namespace flashspark::cuda {

// A kernel, and how many of its CTAs the GPU holds.
struct Config {
  const Instance *instance;
  const Tile *tile;
  bool stream_k;       // CTAs take even ranges of all work, found on the device (stream_k.cuh)
  int64_t value_ctas;  // that compute parts of a head_dim_v wider than the instance's, each with scores of its own
  int64_t ctas_per_sm;
  int64_t slots;          // CTAs that run at once
  uint32_t shared_bytes;  // of a launch
};
Config config_of(const Shape &shape, const Instance &instance, const Machine &machine);
Config choose_config(const Shape &shape, const Machine &machine);

struct Grid {
  int64_t num_m_blocks, num_heads_times_batch, l2_section_heads, num_splits;
  int32_t tile_rows, key_groups;
  StreamKLimits stream_k;  // ctas == 0: CTAs take row tiles as they come

  int64_t ctas() const { return num_m_blocks * num_heads_times_batch; }  // of x
  bool is_split() const { return num_splits > 1 || stream_k.ctas > 0; }
};
Grid choose_grid(const Shape &shape, const Config &config, const Machine &machine);

// Splits of the keys of every row tile, for grids without Stream-K.
int64_t choose_splits(const Shape &shape, const Config &config, const Machine &machine);

// Whether Stream-K serves the problem, and within which limits the device cuts it.
bool uses_stream_k(const Shape &shape, const Instance &instance, const Machine &machine);
StreamKLimits stream_k_limits(const Shape &shape, const Config &config, const Machine &machine);

// A hash of all that the ranges depend on beside the lengths themselves.
int32_t metadata_fingerprint(const ForwardArguments &a);

struct CombineGrid {
  int64_t x, y, z;
  int64_t row_tiles;  // Stream-K, if CTA x combines row tile x: row tiles of a sequence and KV head; else 0
};
CombineGrid combine_grid(const Shape &shape, const Grid &grid, const Machine &machine);

// The architecture whose tiles a GPU takes: its own, but for builds that time SM12x's tiles on another GPU.
Architecture tiles_of(const Machine &machine);

}  // namespace flashspark::cuda
