// Key tiles from lists of blocks (BlockSparseArguments): those that ask the user's mask, then those that keep all keys.
#pragma once

#include <type_traits>

#include "attention/function_arguments.hpp"
#include "attention/mask.cuh"

namespace flashspark {

// Tiles of a list that lie next to each other: tile n of them, up to `end`, is key tile offset + n.
struct KeyTileRun {
  int32_t offset, end;
};

// What is read of the lists is clamped to what exists, as lengths are.
struct ListedKeyTiles {
  const int32_t *masked, *full;  // key blocks
  int32_t num_masked, num_full;  // key tiles
  Divisor tiles_per_block;
  int32_t last_block;

  FLASHSPARK_DEVICE int32_t total() const { return num_masked + num_full; }
  FLASHSPARK_DEVICE bool keeps_all(int32_t n) const { return n >= num_masked; }
  FLASHSPARK_DEVICE int32_t at(int32_t n) const {
    const bool whole = keeps_all(n);
    const Quotient q = divide(whole ? n - num_masked : n, tiles_per_block);
    const int32_t block = clamp((whole ? full : masked)[q.quotient], 0, last_block);
    return block * static_cast<int32_t>(tiles_per_block.value) + q.remainder;
  }
  // The tiles from n on that lie next to each other, in at most 32 blocks. Each lane looks at one entry of the list, so
  // that a tile costs no access to memory, and no division.
  FLASHSPARK_DEVICE KeyTileRun run_at(int32_t n) const {
    const bool whole = keeps_all(n);
    const int32_t first = whole ? num_masked : 0, count = whole ? num_full : num_masked;
    const auto tiles = static_cast<int32_t>(tiles_per_block.value);
    const Quotient q = divide(n - first, tiles_per_block);
    const int32_t begin = n - q.remainder, lane = ptx::lane();
    const bool exists = lane * tiles < first + count - begin;
    const int32_t block = exists ? clamp((whole ? full : masked)[q.quotient + lane], 0, last_block) : 0;
    const int32_t first_block = ptx::shuffle(block, 0);
    const uint32_t others = ~ptx::ballot(exists && block == first_block + lane);
    const int32_t blocks = others == 0 ? 32 : static_cast<int32_t>(ptx::lowest_bit(others));
    return {first_block * tiles - begin, begin + blocks * tiles};
  }
};

// Key tiles of a list, and where its entries begin; head: a query head, or the first of its group where they share.
struct BlockListRow {
  const int32_t *indices;
  int32_t blocks;
};
FLASHSPARK_DEVICE BlockListRow row_of(const BlockList &list, int32_t seq, int32_t head, int32_t query_block,
                                      int32_t max_blocks) {
  if (list.counts == nullptr) return {nullptr, 0};
  const int32_t count = list.counts[seq * list.count_batch_stride + head * list.count_head_stride +
                                    query_block * list.count_block_stride];
  if (count <= 0) return {nullptr, 0};
  return {list.indices + seq * list.index_batch_stride + head * list.index_head_stride +
              query_block * list.index_block_stride,
          clamp(count, 0, min_of(list.width, max_blocks))};
}

FLASHSPARK_DEVICE ListedKeyTiles listed_key_tiles(const BlockSparseArguments &a, const RowTile &rows,
                                                  const Divisor &group) {
  const int32_t token = divide(rows.first_row, group).quotient;
  const int32_t query_block = min_of(divide(token, a.block_tokens).quotient, a.last_query_block);
  const int32_t head = rows.head_kv * static_cast<int32_t>(group.value);
  const BlockListRow masked = row_of(a.masked, rows.seq, head, query_block, a.last_key_block + 1);
  const BlockListRow full = row_of(a.full, rows.seq, head, query_block, a.last_key_block + 1);
  const auto tiles = static_cast<int32_t>(a.tiles_per_block.value);
  return {masked.indices,    full.indices,    ptx::uniform(masked.blocks) * tiles, ptx::uniform(full.blocks) * tiles,
          a.tiles_per_block, a.last_key_block};
}

// Key tiles of derived lists, and what the user's lists say of the blocks in them.
struct DerivedKeyTiles : ListedKeyTiles {
  const uint8_t *statuses;    // of the row tile: BlockStatus (key blocks, query blocks that it touches)
  int32_t first_query_block;  // that it touches
};

FLASHSPARK_DEVICE DerivedKeyTiles derived_key_tiles(const BlockSparseArguments &a, const RowTile &rows,
                                                    const Divisor &group) {
  const int32_t token = divide(rows.first_row, group).quotient;
  const int32_t row_tile = min_of(divide(token, a.block_tokens).quotient, a.last_query_block);
  const int32_t head = rows.head_kv * static_cast<int32_t>(group.value);
  const int64_t list = rows.seq * a.masked.count_batch_stride + head * a.masked.count_head_stride + row_tile;
  return {listed_key_tiles(a, rows, group), a.statuses.data + list * a.statuses.row_tile_stride,
          divide(token, a.statuses.block_tokens).quotient};
}

// What a kernel counts its key tiles with, and makes them from.
template <class T>
using KeyTilesOf = std::conditional_t<T::ScoreMod::kBlockStatus, DerivedKeyTiles,
                                      std::conditional_t<T::ScoreMod::kBlockSparse, ListedKeyTiles, KeyTiles>>;

template <class T>
FLASHSPARK_DEVICE KeyTilesOf<T> key_tiles_of(const typename T::KernelArguments &a, const RowTile &rows,
                                             const KeyBounds &bounds) {
  if constexpr (T::ScoreMod::kBlockStatus) {
    return derived_key_tiles(a.functions.blocks, rows, a.group);
  } else if constexpr (T::ScoreMod::kBlockSparse) {
    return listed_key_tiles(a.functions.blocks, rows, a.group);
  } else {
    return key_tiles<T::kKeys>(bounds);
  }
}

// The row tile with the head of K and V as its KV head, where heads of the grid have lists of their own.
template <class T>
FLASHSPARK_DEVICE RowTile with_kv_head(const typename T::KernelArguments &a, RowTile rows) {
  if constexpr (T::ScoreMod::kBlockSparse) rows.head_kv = divide(rows.head_kv, a.functions.blocks.kv_group).quotient;
  return rows;
}

}  // namespace flashspark
