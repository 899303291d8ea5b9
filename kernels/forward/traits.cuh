// Everything about an instance that the compiler knows: its tile on this architecture and the shapes that follow.
#pragma once

#include <type_traits>

#include "forward/arguments.hpp"
#include "forward/config.hpp"
#include "ptx/ptx.cuh"

namespace flashspark {

// A tile of 16-bit numbers in shared memory, rows of `columns`. The 16-byte chunks of a row are permuted by XOR so that
// eight neighbouring rows at one chunk lie in different banks: ldmatrix then runs without conflicts. Rows of a multiple
// of 128 bytes permute eight chunks by the row; rows of 192 bytes alternate between two halves of the banks by
// themselves and permute four chunks by half the row.
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

// StoredType: what K and V are in memory, NumberType or E4m3.
template <InstanceIndex index, Architecture arch, class Element_, class ElementKV_ = Element_>
struct Traits {
  using Element = Element_;
  using ElementKV = ElementKV_;
  static constexpr bool kDequantizeKV = !std::is_same_v<Element, ElementKV>;
  static constexpr Instance kInstance = kInstances[static_cast<int32_t>(index)];
#if defined(TUNE_WARPS)  // bench/gpu/tune.cu tries others
  static constexpr Tile kTile{
      TUNE_WARPS, TUNE_ROWS, TUNE_KEYS, TUNE_SCORES, TUNE_GROUPS, Buffering::TUNE_BUFFERING, QueryStorage::TUNE_QUERIES,
      TUNE_CTAS};
#else
  static constexpr Tile kTile = kInstance.tile(arch);
#endif
  static constexpr bool kHasScoreMod = kInstance.score_mod == ScoreMod::native;
  static constexpr bool kStreamK = supports_stream_k(kInstance);
  // Every warp copies the keys that it uses, and no warp waits for another before the end.
  static constexpr bool kWarpPrivateKV = kInstance.tiling == Tiling::decode;
  static constexpr Buffering kBuffering = kTile.buffering;
  static constexpr int32_t kStages = kTile.stages();
  static constexpr bool kQueriesInRegisters = kTile.queries != QueryStorage::shared;
  // Whether a block asks for two tiles at once before it waits for the first: its share may be no longer.
  static constexpr bool kTwoTilePrologue =
      kStreamK && kBuffering == Buffering::double_buffer && kTile.queries != QueryStorage::registers;

  static constexpr int32_t kHeadDim = kInstance.head_dim;
  static constexpr int32_t kHeadDimV = kInstance.head_dim_v;
  static constexpr int32_t kThreads = kTile.threads();
  static constexpr int32_t kRows = kTile.rows();
  static constexpr int32_t kKeys = kTile.keys;
  static constexpr int32_t kWarpRows = kTile.warp_rows;
  static constexpr int32_t kMAtoms = kWarpRows / 16;  // 16-row pieces of a warp
  static constexpr int32_t kLaneRows = 2 * kMAtoms;   // rows of which a lane holds scores
  static constexpr int32_t kKeyGroups = kTile.key_groups;
  static constexpr int32_t kRowWarps = kTile.warps / kKeyGroups;
  static constexpr bool kRuntimeKeyGroups = kTile.runtime_key_groups();
  static constexpr int32_t kMaxRows = kTile.max_rows();
  static constexpr uint32_t kEpilogueBytes = epilogue_bytes(kInstance, kTile);  // of a warp
  static constexpr int32_t kScoreKeys = kTile.score_keys;
  static constexpr int32_t kKeySteps = kScoreKeys / 16;   // k16 steps of P V
  static constexpr int32_t kDimSteps = kHeadDim / 16;     // k16 steps of Q K^T
  static constexpr int32_t kValueSteps = kHeadDimV / 16;  // pairs of n8 columns of P V

  using QueryLayout = TileLayout<kHeadDim>;
  using KeyLayout = TileLayout<kv_columns(kHeadDim, kDequantizeKV)>;
  using ValueLayout = TileLayout<kv_columns(kHeadDimV, kDequantizeKV)>;
  using OutputLayout = TileLayout<kHeadDimV>;

  // Shared memory: stages of (K, V); Q behind the first stage where it moves on to registers, else behind all.
  static constexpr uint32_t kKeyBytes = kKeys * KeyLayout::kPitch;
  static constexpr uint32_t kStageBytes = stage_bytes(kInstance, kTile, kDequantizeKV);
  static constexpr uint32_t kQueryOffset =
      kStageBytes * (kTile.queries == QueryStorage::registers ? 1 : kTile.stages());
  static constexpr uint32_t kLoopBytes = loop_bytes(kInstance, kTile, kDequantizeKV);
  static constexpr uint32_t kSharedBytes = shared_bytes(kInstance, kTile, kDequantizeKV);
  static_assert(kSharedBytes <= 99 * 1024, "an SM12x block has 99 KB");
  static_assert(kWarpRows % 16 == 0 && kTile.warps % kKeyGroups == 0);
  static_assert(kScoreKeys % 16 == 0 && kKeys % (kScoreKeys * kKeyGroups) == 0);
  static_assert(!kQueriesInRegisters || kBuffering != Buffering::single_buffer,
                "single has no stage that Q could pass through");

  // Copies: 8 (or 4) neighbouring threads read one row, 128 (or 64) contiguous bytes an instruction; so do those that
  // read queries or write results.
  static constexpr int32_t kRowThreads =
      KeyLayout::kGroup < ValueLayout::kGroup ? KeyLayout::kGroup : ValueLayout::kGroup;
  static constexpr int32_t kQueryThreads =
      QueryLayout::kGroup < OutputLayout::kGroup ? QueryLayout::kGroup : OutputLayout::kGroup;
  static constexpr int32_t kQueryPassRows = kThreads / kQueryThreads;
  // Those that copy a tile of keys together, a pass of so many rows at a time: the block, or a warp for itself.
  static constexpr int32_t kCopyRows = kWarpPrivateKV ? kKeys / kTile.warps : kKeys;
  static constexpr int32_t kPassRows = (kWarpPrivateKV ? 32 : kThreads) / kRowThreads;
  static constexpr int32_t kPasses = kCopyRows / kPassRows;
  static_assert(kCopyRows % kPassRows == 0 && kRows % kQueryPassRows == 0);
  static_assert(!kWarpPrivateKV || (kRowWarps == 1 && kKeyGroups > 2), "the keys of a warp are those of its group");
};

// True: all warps of a runtime_key_groups tile go side by side, and none shares keys with another.
template <class T>
FLASHSPARK_DEVICE bool warps_split_rows(const ForwardArguments &a) {
  return T::kKeyGroups == 1 || (T::kRuntimeKeyGroups && a.key_groups == 1);
}
template <class T>
FLASHSPARK_DEVICE int32_t rows_of(const ForwardArguments &a) {
  return T::kRuntimeKeyGroups && warps_split_rows<T>(a) ? T::kKeyGroups * T::kRows : T::kRows;
}
// Warps w, w + kRowWarps, ... hold the same rows and are in different key groups.
template <class T>
FLASHSPARK_DEVICE int32_t key_group(const ForwardArguments &a) {
  return warps_split_rows<T>(a) ? 0 : static_cast<int32_t>(ptx::thread_index() / 32) / T::kRowWarps;
}
// First row of the warp within the block's tile.
template <class T>
FLASHSPARK_DEVICE int32_t first_warp_row(const ForwardArguments &a) {
  const auto warp = static_cast<int32_t>(ptx::thread_index() / 32);
  return (T::kRuntimeKeyGroups && warps_split_rows<T>(a) ? warp : warp % T::kRowWarps) * T::kWarpRows;
}

// What a lane holds, in the layouts of mma_m16n8k16: scores and output as D, Q as A.
template <class T>
struct Scores {
  float at[T::kMAtoms][T::kScoreKeys / 8][4];
};
template <class T>
struct Output {
  float at[T::kMAtoms][T::kHeadDimV / 8][4];
};
template <class T>
struct Queries {
  uint32_t at[T::kMAtoms][T::kQueriesInRegisters ? T::kDimSteps : 1][4];
};

}  // namespace flashspark
