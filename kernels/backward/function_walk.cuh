// The blocks of rows that the user's lists name, and what the lists say of tiles of scores in them.
#pragma once

#include "backward/function_traits.cuh"

namespace flashspark {

// What the user's lists say of rows and keys of a sequence.
struct SequenceBlocks {
  const BlockStatusTable &table;
  const uint8_t *statuses;  // of the sequence's first head

  FLASHSPARK_DEVICE int32_t query_block(int32_t token) const {
    return min_of(divide(token, table.block_tokens).quotient, table.query_blocks - 1);
  }
  FLASHSPARK_DEVICE int32_t key_block(int32_t key) const {
    return min_of(divide(key, table.block_keys).quotient, table.key_blocks - 1);
  }
  FLASHSPARK_DEVICE uint8_t at(int32_t head, int32_t query_block, int32_t key_block) const {
    return statuses[head * table.head_stride + static_cast<int64_t>(key_block) * table.query_blocks + query_block];
  }
};

// A block of rows that a CTA visits, and of its tiles of kScoreRows rows what the lists say of them and the warp's
// keys: two bits each.
struct ListedRows : RowWalk {
  uint32_t statuses;

  FLASHSPARK_DEVICE uint32_t status(int32_t tile) const { return statuses >> 2 * tile & 3; }
};

// Looks at 32 blocks of rows at a time, each lane at one, and keeps what it has seen.
template <class T>
struct ListedWalk {
  SequenceBlocks blocks;
  int32_t first_key, last_key, warp_key;  // of the CTA, which has one key at least; of the warp
  int32_t tokens, end_head;

  int32_t window, window_head;  // blocks [window, window + 32) of a head have been looked at; of all, if lists are
                                // of all
  uint32_t listed;              // those that the lists name for the CTA's keys
  uint32_t some[T::kRows / T::kScoreRows], whole[T::kRows / T::kScoreRows];

  static constexpr int32_t kTiles = T::kRows / T::kScoreRows;
  static_assert(2 * kTiles <= 32);

  FLASHSPARK_DEVICE void look(const RowWalk &at) {
    window = at.block, window_head = at.head;
    const int32_t block = window + ptx::lane();
    const int32_t own_block = blocks.key_block(min_of(warp_key, last_key));
    const int32_t first_block = blocks.key_block(first_key), last_block = blocks.key_block(last_key);
    uint32_t any = 0;
    FLASHSPARK_UNROLL
    for (int32_t tile = 0; tile < kTiles; ++tile) {
      const int32_t token = block * T::kRows + tile * T::kScoreRows;
      uint32_t own = kUnlisted;
      if (block < at.end && token < tokens) {
        const int32_t query_block = blocks.query_block(token);
        own = blocks.at(at.head, query_block, own_block);
        for (int32_t k = first_block; k <= last_block; ++k) any |= blocks.at(at.head, query_block, k);
      }
      some[tile] = ptx::ballot(own != kUnlisted), whole[tile] = ptx::ballot(own == kWhole);
    }
    listed = ptx::ballot(any != kUnlisted);
  }

  // Blocks of rows from the first one that lists which are of all heads name to behind the last one.
  FLASHSPARK_DEVICE Interval narrowed(const RowWalk &all) {
    if (!T::kBlockSparse || blocks.table.head_stride != 0) return {all.begin, all.end};
    Interval found{all.end, all.begin};
    RowWalk at = all;
    FLASHSPARK_NO_UNROLL
    for (; at.block < at.end; at.block += 32) {
      look(at);
      if (listed == 0) continue;
      found.begin = min_of(found.begin, at.block + static_cast<int32_t>(ptx::lowest_bit(listed)));
      found.end = min_of(at.block + 32, at.end);
    }
    return {ptx::uniform(found.begin), ptx::uniform(found.end)};
  }

  // The first block of rows from `at` on that the lists name; its head is end_head if there is none. All lanes call it.
  FLASHSPARK_DEVICE ListedRows find(RowWalk at) {
    constexpr uint32_t kAllListed = 0x55555555;
    if (at.begin >= at.end) return {{at.begin, at.end, end_head, at.begin}, 0};
    if constexpr (!T::kBlockSparse) {
      return {at, kAllListed};
    } else {
      while (at.head < end_head) {
        const bool other_head = blocks.table.head_stride != 0 && at.head != window_head;
        if (other_head || at.block < window || at.block >= window + 32) look(at);
        const uint32_t left = listed & ~0u << (at.block - window);
        if (left != 0) {
          const auto lane = ptx::lowest_bit(left);
          at.block = ptx::uniform(window + static_cast<int32_t>(lane));
          uint32_t statuses = 0;
          FLASHSPARK_UNROLL
          for (int32_t tile = 0; tile < kTiles; ++tile)
            statuses |= ((some[tile] >> lane & 1) | (whole[tile] >> lane & 1) << 1) << 2 * tile;
          return {at, statuses};
        }
        at.block = window + 32;
        if (at.block >= at.end) at = {at.begin, at.end, at.head + 1, at.begin};
      }
      return {at, 0};
    }
  }
};

}  // namespace flashspark
