// The user's mask where blocks do not fit the kernel's tiles: a row keeps a key if its block is listed whole, or if it
// is listed and mask_mod keeps it.
#pragma once

#include "attention/block_list.cuh"
#include "attention/function_mod.cuh"

namespace flashspark {

// What the blocks say of the lane's columns, in each of its rows. Bit c: column c lies in a listed block. Bit 16 + c:
// in one that keeps all its keys.
//
// Columns are looked up 16 at a time, since a block has 16 keys at least: they lie in one block, or with left padding,
// behind which blocks are counted, in two.
template <class T>
FLASHSPARK_DEVICE void find_column_statuses(uint32_t (&rows)[T::kLaneRows], const typename T::KernelArguments &a,
                                            const DerivedKeyTiles &tiles, const RowTile &row_tile, int32_t first_key) {
  static_assert(T::kScoreKeys / 4 <= 16, "columns of a lane");
  const BlockStatuses &blocks = a.functions.blocks.statuses;
  const uint8_t *statuses[T::kLaneRows];
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    const int32_t token = divide(lane_row<T>(a, row_tile, n), a.group).quotient;
    statuses[n] = tiles.statuses + (divide(token, blocks.block_tokens).quotient - tiles.first_query_block);
    rows[n] = 0;
  }
  FLASHSPARK_UNROLL
  for (int32_t group = 0; group < T::kScoreKeys / 16; ++group) {
    const int32_t key = first_key + group * 16;  // below 0 in the left padding
    const int32_t block = divide(max_of(key, 0), blocks.block_keys).quotient;
    // Keys from the lane's first column, of columns 0, 1, 8 and 9, to the next block.
    const int32_t room = (block + 1) * static_cast<int32_t>(blocks.block_keys.value) - (key + ptx::lane() % 4 * 2);
    const uint32_t before = (room > 0 ? 1u : 0u) | (room > 1 ? 2u : 0u) | (room > 8 ? 4u : 0u) | (room > 9 ? 8u : 0u);
    const int32_t at = min_of(block, blocks.last_key_block) * blocks.tile_blocks;
    const int32_t next = min_of(block + 1, blocks.last_key_block) * blocks.tile_blocks;
    const auto both_bits = [](uint32_t status) { return (status & 1) | (status & 2) << 15; };
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kLaneRows; ++n) {
      uint32_t columns = both_bits(statuses[n][at]) * before;
      if (before != 15) columns |= both_bits(statuses[n][next]) * (15 - before);
      rows[n] |= columns << (4 * group);
    }
  }
}

// first_key: as a function counts keys.
template <class T>
FLASHSPARK_DEVICE void apply_blocks(Scores<T> &s, const typename T::KernelArguments &a, const DerivedKeyTiles &tiles,
                                    const RowTile &row_tile, ptx::SharedAddress function_rows, int32_t first_key) {
  using Mask = typename T::ScoreMod::Mask;
  uint32_t rows[T::kLaneRows];
  find_column_statuses<T>(rows, a, tiles, row_tile, first_key);
  const auto bit = [&](int32_t n, int32_t c) { return (rows[n] >> c & 1) != 0; };
  if constexpr (Mask::kExists) {
    for_each_function_score<T, Mask, T::ScoreMod::Score::kWords>(
        s, a.functions, function_rows, first_key,
        [&](float &x, const uint32_t *words, const typename Mask::Key &at, const FunctionKey &key, int32_t n,
            int32_t c) {
          const bool asked = Mask::keep(a.functions, words, at, key);
          if (!bit(n, 16 + c) && !(bit(n, c) && asked)) x = minus_infinity();
        });
  } else {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kLaneRows; ++n) {
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < T::kScoreKeys / 4; ++c) {
        if (!bit(n, c)) s.at[n / 2][c / 2][n % 2 * 2 + c % 2] = minus_infinity();
      }
    }
  }
}

}  // namespace flashspark
