// Everything about a kernel that the compiler knows: its tile on this architecture, its formats, and what follows.
#pragma once

#include <type_traits>

#include "attention/mma/e4m3_dequant.cuh"
#include "attention/mma/f16.cuh"
#include "attention/score_mod.cuh"
#include "forward/arguments.hpp"
#include "forward/smem_plan.hpp"

namespace flashspark {

template <InstanceIndex index>
using InstanceScoreMod = std::conditional_t<kInstances[static_cast<int32_t>(index)].score_mod == ScoreMod::native,
                                            NativeScoreMod, NoScoreMod>;

// Mma_: the operand policy (attention/mma). ScoreMod_: the instance's, or the user's functions.
template <InstanceIndex index, Architecture arch, class Mma_, class ScoreMod_ = InstanceScoreMod<index>>
struct Traits {
  using Arguments = ForwardArguments;
  using ScoreMod = ScoreMod_;
  using KernelArguments = std::conditional_t<ScoreMod::kFunction, FunctionForwardArguments, ForwardArguments>;
  using Mma = Mma_;
  using Element = typename Mma::Element;      // of the products, q and out
  using ElementKV = typename Mma::ElementKV;  // of K and V in memory
  static constexpr Instance kInstance = kInstances[static_cast<int32_t>(index)];
#if defined(TUNE_WARPS)  // bench/gpu/tune.cu tries others
  static constexpr Tile kTile{
      TUNE_WARPS, TUNE_ROWS, TUNE_KEYS, TUNE_SCORES, TUNE_GROUPS, Buffering::TUNE_BUFFERING, QueryStorage::TUNE_QUERIES,
      TUNE_CTAS};
#else
  static constexpr Tile kTile = ScoreMod::kFunction
                                    ? function_tile(kInstance.tile(arch), ScoreMod::kDropout, ScoreMod::kLarge)
                                    : kInstance.tile(arch);
#endif
  // Stream-K counts key tiles by the lengths; lists of blocks say otherwise.
  static constexpr bool kStreamK = supports_stream_k(kInstance) && !ScoreMod::kBlockSparse;
  // Every warp copies the keys that it uses, and no warp waits for another before the end.
  static constexpr bool kWarpPrivateKV = kInstance.tiling == Tiling::decode;
  static constexpr Buffering kBuffering = kTile.buffering;
  static constexpr int32_t kStages = kTile.stages();
  static constexpr bool kQueriesInRegisters = kTile.queries != QueryStorage::shared;
  // Copies of two key tiles are in flight before the first is waited for: a Stream-K range may be no longer.
  static constexpr bool kTwoTilePrologue =
      kStreamK && kBuffering == Buffering::double_buffer && kTile.queries != QueryStorage::registers;

  static constexpr int32_t kHeadDim = kInstance.head_dim;
  static constexpr int32_t kHeadDimV = kInstance.head_dim_v;
  static constexpr int32_t kThreads = kTile.threads();
  static constexpr int32_t kRows = kTile.rows();
  static constexpr int32_t kKeys = kTile.keys;
  static constexpr int32_t kWarpRows = kTile.warp_rows;
  static constexpr int32_t kMAtoms = kWarpRows / 16;  // of a warp: m16 tiles of mma_m16n8k16
  static constexpr int32_t kLaneRows = 2 * kMAtoms;   // rows of which a lane holds scores
  static constexpr int32_t kKeyGroups = kTile.key_groups;
  static constexpr int32_t kRowWarps = kTile.warps / kKeyGroups;
  static constexpr bool kRuntimeKeyGroups = kTile.runtime_key_groups();
  static constexpr int32_t kMaxRows = kTile.max_rows();
  static constexpr int32_t kScoreKeys = kTile.score_keys;
  static constexpr int32_t kKeySteps = kScoreKeys / 16;   // k16 steps of P V
  static constexpr int32_t kDimSteps = kHeadDim / 16;     // k16 steps of Q K^T
  static constexpr int32_t kValueSteps = kHeadDimV / 16;  // pairs of n8 columns of P V

  using QueryLayout = TileLayout<kHeadDim>;
  using KeyLayout = TileLayout<kv_columns(kHeadDim, sizeof(ElementKV))>;
  using ValueLayout = TileLayout<kv_columns(kHeadDimV, sizeof(ElementKV))>;
  using OutputLayout = TileLayout<kHeadDimV>;

  static constexpr SharedMemoryPlan kSharedMemory = shared_memory_plan(kInstance, kTile, sizeof(ElementKV));
  // What the user's functions need to know of each row lies behind the rest (attention/function_mod.cuh).
  static constexpr int32_t kFunctionRows = kSharedMemory.total;
  static_assert(kFunctionRows + function_row_bytes(kTile, ScoreMod::kRowWords) <= kMaxSharedBytes);
  static_assert(kWarpRows % 16 == 0 && kTile.warps % kKeyGroups == 0);
  static_assert(kScoreKeys % 16 == 0 && kKeys % (kScoreKeys * kKeyGroups) == 0);
  static_assert(!kQueriesInRegisters || kBuffering != Buffering::single_buffer,
                "a single buffer has no second stage that Q could pass through");

  // Copies: 8 (or 4) neighbouring threads read one row, 128 (or 64) contiguous bytes an instruction; so do those that
  // read queries or write results.
  static constexpr int32_t kRowThreads =
      KeyLayout::kGroup < ValueLayout::kGroup ? KeyLayout::kGroup : ValueLayout::kGroup;
  static constexpr int32_t kQueryThreads =
      QueryLayout::kGroup < OutputLayout::kGroup ? QueryLayout::kGroup : OutputLayout::kGroup;
  static constexpr int32_t kQueryPassRows = kThreads / kQueryThreads;
  // The CTA copies a key tile together, or each warp its own keys, kPassRows rows at a time.
  static constexpr int32_t kCopyRows = kWarpPrivateKV ? kKeys / kTile.warps : kKeys;
  static constexpr int32_t kPassRows = (kWarpPrivateKV ? 32 : kThreads) / kRowThreads;
  static constexpr int32_t kPasses = kCopyRows / kPassRows;
  static_assert(kCopyRows % kPassRows == 0 && kRows % kQueryPassRows == 0);
  static_assert(!kWarpPrivateKV || (kRowWarps == 1 && kKeyGroups > 2), "the keys of a warp are those of its group");

  // Whether every warp has rows of its own. Otherwise warps w, w + kRowWarps, ... hold the same rows, in key groups
  // that split the keys of every tile.
  static FLASHSPARK_DEVICE bool warps_split_rows(const Arguments &a) {
    return kKeyGroups == 1 || (kRuntimeKeyGroups && a.key_groups == 1);
  }
  static FLASHSPARK_DEVICE int32_t rows(const Arguments &a) {
    return kRuntimeKeyGroups && warps_split_rows(a) ? kKeyGroups * kRows : kRows;
  }
  static FLASHSPARK_DEVICE int32_t key_group(const Arguments &a) {
    return warps_split_rows(a) ? 0 : ptx::warp() / kRowWarps;
  }
  // First row of the warp in the row tile.
  static FLASHSPARK_DEVICE int32_t first_warp_row(const Arguments &a) {
    const int32_t warp = ptx::warp();
    return (kRuntimeKeyGroups && warps_split_rows(a) ? warp : warp % kRowWarps) * kWarpRows;
  }
};

}  // namespace flashspark
