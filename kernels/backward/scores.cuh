// From S^T and dP^T to P^T and dS^T, in units of log2 until the exponential.
#pragma once

#include "attention/softmax.cuh"
#include "backward/products.cuh"

namespace flashspark {

// The tokens that keep key j of a sequence: [j + low, j + high), where they exist; none of a key from `end` on. Both
// ends of a row's interval of keys rise with the row, so that the inverse is an interval, too.
struct KeyMask {
  int32_t low, high, end;

  // Of keys [first, first + keys): the tokens that may keep one of them, and those that keep all.
  FLASHSPARK_DEVICE Interval visited(int32_t first, int32_t keys) const {
    return {first + low, min_of(first + keys, end) - 1 + high};
  }
  FLASHSPARK_DEVICE Interval unmasked(int32_t first, int32_t keys) const {
    if (first + keys > end) return {0, 0};
    return {first + keys - 1 + low, first + high};
  }
};
FLASHSPARK_DEVICE KeyMask key_mask(const SequenceArguments &a, const SequenceMask &mask) {
  // Open windows are 2^30. What reaches so far reaches over all tokens.
  const int64_t left = int64_t{a.window_left} + 1 - mask.shift;
  const int32_t right = mask.causal ? min_of(a.window_right, 0) : a.window_right;
  constexpr int32_t kFar = 1 << 30;
  return {ptx::uniform(max_of(-kFar, -right - mask.shift)),
          ptx::uniform(left < kFar ? static_cast<int32_t>(left) : kFar), ptx::uniform(mask.end)};
}

// Scores that the mask removes become -inf. first_row: token of the tile's first row.
template <class T>
FLASHSPARK_DEVICE void mask_score_tile(ScoreTile<T> &scores, const KeyMask &mask, int32_t first_key,
                                       int32_t first_row) {
  const int32_t lane = ptx::lane(), row = first_row + lane % 4 * 2;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      const int32_t key = first_key + m * 16 + x * 8 + lane / 4;
      const Interval kept{key + mask.low - row, key < mask.end ? key + mask.high - row : INT32_MIN};
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < T::kScoreRows / 4; ++c) {
        const int32_t at = c / 2 * 8 + c % 2;
        if (at < kept.begin || at >= kept.end) scores.at[m][c / 2][2 * x + c % 2] = minus_infinity();
      }
    }
  }
}

// Calls f(n8 tile, values of the lane's two rows in it) for a tile's rows, of which `values` has a float each, from the
// lane's first row on.
template <class T, class F>
FLASHSPARK_DEVICE void for_row_pairs(ptx::SharedAddress values, F &&f) {
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
    uint32_t words[2];
    ptx::load_shared_8(words, values + j * 8 * 4);
    f(j, ptx::as_float(words[0]), ptx::as_float(words[1]));
  }
}

// P from scores in units of log2 (times `scale`) and the rows' lse.
template <class T>
FLASHSPARK_DEVICE void scores_to_probabilities(ScoreTile<T> &scores, float scale, ptx::SharedAddress row_lse) {
  for_row_pairs<T>(row_lse, [&](int32_t j, float first, float second) {
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) {
        float &s = scores.at[m][j][e];
        s = ptx::exp2_approx(s * scale - (e % 2 == 0 ? first : second));
      }
    }
  });
}

// Each element minus the row's delta: where the sum over columns begins.
template <class T>
FLASHSPARK_DEVICE void begin_with_delta(ScoreTile<T> &scores, ptx::SharedAddress row_delta) {
  for_row_pairs<T>(row_delta, [&](int32_t j, float first, float second) {
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) scores.at[m][j][e] = e % 2 == 0 ? -first : -second;
    }
  });
}

template <class T>
FLASHSPARK_DEVICE void pack_scores(ScoreOperand<T> &to, const ScoreTile<T> &from) {
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x)
        to.pair(m, j, x) = ptx::pack<typename T::Element>(from.at[m][j][2 * x], from.at[m][j][2 * x + 1]);
    }
  }
}

// Each pair of numbers times that of P^T, which lies where the lane then stores the product.
template <class T>
FLASHSPARK_DEVICE void multiply_by_stored(ScoreTile<T> &scores, ptx::SharedAddress from, uint32_t lane,
                                          int32_t first_row) {
  using Element = typename T::Element;
  using Layout = typename T::ScoreLayout;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
      const uint32_t offset = Layout::step(lane, static_cast<uint32_t>(first_row / 8 + j));
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) {
        const uint32_t word = ptx::load_shared_4(from + offset + (m * 16 + x * 8) * Layout::kPitch);
        scores.at[m][j][2 * x] *= ptx::to_float(Element{static_cast<uint16_t>(word)});
        scores.at[m][j][2 * x + 1] *= ptx::to_float(Element{static_cast<uint16_t>(word >> 16)});
      }
    }
  }
}

// Stores P^T or dS^T of the warp's keys; first_row: of the tile in the block.
template <class T>
FLASHSPARK_DEVICE void store_scores(ScoreOperand<T> &scores, ptx::SharedAddress to, uint32_t lane, int32_t first_row) {
  using Layout = typename T::ScoreLayout;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
      const uint32_t offset = Layout::step(lane, static_cast<uint32_t>(first_row / 8 + j));
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x)
        ptx::store_shared_4(to + offset + (m * 16 + x * 8) * Layout::kPitch, scores.pair(m, j, x));
    }
  }
}

}  // namespace flashspark
