// What the host tells the kernel that derives lists of key tiles from the user's lists of blocks. Plain data; every
// pointer lies on the device.
#pragma once

#include "attention/arguments.hpp"
#include "attention/function_arguments.hpp"

namespace flashspark {

// Row tile i of the results is (sequence or 0, head or 0, row tile of the sequence).
struct BlockTileArguments : SequenceArguments {
  BlockList lists[2];                // the user's: masked, full
  Divisor block_tokens, block_keys;  // of a block
  int32_t last_query_block, last_key_block;
  Divisor heads, row_tiles;         // of the results: heads, or 1; row tiles of a sequence
  int32_t by_sequence;              // every sequence has results of its own
  int32_t tile_tokens, tile_keys;   // of the forward kernel's tiles
  int32_t key_tiles;                // of the longest sequence
  int32_t tile_blocks;              // query blocks that a row tile touches, at most
  uint8_t *statuses;                // (row tiles, row_tile_stride): BlockStatus (key blocks, tile_blocks)
  int64_t row_tile_stride;          // a multiple of 16
  int32_t *counts[2], *indices[2];  // (row tiles), (row tiles, key_tiles): masked, full
};

}  // namespace flashspark
