// The user's functions in a pair of warps of which one hands on P^T: it alone asks them. The other one multiplies by
// what it finds, so P^T comes times the function's derivative by the score.
//
// A function that adds to a score what does not depend on it (UserFunctions::Score::kIsBias) has apply() and offset()
// of attention/function_mod.cuh: the products begin with what it adds.
#pragma once

#include "backward/function_mod.cuh"
#include "backward/pair_block.cuh"

namespace flashspark {

// Of a warp's tile of scores, where it lies and what it needs.
struct FunctionPairTile {
  int32_t first_key, token;  // of the sequence
  int32_t first_row;         // of the block
  bool masks, asks_mask;     // whether keys may be removed; whether mask_mod is to be asked for them
  ptx::SharedAddress lse;    // from the lane's first row on
  ptx::SharedAddress words;  // of the block
};

// Calls f(n8 tile of rows, row of the lane's two in it, the row's words) for the rows of a tile.
template <class T, class Function, int32_t first_word, class F>
FLASHSPARK_DEVICE void for_each_function_row(const FunctionPairTile &tile, int32_t lane, F &&f) {
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
    uint32_t words[2][Function::kWords + 1];
    load_function_words<T, first_word, Function::kWords>(words, tile.words, tile.first_row + j * 8 + lane % 4 * 2);
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < 2; ++c) f(j, c, words[c]);
  }
}

// Calls f(score, words of its row, what depends on its key, its key, m16 tile, n8 tile, register).
template <class T, class Function, int32_t first_word, class F>
FLASHSPARK_DEVICE void for_each_pair_score(ScoreTile<T> &scores, const FunctionArguments &a,
                                           const FunctionPairTile &tile, int32_t lane, F &&f) {
  const int32_t first = tile.first_key + lane / 4;
  const auto first_real = static_cast<float>(first);
  const auto key_of = [&](int32_t m, int32_t x) {
    const int32_t step = m * 16 + x * 8;
    return FunctionKey{first + step, first_real, static_cast<float>(step)};
  };
  typename Function::Key keys[T::kMAtoms][2];
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) keys[m][x] = Function::key(a, key_of(m, x));
  }
  for_each_function_row<T, Function, first_word>(tile, lane, [&](int32_t j, int32_t c, const uint32_t *words) {
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) f(scores.at[m][j][2 * x + c], words, keys[m][x], key_of(m, x), m, j, 2 * x + c);
    }
  });
}

// What the products begin with where the function is a bias.
template <class T>
FLASHSPARK_DEVICE void begin_with_bias(const FunctionBackwardArguments &a, const FunctionPairTile &tile,
                                       ScoreTile<T> &scores) {
  using Score = typename T::Functions::Score;
  if constexpr (Score::kIsBias) {
    const float scale = bias_scale(a), inverse_scale = inverse_bias_scale(a);
    for_each_pair_score<T, Score, 0>(
        scores, a.functions, tile, ptx::lane(),
        [&](float &score, const uint32_t *words, const typename Score::Key &at, const FunctionKey &key, int32_t,
            int32_t, int32_t) { score = Score::apply(a.functions, words, at, 0.0f, scale, inverse_scale, key); });
  }
}

// What neither the mask nor mask_mod keeps, and rows past the sequence, become -inf.
template <class T>
FLASHSPARK_DEVICE void mask_pair_scores(const FunctionBackwardArguments &a, const KeyMask &mask, int32_t tokens,
                                        const FunctionPairTile &tile, ScoreTile<T> &scores) {
  using Mask = typename T::Functions::Mask;
  // Else the compiler keeps what is the same for all tiles in registers.
  const auto own = static_cast<int32_t>(keep_in_register(static_cast<uint32_t>(ptx::lane())));
  const int32_t row = tile.token + own % 4 * 2;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      const int32_t key = tile.first_key + m * 16 + x * 8 + own / 4;
      const Interval kept{key + mask.low - row, key < mask.end ? min_of(key + mask.high, tokens) - row : INT32_MIN};
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < T::kScoreRows / 4; ++c) {
        const int32_t at = c / 2 * 8 + c % 2;
        if (at < kept.begin || at >= kept.end) scores.at[m][c / 2][2 * x + c % 2] = minus_infinity();
      }
    }
  }
  if constexpr (Mask::kExists) {
    if (!tile.asks_mask) return;
    for_each_pair_score<T, Mask, T::Functions::Score::kWords>(
        scores, a.functions, tile, own,
        [&](float &score, const uint32_t *words, const typename Mask::Key &at, const FunctionKey &key, int32_t, int32_t,
            int32_t) {
          if (!Mask::keep(a.functions, words, at, key)) score = minus_infinity();
        });
  }
}

// From S^T to P^T, as the operand of dV and as what the other warp multiplies by.
template <class T>
FLASHSPARK_DEVICE void pair_probabilities(const FunctionBackwardArguments &a, const KeyMask &mask, int32_t tokens,
                                          const FunctionPairTile &tile, ScoreTile<T> &scores, ScoreOperand<T> &p,
                                          ScoreOperand<T> &handed) {
  using Score = typename T::Functions::Score;
  constexpr bool kChanges = Score::kExists && !Score::kIsBias;
  ScoreTile<T> slopes;
  float scale = a.scale_log2;
  if constexpr (Score::kIsBias) scale = bias_scale(a) * kLog2E;
  if constexpr (kChanges) {
    scale = kLog2E;
    for_each_pair_score<T, Score, 0>(scores, a.functions, tile, ptx::lane(),
                                     [&](float &score, const uint32_t *words, const typename Score::Key &at,
                                         const FunctionKey &key, int32_t m, int32_t j, int32_t e) {
                                       const auto y = Score::apply(a.functions, a.gradients, words, at, score,
                                                                   a.softmax_scale, 1.0f, key);
                                       score = y.value, slopes.at[m][j][e] = y.by_score;
                                     });
  }
  if (tile.masks) mask_pair_scores(a, mask, tokens, tile, scores);
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
    uint32_t words[2][Score::kWords + 1], lse[2];
    ptx::load_shared_8(lse, tile.lse + j * 8 * 4);
    float from[2] = {ptx::as_float(lse[0]), ptx::as_float(lse[1])};
    if constexpr (Score::kHasOffset) {
      const auto first = static_cast<float>(tile.first_key + ptx::lane() / 4);
      load_function_words<T, 0, Score::kWords>(words, tile.words, tile.first_row + j * 8 + ptx::lane() % 4 * 2);
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < 2; ++c)
        from[c] -= Score::offset(a.functions, words[c], inverse_bias_scale(a), first) * scale;
    }
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      float product[4];
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) {
        float &s = scores.at[m][j][e];
        s = ptx::exp2_approx(s * scale - from[e % 2]);
        // What is not kept has a derivative, too, of which nothing is known.
        if constexpr (kChanges) product[e] = s == 0 ? 0.0f : s * slopes.at[m][j][e];
      }
      pack_tile(p, m, j, scores.at[m][j]);
      if constexpr (kChanges) pack_tile(handed, m, j, product);
    }
  }
  if constexpr (!kChanges) handed = p;
}

}  // namespace flashspark
