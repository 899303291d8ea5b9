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
    // Loads do not wait for each other: rows behind the last one ask for that one.
    uint32_t own[kTiles], any = 0;
    FLASHSPARK_UNROLL
    for (int32_t tile = 0; tile < kTiles; ++tile) {
      const int32_t token = block * T::kRows + tile * T::kScoreRows;
      own[tile] = blocks.at(at.head, blocks.query_block(min_of(token, tokens - 1)), own_block);
    }
    FLASHSPARK_UNROLL
    for (int32_t tile = 0; tile < kTiles; ++tile) {
      const int32_t token = block * T::kRows + tile * T::kScoreRows;
      if (block >= at.end || token >= tokens) own[tile] = kUnlisted;
      any |= own[tile];
      some[tile] = ptx::ballot(own[tile] != kUnlisted), whole[tile] = ptx::ballot(own[tile] == kWhole);
    }
    for (int32_t k = first_block; first_block != last_block && k <= last_block; ++k) {
      for (int32_t tile = 0; tile < kTiles; ++tile) {
        const int32_t token = block * T::kRows + tile * T::kScoreRows;
        if (block < at.end && token < tokens) any |= blocks.at(at.head, blocks.query_block(token), k);
      }
    }
    listed = ptx::ballot(any != kUnlisted);
  }

  // Blocks of rows from the first one that lists which are of all heads name to behind the last one.
  FLASHSPARK_DEVICE Interval narrowed(const RowWalk &all) {
    if (!T::kBlockSparse || blocks.table.head_stride != 0) return {all.begin, all.end};
    // By the lists' blocks, which are fewer.
    const int32_t last_token = min_of(all.end * T::kRows, tokens) - 1;
    if (all.begin >= all.end || last_token < 0) return {all.begin, all.begin};
    const int32_t first = blocks.query_block(all.begin * T::kRows), last = blocks.query_block(last_token);
    int32_t begin = INT32_MAX, end = -1;  // of the lane
    FLASHSPARK_NO_UNROLL
    for (int32_t n = first + ptx::lane(); n <= last; n += 32) {
      uint32_t any = 0;
      for (int32_t k = blocks.key_block(first_key); k <= blocks.key_block(last_key); ++k)
        any |= blocks.at(all.head, n, k);
      if (any != kUnlisted) begin = min_of(begin, n), end = n;
    }
    begin = ptx::reduce_min(begin), end = ptx::reduce_max(end);
    if (end < begin) return {all.begin, all.begin};
    const auto size = static_cast<int32_t>(blocks.table.block_tokens.value);
    const int64_t behind = (int64_t{end} + 1) * size;
    Interval found{max_of(all.begin, begin * size / T::kRows), all.end};
    // The last block of the table has all rows behind it, too.
    if (end + 1 < blocks.table.query_blocks && behind < int64_t{all.end} * T::kRows)
      found.end = ceil_div(static_cast<int32_t>(behind), T::kRows);
    return {ptx::uniform(found.begin), ptx::uniform(found.end)};
  }

  // Of a tile of kScoreRows rows of a block that has been looked at, what the lists say of it and the warp's keys.
  FLASHSPARK_DEVICE uint32_t status_of(int32_t block, int32_t tile) const {
    if constexpr (!T::kBlockSparse) return kListed;
    const int32_t at = block - window;
    return (some[tile] >> at & 1) | (whole[tile] >> at & 1) << 1;
  }

  // How many blocks from this one on, which find() has found, the lists name in a row, of the same head, for the CTA's
  // keys, not counting the last one, while of the warp's keys each has a named pair, or only such that are whole.
  FLASHSPARK_DEVICE int32_t run_of(const RowWalk &at, bool is_whole) const {
    if constexpr (!T::kBlockSparse) return at.end - 1 - at.block;
    uint32_t fit = is_whole ? ~0u : 0;
    FLASHSPARK_UNROLL
    for (int32_t tile = 0; tile < kTiles; ++tile) {
      if (is_whole) {
        fit &= T::Functions::Mask::kExists ? whole[tile] : some[tile];
      } else {
        fit |= some[tile];
      }
    }
    const int32_t first = at.block - window;
    if (static_cast<uint32_t>(first) >= 32) return 0;  // behind the last head
    const uint32_t others = ~(fit & listed >> 1) >> first;
    return others == 0 ? 0 : static_cast<int32_t>(ptx::lowest_bit(others));
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
        // The last one that has been looked at is only the next of another (run_of()).
        if (other_head || at.block < window || at.block >= window + 31) look(at);
        const uint32_t left = listed & ~0u << (at.block - window);
        if (left != 0) {
          const auto lane = ptx::lowest_bit(left);
          at.block = ptx::uniform(window + static_cast<int32_t>(lane));
          uint32_t statuses = 0;
          FLASHSPARK_UNROLL
          for (int32_t tile = 0; tile < kTiles; ++tile) statuses |= status_of(at.block, tile) << 2 * tile;
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
