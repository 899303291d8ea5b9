// What stands beside the user's functions in kernels with kNativeScores: ALiBi and the bias by distance, which change a
// score before score_mod gets it, with their gradients; PrefixLM ranges, R-SWA and chunks, which are masks. Softcap and
// dropout are part of every kernel with functions that may have them (function_mod.cuh).
#pragma once

#include "backward/function_traits.cuh"
#include "backward/modifications.cuh"

namespace flashspark {

// Of a warp's tile of scores [j][e], an m16n8 tile by a lane's four in it. Other kernels have none of it.
template <class T, bool native = T::kNativeScores>
struct FunctionNative {
  FLASHSPARK_DEVICE bool keeps(int32_t, int32_t) const { return true; }
  FLASHSPARK_DEVICE float biased(float score, int32_t, int32_t) const { return score; }
  FLASHSPARK_DEVICE void add_gradient(float, int32_t, int32_t) {}
};

template <class T>
struct FunctionNative<T, true> {
  using Scores = NativeScores<T>;
  Scores of;
  uint32_t kept;  // bit 4 j + e: the row keeps the key

  FLASHSPARK_DEVICE bool keeps(int32_t j, int32_t e) const { return (kept >> (4 * j + e) & 1) != 0; }

  // In natural units. Nothing is read for a key that the row does not keep, as the row may not exist.
  FLASHSPARK_DEVICE float biased(float score, int32_t j, int32_t e) const {
    const BackwardArguments &a = of.a;
    if (a.rel_logits != nullptr) {
      const int32_t at = of.distance(0, j, e);
      if (keeps(j, e) && at >= 0 && at < a.rel_extent)
        score += load_as_float(a.rel_logits, of.rel_row(j, e % 2) + at, a.rel_dtype);
    }
    if (a.alibi_slopes != nullptr) score -= of.alibi_slope * fn::kNaturalLog2 * of.magnitude(0, j, e);
    return score;
  }
  // ds: the gradient of what biased() has returned. An element of drel_logits has one key, and so one writer.
  FLASHSPARK_DEVICE void add_gradient(float ds, int32_t j, int32_t e) {
    const BackwardArguments &a = of.a;
    if (a.drel_logits != nullptr) {
      const int32_t at = of.distance(0, j, e);
      if (ds != 0 && at >= 0 && at < a.rel_extent) a.drel_logits[of.rel_row(j, e % 2) + at] = ds;
    }
    if (a.dalibi_slopes != nullptr) of.slope_sum -= ds * of.magnitude(0, j, e);
  }
};

// The bits of FunctionNative::kept. All threads of the warp call it.
template <class T>
FLASHSPARK_DEVICE uint32_t native_kept(const RowMasks<T> &mask, int32_t first_key, int32_t first_row) {
  static_assert(T::kMAtoms == 1 && T::kScoreRows == 16);
  if (first_row >= mask.tokens.unmasked.begin && first_row + T::kScoreRows <= mask.tokens.unmasked.end) return ~0u;
  uint32_t kept = 0;
  for_kept_scores<T>(mask, first_key, first_row, [&](int32_t, int32_t j, int32_t e, bool keeps) {
    if (keeps) kept |= 1u << (4 * j + e);
  });
  return kept;
}

}  // namespace flashspark
