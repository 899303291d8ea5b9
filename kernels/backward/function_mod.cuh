// The user's functions, score_mod and mask_mod, in the backward pass. They are compiled into a kernel at run time, from
// text that src/graph writes (docs/design/score-graph.md): a type UserFunctions with the types
//
//   Score, Mask   kExists, kWords, row(..), Key, key(..), and keep(..) of Mask, as in attention/function_mod.cuh
//   Score         kLoads         loads of captured tensors whose gradients are wanted
//                 place_by(n)    what the place of load n depends on
//                 apply(..)      of a score in natural units: what the function makes of it, the derivative of that by
//                                the score and by each load, and where the load's gradient belongs
//
// Scores are transposed here: a lane holds two keys, whose Key is found once for all rows, and of each eight rows two,
// whose words it takes from shared memory when it gets there.
#pragma once

#include "attention/functions.cuh"
#include "backward/blocks.cuh"
#include "backward/exact_sums.cuh"
#include "backward/function_native.cuh"
#include "backward/function_traits.cuh"
#include "backward/modifications.cuh"

namespace flashspark {

template <class T>
FLASHSPARK_DEVICE void add_to_gradient(const FunctionBackwardArguments &a, float *to, float x) {
  if constexpr (T::kExactSums) {
    add_exactly(a.exact_sums, to, x);
  } else {
    if (x != 0) ptx::add_to_memory(to, x);
  }
}
// Adds what the lanes of a warp have for one element of a captured tensor's gradient each. All lanes call it. Where all
// of them have the same element, as of a distance that is clipped, it is one addition.
template <class T>
FLASHSPARK_DEVICE void add_each(const FunctionBackwardArguments &a, float *to, float x) {
  const auto address = reinterpret_cast<uint64_t>(to);
  const auto low = static_cast<int32_t>(address), high = static_cast<int32_t>(address >> 32);
  const int32_t first_low = ptx::shuffle(low, 0), first_high = ptx::shuffle(high, 0);
  if (ptx::ballot(low == first_low && high == first_high) == ~0u) {
    FLASHSPARK_UNROLL
    for (uint32_t lanes = 16; lanes > 0; lanes /= 2) x += ptx::shuffle_xor(x, lanes);
    if (ptx::lane() != 0) return;
  }
  add_to_gradient<T>(a, to, x);
}
// The same where lanes whose numbers differ in `bits` alone have the same element.
template <class T, uint32_t bits>
FLASHSPARK_DEVICE void add_joined(const FunctionBackwardArguments &a, float *to, float x) {
  FLASHSPARK_UNROLL
  for (uint32_t lanes = 16; lanes > 0; lanes /= 2) {
    if (bits & lanes) x += ptx::shuffle_xor(x, lanes);
  }
  if ((ptx::lane() & bits) == 0) add_to_gradient<T>(a, to, x);
}
constexpr uint32_t kAllLanes = 31, kLanesOfRow = 28, kLanesOfKey = 3;

// A sum that goes to one element.
struct CapturedSum {
  float *to;
  float sum;
};

// What a warp adds to the gradients of captured tensors.
template <class T>
struct CapturedSums {
  using Score = typename T::Functions::Score;
  static constexpr int32_t kLoads = Score::kLoads;

  CapturedSum of_head[kLoads + 1];    // since the query head began
  CapturedSum of_key[kLoads + 1][2];  // of a tile, by the lane's keys
  CapturedSum of_row[kLoads + 1][2];  // of eight rows, by the lane's rows

  FLASHSPARK_DEVICE static void add(CapturedSum &to, float *place, float x) { to = {place, to.sum + x}; }

  // x: the gradient of what the function has made of the score of the lane's key and row.
  FLASHSPARK_DEVICE void add_score(const FunctionBackwardArguments &a, const ScoreGradients<kLoads> &y, int32_t key,
                                   int32_t row, float x) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kLoads; ++n) {
      const float gradient = x == 0 ? 0.0f : x * y.slopes[n];
      switch (Score::place_by(n)) {
        case PlaceBy::head:
          add(of_head[n], y.places[n], gradient);
          break;
        case PlaceBy::key:
          add(of_key[n][key], y.places[n], gradient);
          break;
        case PlaceBy::row:
          add(of_row[n][row], y.places[n], gradient);
          break;
        case PlaceBy::score:
          add_each<T>(a, y.places[n], gradient);
      }
    }
  }
  FLASHSPARK_DEVICE void end_rows(const FunctionBackwardArguments &a) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kLoads; ++n) {
      if (Score::place_by(n) != PlaceBy::row) continue;
      FLASHSPARK_UNROLL
      for (int32_t row = 0; row < 2; ++row) {
        add_joined<T, kLanesOfRow>(a, of_row[n][row].to, of_row[n][row].sum);
        of_row[n][row].sum = 0;
      }
    }
  }
  FLASHSPARK_DEVICE void end_tile(const FunctionBackwardArguments &a) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kLoads; ++n) {
      if (Score::place_by(n) != PlaceBy::key) continue;
      FLASHSPARK_UNROLL
      for (int32_t key = 0; key < 2; ++key) {
        add_joined<T, kLanesOfKey>(a, of_key[n][key].to, of_key[n][key].sum);
        of_key[n][key].sum = 0;
      }
    }
  }
  FLASHSPARK_DEVICE void end_head(const FunctionBackwardArguments &a) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kLoads; ++n) {
      if (Score::place_by(n) != PlaceBy::head) continue;
      add_joined<T, kAllLanes>(a, of_head[n].to, of_head[n].sum);
      of_head[n].sum = 0;
    }
  }
};

// Word w of row r of a block lies at word (w * kRows + r).
template <class T>
FLASHSPARK_DEVICE ptx::SharedAddress function_word(ptx::SharedAddress words, int32_t word) {
  return words + word * (T::kRows * 4);
}

// Of functions that are biases: what gives natural units, and its inverse.
FLASHSPARK_DEVICE float bias_scale(const BackwardArguments &a) {
  return larger(a.softmax_scale, kMinFunctionScale);
}
FLASHSPARK_DEVICE float inverse_bias_scale(const BackwardArguments &a) {
  return ptx::reciprocal_approx(bias_scale(a));  // a division has a call in it, and that takes registers
}

// Some of the threads write the words of a block's rows. Of pairs that hand on P^T it is a warp that waits for it.
template <class T>
FLASHSPARK_DEVICE void write_function_words(const FunctionBackwardArguments &a, FunctionRow row, int32_t first_token,
                                            ptx::SharedAddress words) {
  using Score = typename T::Functions::Score;
  using Mask = typename T::Functions::Mask;
  static_assert(T::kRows <= T::kThreads / 2);
  if constexpr (T::kFunctionWords > 0) {
    constexpr int32_t kFirstThread = T::kHandsOn ? T::kThreads / 2 : 0;
    const int32_t n = static_cast<int32_t>(ptx::thread_index()) - kFirstThread;
    if (n < 0 || n >= T::kRows) return;
    // Rows past the sequence are written as the last one: their tensors' elements exist.
    row.q_idx = min_of(first_token + n, row.seqlen_q - 1);
    const float inverse_scale = Score::kIsBias ? inverse_bias_scale(a) : 1.0f;
    uint32_t w[T::kFunctionWords];
    Score::row(a.functions, row, inverse_scale, w);
    Mask::row(a.functions, row, inverse_scale, w + Score::kWords);
    FLASHSPARK_UNROLL
    for (int32_t word = 0; word < T::kFunctionWords; ++word)
      ptx::store_shared_4(function_word<T>(words, word) + n * 4, w[word]);
  }
}

// The words of the two rows of a lane that begin at `row`, which is even.
template <class T, int32_t first, int32_t count>
FLASHSPARK_DEVICE void load_function_words(uint32_t (&to)[2][count + 1], ptx::SharedAddress words, int32_t row) {
  FLASHSPARK_UNROLL
  for (int32_t word = 0; word < count; ++word) {
    uint32_t pair[2];
    ptx::load_shared_8(pair, function_word<T>(words, first + word) + row * 4);
    to[0][word] = pair[0], to[1][word] = pair[1];
  }
}

// Where a warp's tile of scores lies, and what it needs.
struct FunctionTile {
  int32_t first_key, first_row;  // of the sequence; of the block
  Interval kept[2];              // by the lane's keys: of its first row's number on, which rows keep the key; with
                                 // kNativeScores unused
  bool asks_mask;                // else mask_mod keeps all
  ptx::SharedAddress lse, delta, kept_bits;  // from the tile's first row on; of the block
  ptx::SharedAddress words;                  // of the block
};

template <class T>
FLASHSPARK_DEVICE FunctionKey function_key(const FunctionTile &tile, int32_t key) {
  const int32_t first = tile.first_key + ptx::lane() / 4;
  return {first + 8 * key, static_cast<float>(first), static_cast<float>(8 * key)};
}

// Both softcap and its derivative, in natural units.
struct CappedScore {
  float score, slope;
};
FLASHSPARK_DEVICE CappedScore capped_score(const BackwardArguments &a, float product) {
  const float score = product * a.softmax_scale;
  if (!(a.softcap > 0)) return {score, 1.0f};
  // tanh y = 1 - 2 r and its derivative 4 r (1 - r), with r = 1 / (e^2y + 1).
  const float r = ptx::reciprocal_approx(ptx::exp2_approx(product * a.cap_factor) + 1);
  return {a.softcap - 2 * a.softcap * r, 4 * r * (1 - r)};
}

template <class T>
FLASHSPARK_DEVICE ScoreGradients<T::Functions::Score::kLoads> score_gradients(
    const FunctionBackwardArguments &a, const uint32_t *words, const typename T::Functions::Score::Key &at, float score,
    const FunctionKey &key) {
  using Score = typename T::Functions::Score;
  static_assert(!Score::kIsBias);  // its text is of pairs that hand on P^T
  if constexpr (Score::kExists) {
    return Score::apply(a.functions, a.gradients, words, at, score, 1.0f, 1.0f, key);
  } else {
    ScoreGradients<0> y{};
    y.value = score, y.by_score = 1.0f;
    return y;
  }
}

// P^T, and with `gradients` dS^T, in 16 bits: `scores` are K Q^T, and `products` V dO^T, from 0 on.
template <class T, bool gradients>
FLASHSPARK_DEVICE void function_scores(const FunctionBackwardArguments &a, const FunctionTile &tile,
                                       const ScoreTile<T> &scores, const ScoreTile<T> &products, ScoreOperand<T> &p,
                                       ScoreOperand<T> &ds, CapturedSums<T> &sums, FunctionNative<T> &native) {
  using Score = typename T::Functions::Score;
  using Mask = typename T::Functions::Mask;
  const bool drops = a.dropout.scale != 1.0f;
  KeptScores<T> kept{};
  if (drops) load_kept(kept, tile.kept_bits, tile.first_row);
  const FunctionKey keys[2] = {function_key<T>(tile, 0), function_key<T>(tile, 1)};
  typename Score::Key score_keys[2];
  typename Mask::Key mask_keys[2];
  FLASHSPARK_UNROLL
  for (int32_t x = 0; x < 2; ++x)
    score_keys[x] = Score::key(a.functions, keys[x]), mask_keys[x] = Mask::key(a.functions, keys[x]);
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
    const int32_t row = j * 8 + ptx::lane() % 4 * 2;
    uint32_t lse[2], delta[2], score_words[2][Score::kWords + 1], mask_words[2][Mask::kWords + 1];
    ptx::load_shared_8(lse, tile.lse + row * 4);
    ptx::load_shared_8(delta, tile.delta + row * 4);
    load_function_words<T, 0, Score::kWords>(score_words, tile.words, tile.first_row + row);
    load_function_words<T, Score::kWords, Mask::kWords>(mask_words, tile.words, tile.first_row + row);
    float probability[4], derivative[4];
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) {
      const CappedScore score = capped_score(a, scores.at[0][j][e]);
      const auto y =
          score_gradients<T>(a, score_words[e % 2], score_keys[e / 2], native.biased(score.score, j, e), keys[e / 2]);
      const int32_t at = j * 8 + e % 2;
      bool keeps = at >= tile.kept[e / 2].begin && at < tile.kept[e / 2].end;
      if constexpr (T::kNativeScores) keeps = native.keeps(j, e);
      if constexpr (Mask::kExists) {
        if (tile.asks_mask) keeps = Mask::keep(a.functions, mask_words[e % 2], mask_keys[e / 2], keys[e / 2]) && keeps;
      }
      float x = ptx::exp2_approx(y.value * kLog2E - ptx::as_float(lse[e % 2]));
      x = keeps ? x : 0.0f;
      const bool drawn = !drops || kept.keeps(0, j, e);
      probability[e] = drawn ? x : 0.0f;
      if constexpr (gradients) {
        const float dp = drawn ? products.at[0][j][e] * a.dropout.scale : 0.0f;
        const float modified = x == 0 ? 0.0f : x * (dp - ptx::as_float(delta[e % 2]));
        sums.add_score(a, y, e / 2, e % 2, modified);
        native.add_gradient(modified == 0 ? 0.0f : modified * y.by_score, j, e);
        derivative[e] = modified == 0 ? 0.0f : modified * y.by_score * score.slope;
      }
    }
    if constexpr (gradients) sums.end_rows(a);
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      p.pair(0, j, x) = ptx::pack<typename T::Element>(probability[2 * x], probability[2 * x + 1]);
      if constexpr (gradients)
        ds.pair(0, j, x) = ptx::pack<typename T::Element>(derivative[2 * x], derivative[2 * x + 1]);
    }
  }
  if constexpr (gradients) sums.end_tile(a);
}

}  // namespace flashspark
