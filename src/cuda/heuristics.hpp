// The thresholds of the planner. docs/experiments.md has the measurement behind each (E26, E27, ...); measure again
// before you change one.
#pragma once

#include <cstdint>

#include "forward/config.hpp"

namespace flashspark::cuda {

struct Heuristics {
  // Cost of a row, relative to one in a tile of 32 rows a warp without key groups. The factors multiply.
  double cost_of_16_row_warps, cost_of_key_groups, cost_of_small_ctas;

  int64_t min_split_keys;      // keys in a split, about; a row tile with no more (times its key groups) is not split
  int64_t l2_section_percent;  // percent of the L2 for K and V of the heads in a section

  // When Stream-K is used.
  int64_t stream_k_keys_per_token;     // keys for each query token, at least
  int64_t stream_k_max_row_tiles;      // row tiles of a sequence and KV head, at most
  int64_t stream_k_reread_l2_percent;  // percent of the L2 that the keys may fill, times the row tiles that read them
  // How Stream-K cuts the work.
  int64_t min_range_keys, min_range_rows;  // keys in a range, at least, for each min_range_rows rows of a tile
  int64_t tile_start_cost;                 // cost of starting a row tile, in key tiles
  // With fewer keys an SM a problem is small, and takes one CTA an SM.
  int64_t small_decode_keys_per_column, max_small_decode_keys;  // tiling decode: times head_dim, at most
  int64_t small_short_q_tiles, max_small_short_q_keys;          // tiling short_q: in key tiles, at most

  int64_t combine_rows;  // rows of a Stream-K range's row tile that one combine CTA takes, at most
};

inline constexpr Heuristics kMeasuredOnH100{
    // Warps of 16 rows read K and V for half as many rows, key groups compute what lies beyond the diagonal, and every
    // CTA of at most 32 rows copies K and V of its own: E26.
    .cost_of_16_row_warps = 1.15,
    .cost_of_key_groups = 1.2,
    .cost_of_small_ctas = 1.15,
    // The launch of the combine kernel costs about what so many keys cost a CTA without key groups: E27.
    .min_split_keys = 512,
    // The other half is left to Q, to the results and to the section that comes next.
    .l2_section_percent = 50,
    // What has fewer keys is prefill, where masks cut a sequence's row tiles to different lengths.
    .stream_k_keys_per_token = 8,
    // Several row tiles read the same keys, which pays while the L2 holds most of them: E53.
    .stream_k_max_row_tiles = 8,
    .stream_k_reread_l2_percent = 150,
    // Shorter ranges write more partial results than they gain in balance, and the more rows the sooner: E35.
    .min_range_keys = 64,
    .min_range_rows = 32,
    // Without it the CTAs that meet many short sequences end last: E33.
    .tile_start_cost = 2,
    // Fewer contributors a row tile, and the combine kernel's CTAs find room beside them: E34, E36, E56.
    .small_decode_keys_per_column = 5,
    .max_small_decode_keys = 640,
    .small_short_q_tiles = 4,
    .max_small_short_q_keys = 256,
    // With fewer rows a CTA there are so many CTAs that their launch takes longer than their work: E55.
    .combine_rows = 32,
};

// One table so far: SM8x and SM12x have not been measured yet. What differs there comes from tiles and number of SMs.
constexpr const Heuristics &heuristics_of(Architecture) {
  return kMeasuredOnH100;
}

// Limits that hold on every GPU.
inline constexpr int64_t kMaxSplits = 128;
// A caller's own number of splits that asks for more scratch memory is taken for a mistake and cut: a dense batch of
// prompts could ask for all of a GPU. The combine kernel counts on offsets of 32 bits.
inline constexpr int64_t kMaxScratchBytes = int64_t{1} << 30;
// Of exact sums of captured tensors' gradients: what takes more is summed in several passes, each of which computes all
// scores again. A bias of 4096 x 4096 takes two thirds of it.
inline constexpr int64_t kMaxExactSumBytes = int64_t{2} << 30;
// Shared memory that the driver takes for every CTA.
inline constexpr int64_t kReservedSharedBytes = 1024;

}  // namespace flashspark::cuda
