// Among how many CTAs the main kernel of a backward pass divides its work. Pure arithmetic.
#pragma once

#include "backward/config.hpp"
#include "cuda/plan.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

struct BackwardDivision {
  int64_t head_parts = 1;   // CTAs of a tile of keys, each with as many query heads of the group
  int64_t num_pieces = 0;   // > 0: CTAs with equal parts of all tiles (kernels/backward/pieces.cuh)
  int64_t head_length = 1;  // with pieces: positions of the tiles of a KV head
  double cost;              // about how long it takes, in products of a row with a key
  // With pieces in turns (kernels/backward/walks.cuh): walks of so many query heads of a group, and parts of each.
  int64_t num_walks = 0, walk_heads = 0, walk_parts = 0;
};

// Key tiles of a KV head: of one sequence, or with cu_seqlens_k of all (bound).
int64_t key_tiles_of_head(const Params &p, int64_t keys);

// Of so many heads, how many at most take turns with their tiles of keys.
int64_t section_heads(const Params &p, const BackwardTile &tile, int64_t ctas, int64_t places, int64_t heads);

// Whether CTAs may have parts of walks (SumOrder::walks).
bool fits_walks(const BackwardInstance &instance, const Params &p);

// The fastest for an instance that can run p.
BackwardDivision divide_backward(const BackwardInstance &instance, const Params &p, const Machine &machine);

}  // namespace flashspark::cuda
