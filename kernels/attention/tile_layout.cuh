// Where the elements of a tile lie in shared memory.
#pragma once

#include "ptx/ptx.cuh"

namespace flashspark {

// A tile of rows of `columns` 16-bit units. The 16-byte chunks of a row are permuted by XOR so that eight neighbouring
// rows at one chunk lie in different banks: ldmatrix then runs without bank conflicts. Rows of a multiple of 128 bytes
// permute eight chunks by the row; rows of 192 bytes alternate between two halves of the banks by themselves and
// permute four chunks by half the row.
template <int32_t columns>
struct TileLayout {
  static constexpr int32_t kPitch = columns * 2;  // bytes
  static constexpr int32_t kChunks = columns / 8;
  static constexpr int32_t kGroup = kChunks % 8 == 0 ? 8 : 4;
  static_assert(columns % 32 == 0);

  static FLASHSPARK_DEVICE uint32_t swizzle(uint32_t row) { return kGroup == 8 ? row & 7 : row >> 1 & 3; }

  // Byte offset of a chunk < kGroup of a row. step() leads on to the other chunks.
  static FLASHSPARK_DEVICE uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kPitch + ((chunk ^ swizzle(row)) << 4);
  }
  // From offset(row, c) to offset(row + rows, c), where rows is a multiple of 4.
  static FLASHSPARK_DEVICE uint32_t down(uint32_t offset, uint32_t rows) {
    return (offset ^ swizzle(rows) << 4) + rows * kPitch;
  }
  // From offset(row, c) to the offset of chunk c + chunks, where c < kGroup and the bits of c and chunks are disjoint.
  // Bits 4 to 6 (or 5) of an offset are the permuted chunk alone, since pitches leave them 0.
  static FLASHSPARK_DEVICE uint32_t step(uint32_t offset, uint32_t chunks) {
    return (offset ^ (chunks % kGroup << 4)) + chunks / kGroup * (kGroup * 16);
  }
};

// The same without a permutation: each row has 16 bytes more, so that neighbouring rows lie in different banks by
// themselves. Offsets are then sums, whose constant parts instructions take as they are.
template <int32_t columns>
struct PaddedTileLayout {
  static constexpr int32_t kPitch = columns * 2 + 16;
  static constexpr int32_t kChunks = columns / 8;
  static constexpr int32_t kGroup = TileLayout<columns>::kGroup;

  static FLASHSPARK_DEVICE uint32_t offset(uint32_t row, uint32_t chunk) { return row * kPitch + chunk * 16; }
  static FLASHSPARK_DEVICE uint32_t down(uint32_t offset, uint32_t rows) { return offset + rows * kPitch; }
  static FLASHSPARK_DEVICE uint32_t step(uint32_t offset, uint32_t chunks) { return offset + chunks * 16; }
};

}  // namespace flashspark
