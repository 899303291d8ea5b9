// The part of a plan that the user's functions, block lists and dropout need (docs/design/score-graph.md,
// block-sparsity.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/block_tiles.hpp"
#include "cuda/shape.hpp"
#include "forward/arguments.hpp"
#include "forward/config.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

struct FunctionPlan {
  bool native = false, block_sparse = false, wide_positions = false, dropout = false, contiguous = false;
  FunctionArguments arguments{};
  DropoutArguments dropout_arguments{};
  std::optional<BlockTilePlan> block_tiles;  // where the kernel does not take the user's lists as they are
};

// Whether a kernel takes the user's lists as they are: row tiles lie in one query block, key tiles in one key block.
// True without lists.
bool fits_blocks(const Shape &shape, const Tile &tile);

// Of a problem that has functions, lists or dropout.
FunctionPlan plan_functions(const Params &p, const Shape &shape, const Instance &instance, const Tile &tile);

// Nothing is dropped where p.dropout_p is 0.
DropoutArguments dropout_arguments(const Params &p);

// What the functions capture.
void add_functions(const Params &p, FunctionArguments &a);

// Of a kernel that asks a mask function alone.
FunctionArguments mask_arguments(const flashspark_function &mask);

}  // namespace flashspark::cuda
