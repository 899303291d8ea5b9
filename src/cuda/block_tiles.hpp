// Lists of a kernel's own tiles where the user's blocks do not fit them: they are derived on the device, in scratch
// memory, by a launch before the forward kernel's (kernels/attention/block_tiles.cuh).
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/block_tiles.hpp"
#include "cuda/shape.hpp"
#include "forward/config.hpp"
#include "problem.hpp"

namespace flashspark::cuda {

// The user's list as kernels take it.
BlockList block_list_of(const Params &p, const flashspark_block_list &list);

struct BlockTilePlan {
  BlockTileArguments arguments{};  // of Operation::attention_block_tiles
  BlockSparseArguments lists{};    // what the forward kernel reads of the result
  int64_t row_tiles = 0;           // CTAs
  size_t bytes = 0;                // of scratch memory, which bind() takes

  // Puts the result at `memory`, which is aligned to 16 bytes.
  void bind(void *memory);
};

// Throws where the result would take more than 1 GiB.
BlockTilePlan plan_block_tiles(const Params &p, const Shape &shape, const Tile &tile);

}  // namespace flashspark::cuda
