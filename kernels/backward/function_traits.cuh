// What is known of a backward kernel with the user's functions, and what these give it.
#pragma once

#include "backward/function_arguments.hpp"
#include "backward/function_memory.hpp"
#include "backward/traits.cuh"

namespace flashspark {

// What the place of a gradient in a captured tensor depends on: the sequence and the query head alone; the row, too; or
// the key, too; or both, or the score.
enum class PlaceBy : uint8_t { head, row, key, score };

// What the user's function makes of a score, and its derivatives by the score and by what each load of a captured
// tensor has read, with the place of that one's gradient.
template <int32_t loads>
struct ScoreGradients {
  float value, by_score;
  float slopes[loads + 1];
  float *places[loads + 1];
};

template <BackwardIndex index, Architecture arch, class Element, class Functions_, bool block_sparse,
          bool in_turns = false, bool native_scores = false, bool exact_sums = false>
struct FunctionBackwardTraits : BackwardTraits<index, arch, Element> {
  using Base = BackwardTraits<index, arch, Element>;
  using Functions = Functions_;
  static constexpr bool kBlockSparse = block_sparse;
  static constexpr bool kInTurns = in_turns;  // function_turns.cuh
  // Whether biases and masks of NativeScoreMod stand beside the functions (function_native.cuh).
  static constexpr bool kNativeScores = native_scores;
  static constexpr bool kExactSums = exact_sums;  // of captured tensors' gradients: exact_sums.cuh
  static constexpr int32_t kFunctionWords = Functions::Score::kWords + Functions::Mask::kWords;
  static constexpr FunctionBackwardMemory kMemory =
      function_backward_memory(Base::kInstance, Base::kTile, kFunctionWords);
  // Whether of a pair of warps one asks the functions and hands on P^T. Else each asks them of its own scores.
  static constexpr bool kHandsOn = Base::kPaired && !Base::kNative;
  static_assert(kHandsOn == (Base::kStages == RowStages::all));
  static_assert(!(kHandsOn && (kInTurns || kNativeScores || kExactSums)));
  // A tile of scores lies in one of the user's blocks.
  static_assert(Base::kScoreRows == 16 && (kHandsOn || Base::kWarpKeys == 16));
};

}  // namespace flashspark
