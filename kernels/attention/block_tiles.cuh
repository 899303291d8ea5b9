// Lists of key tiles for each row tile of a forward kernel, from lists of blocks that do not fit its tiles, or that
// count keys behind a left padding. A key tile is full if all blocks that it touches are, for all rows of the row tile;
// masked if any is listed; else in neither list. Of the blocks in masked tiles the kernel asks the table of statuses
// (attention/block_status.cuh).
//
// One CTA a row tile: it writes the row tile's part of the table, which no other CTA reads, and its two lists.
#pragma once

#include "attention/block_list.cuh"
#include "attention/block_tiles.hpp"

namespace flashspark {

constexpr int32_t kBlockTileThreads = 128;

// What a CTA works on.
struct BlockTile {
  int64_t index;  // in the results
  int32_t seq, head;
  int32_t first_block, blocks;  // query blocks that the row tile touches
  int32_t first_key;            // of the sequence, in rows of its cache
  uint8_t *statuses;
};

// Whether the row tile has tokens. Nothing is read of sequences without.
FLASHSPARK_DEVICE bool find_block_tile(const BlockTileArguments &a, BlockTile &tile) {
  tile.index = ptx::cta_x();
  const Quotient list = divide(static_cast<int32_t>(ptx::cta_x()), a.row_tiles);
  const Quotient at = divide(list.quotient, a.heads);
  tile.seq = at.quotient;
  tile.head = at.remainder;
  const int32_t tokens = a.by_sequence ? queries_of(a, read_query_lengths(a, tile.seq)).tokens : a.max_seqlen_q;
  const int32_t first = list.remainder * a.tile_tokens;
  if (first >= tokens) return false;
  const int32_t last = min_of(first + a.tile_tokens, tokens) - 1;
  tile.first_block = min_of(divide(first, a.block_tokens).quotient, a.last_query_block);
  tile.blocks = min_of(divide(last, a.block_tokens).quotient, a.last_query_block) - tile.first_block + 1;
  tile.first_key = a.leftpad_k != nullptr ? find_keys(a, tile.seq).begin : 0;
  tile.statuses = a.statuses + tile.index * a.row_tile_stride;
  return true;
}

FLASHSPARK_DEVICE void clear_statuses(const BlockTileArguments &a, const BlockTile &tile) {
  auto *to = reinterpret_cast<ptx::Vector16 *>(tile.statuses);
  const int64_t vectors = a.row_tile_stride / 16;
  for (auto n = static_cast<int64_t>(ptx::thread_index()); n < vectors; n += kBlockTileThreads) to[n] = {};
}

// Every pair of a list and a query block has threads of its own.
FLASHSPARK_DEVICE void mark_statuses(const BlockTileArguments &a, const BlockTile &tile) {
  const auto thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t threads = quotient(kBlockTileThreads, 2 * tile.blocks);
  const int32_t pair = quotient(thread, threads);
  if (pair >= 2 * tile.blocks) return;
  const bool whole = pair >= tile.blocks;
  const int32_t block = whole ? pair - tile.blocks : pair;
  const BlockListRow row =
      row_of(a.lists[whole ? 1 : 0], tile.seq, tile.head, tile.first_block + block, a.last_key_block + 1);
  const uint8_t status = whole ? kWhole : kListed;
  FLASHSPARK_NO_UNROLL
  for (int32_t n = thread - pair * threads; n < row.blocks; n += 4 * threads) {
    int32_t at[4];  // loads first: they need not wait for each other
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < 4; ++m) at[m] = n + m * threads < row.blocks ? row.indices[n + m * threads] : -1;
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < 4; ++m) {
      if (m == 0 || n + m * threads < row.blocks)
        tile.statuses[clamp(at[m], 0, a.last_key_block) * a.tile_blocks + block] = status;
    }
  }
}

// What all blocks together say that a key tile touches.
FLASHSPARK_DEVICE BlockStatus status_of(const BlockTileArguments &a, const BlockTile &tile, int32_t key_tile) {
  const int32_t first_key = key_tile * a.tile_keys - tile.first_key, last_key = first_key + a.tile_keys - 1;
  if (last_key < 0) return kUnlisted;
  const int32_t first = divide(max_of(first_key, 0), a.block_keys).quotient;
  const int32_t last = min_of(divide(last_key, a.block_keys).quotient, a.last_key_block);
  uint32_t any = 0, all = kWhole;
  for (int32_t block = first; block <= last; ++block) {
    const uint8_t *statuses = tile.statuses + block * a.tile_blocks;
    for (int32_t n = 0; n < tile.blocks; ++n) {
      any |= statuses[n];
      all &= statuses[n];
    }
  }
  return any == 0 ? kUnlisted : all == kWhole ? kWhole : kListed;
}

// Warp 0 writes the list of masked tiles, warp 1 that of full ones.
FLASHSPARK_DEVICE void write_lists(const BlockTileArguments &a, const BlockTile &tile) {
  const int32_t list = ptx::warp(), lane = ptx::lane();
  if (list >= 2) return;
  const BlockStatus wanted = list == 0 ? kListed : kWhole;
  int32_t *indices = a.indices[list] + tile.index * a.key_tiles;
  int32_t count = 0;
  for (int32_t base = 0; base < a.key_tiles; base += 32) {
    const int32_t key_tile = base + lane;
    const bool is_one = key_tile < a.key_tiles && status_of(a, tile, key_tile) == wanted;
    const int32_t passed = prefix_sum(is_one ? 1 : 0);
    if (is_one) indices[count + passed - 1] = key_tile;
    count += ptx::shuffle(passed, 31);
  }
  if (lane == 0) a.counts[list][tile.index] = count;
}

FLASHSPARK_DEVICE void derive_block_tiles(const BlockTileArguments &a) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  BlockTile tile;
  if (!find_block_tile(a, tile)) return;
  clear_statuses(a, tile);
  ptx::cta_barrier();  // the table is clear
  mark_statuses(a, tile);
  ptx::cta_barrier();  // ... and complete
  write_lists(a, tile);
}

}  // namespace flashspark
