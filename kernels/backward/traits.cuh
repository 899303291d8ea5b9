// Everything about a backward kernel that the compiler knows: its tile on this architecture, its type, and what
// follows.
#pragma once

#include <type_traits>

#include "attention/mma/f16.cuh"
#include "attention/score_mod.cuh"
#include "backward/arguments.hpp"
#include "backward/smem_plan.hpp"

namespace flashspark {

constexpr bool is_native(const BackwardInstance &instance) {
  return instance.score_mod == ScoreMod::native;
}

template <BackwardIndex index, Architecture arch, class Element_>
struct BackwardTraits {
  using Arguments = BackwardArguments;
  using Element = Element_;
  using ElementKV = Element_;
  using Mma = MmaF16<Element>;
  static constexpr BackwardInstance kInstance = instance_of(index);
#if defined(TUNE_WARPS)  // bench/gpu/backward_tune.sh tries others
  static constexpr BackwardTile kTile{TUNE_WARPS,
                                      TUNE_KEYS,
                                      TUNE_ROWS,
                                      TUNE_SCORES,
                                      TUNE_K,
                                      TUNE_V,
                                      RowStages::TUNE_STAGES,
                                      KeySharing::TUNE_SHARING,
                                      TUNE_CTAS,
                                      kInstance.tile(arch).order};
#else
  static constexpr BackwardTile kTile = kInstance.tile(arch);
#endif
  static constexpr bool kNative = is_native(kInstance);
  static constexpr bool kDropout = kInstance.score_mod == flashspark::ScoreMod::dropout;
  using ScoreMod = std::conditional_t<kNative, NativeScoreMod, NoScoreMod>;

  static constexpr int32_t kHeadDim = kInstance.head_dim;
  static constexpr int32_t kHeadDimV = kInstance.head_dim_v;
  static constexpr int32_t kWarps = kTile.warps;
  static constexpr int32_t kThreads = kTile.threads();
  static constexpr int32_t kKeys = kTile.keys();
  static constexpr int32_t kWarpKeys = kTile.warp_keys;
  static constexpr int32_t kMAtoms = kWarpKeys / 16;  // m16 tiles of a warp's keys
  static constexpr int32_t kRows = kTile.rows;
  static constexpr int32_t kScoreRows = kTile.score_rows;
  static constexpr int32_t kRowSteps = kScoreRows / 16;  // k16 steps of dV and dK
  static constexpr RowStages kStages = kTile.stages;
  static constexpr bool kKeepsAddresses =
      arch != Architecture::sm_120f && kTile.order != SumOrder::walks;  // block_copies.cuh
  // What follows from other registers is found again, so that less is spilled; on sm_90 it costs more than it saves.
  static constexpr bool kSparesRegisters = kDropout && !kKeepsAddresses;
  static constexpr bool kInTurns = kTile.order == SumOrder::turns, kAsAsked = kTile.order == SumOrder::as_asked;
  static constexpr bool kHasWalks = kTile.order == SumOrder::walks;
  static constexpr bool kPaired = kTile.sharing != KeySharing::none;
  static constexpr bool kColumns = kTile.sharing == KeySharing::columns;
  static constexpr int32_t kGradientColumns = kHeadDim / (kWarps / 2);  // of a warp with kColumns
  static_assert(kColumns == (kStages == RowStages::steps));
  static_assert(!kPaired || kRows <= 2 * kScoreRows);  // pair_arrive() has two numbers
  static constexpr int32_t kKeyWarps = kTile.key_warps();
  static_assert(kWarpKeys % 16 == 0 && kScoreRows % 16 == 0 && kRows % kScoreRows == 0);

  // dQ of a block of rows: warps share its rows and columns, so that each loads about as much of dS as of K.
  static constexpr int32_t kSumAtoms = kWarps >= kRows / 32 && kHeadDim % (16 * (kWarps / (kRows / 32))) == 0 ? 2 : 1;
  static constexpr int32_t kSumRowWarps = kRows / (16 * kSumAtoms);
  static constexpr int32_t kSumColumnWarps = kWarps / kSumRowWarps;
  static constexpr int32_t kSumColumns = kHeadDim / kSumColumnWarps;  // of a warp
  static_assert(kSumRowWarps * kSumColumnWarps == kWarps && kSumColumns % 16 == 0);

  template <int32_t columns>
  using Layout = std::conditional_t<kTile.padded(), PaddedTileLayout<columns>, TileLayout<columns>>;
  using KeyLayout = Layout<kHeadDim>;     // and of Q
  using ValueLayout = Layout<kHeadDimV>;  // and of dO
  using ScoreLayout = Layout<kRows>;      // dS^T: a key a row
  static constexpr BackwardMemory kMemory = backward_memory(kInstance, kTile);
  static_assert(kMemory.total <= kMaxSharedBytes);

  // Copies: 8 (or 4) neighbouring threads read one row. The names are what attention/tile_loader.cuh asks for.
  static constexpr bool kWarpPrivateKV = false;
  static constexpr int32_t kRowThreads =
      KeyLayout::kGroup < ValueLayout::kGroup ? KeyLayout::kGroup : ValueLayout::kGroup;
  static constexpr int32_t kCopyRows = kKeys;
  static constexpr int32_t kPassRows = kThreads / kRowThreads;
  static constexpr int32_t kPasses = kCopyRows / kPassRows;
  static_assert(kCopyRows % kPassRows == 0);
  static_assert(!kPaired || kHeadDim == kHeadDimV);
  static_assert(!kPaired || is_of_functions(index) || (kTile.keys_in_registers && kTile.values_in_registers));
  static_assert(!kPaired || !kNative || kColumns || is_of_functions(index));  // modified_probabilities()

  // Which of the CTA's parts of keys a warp has. Of a pair, two neighbours have the same.
  static FLASHSPARK_DEVICE int32_t key_warp() { return kPaired ? ptx::warp() / 2 : ptx::warp(); }
  // Of a pair: whether the warp sums dV. The warps of a quarter of the SM, four apart, sum one of each.
  static FLASHSPARK_DEVICE bool sums_values() { return (ptx::warp() % 2 == 0) == (ptx::warp() / 4 % 2 == 0); }
};

}  // namespace flashspark
