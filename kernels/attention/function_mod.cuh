// The user's functions, score_mod and mask_mod, as a score modification. They are compiled into a kernel at run time,
// from text that src/graph writes (docs/design/score-graph.md): a type UserFunctions with the types
//
//   Score, Mask   kExists        false: there is none
//                 kWords         32-bit words that depend on the row alone
//                 row(...)       computes them, once a work tile
//                 kOperations    of a score
//                 kUsesKeys      whether anything but the key itself depends on the key alone
//                 Key, key(...)  that, computed once for all rows of a lane
//   Score         apply(...)     a score as Q K^T gives it, to the same: the function's value divided by softmax_scale,
//                                with which the softmax multiplies in any case
//           kIsBias       whether apply() gives what the function adds to the score, which it does not depend on
//           kHasOffset    whether apply() leaves out what the function adds alike to a lane's scores of a row:
//           offset(...)   that, divided by softmax_scale
//   Mask          keep(...)      whether the row keeps the key
//
// The words of a row lie in shared memory: a lane holds scores of up to four rows, and has no registers to keep what
// belongs to each of them through the loop.
#pragma once

#include <type_traits>

#include "attention/dropout.cuh"
#include "attention/function_arguments.hpp"
#include "attention/functions.cuh"
#include "attention/row_words.cuh"
#include "attention/softmax.cuh"

namespace flashspark {

// More operations than this, for 64 scores at once, are more code than the instruction cache holds, and than compiles
// in two seconds.
constexpr int32_t kLargeFunction = 16;

template <class Functions, bool native, bool block_sparse, bool block_status, bool dropout, bool contiguous>
struct FunctionScoreMod {
  using Score = typename Functions::Score;
  using Mask = typename Functions::Mask;
  static constexpr bool kNative = native, kFunction = true, kScoreFunction = Score::kExists,
                        kBlockSparse = block_sparse, kBlockStatus = block_status, kDropout = dropout,
                        kContiguous = contiguous, kLarge = Score::kOperations + Mask::kOperations > kLargeFunction,
                        kScoreOffset = Score::kHasOffset, kScoreBias = Score::kIsBias && !native;
  static constexpr int32_t kFunctionWords = Score::kWords + Mask::kWords;
  static constexpr int32_t kRowWords = kFunctionWords + (dropout ? kDropoutRowWords : 0);

  using RowContext = typename std::conditional_t<native, NativeScoreMod, NoScoreMod>::RowContext;
  static FLASHSPARK_DEVICE RowContext context(const AttentionArguments &a, const RowTile &row_tile,
                                              const SequenceMask &mask, int32_t row) {
    return NativeScoreMod::context(a, row_tile, mask, row);
  }
};

// Where what dropout keeps of the rows lies, behind the functions' words: the two words of a row side by side.
template <class T>
FLASHSPARK_DEVICE ptx::SharedAddress dropout_rows_of(ptx::SharedAddress memory) {
  static_assert(T::kFunctionRows % 8 == 0 && T::kMaxRows % 2 == 0 && kDropoutRowWords == 2);
  return row_word<T>(memory, T::ScoreMod::kFunctionWords);
}

// All threads of the CTA write the words of the row tile's rows. The barrier before the first tile makes them visible.
template <class T>
FLASHSPARK_DEVICE void write_function_rows(const typename T::KernelArguments &a, const RowTile &tile, const Keys &keys,
                                           float inverse_scale, PhiloxKey dropout_key, ptx::SharedAddress memory) {
  using Score = typename T::ScoreMod::Score;
  using Mask = typename T::ScoreMod::Mask;
  if constexpr (T::ScoreMod::kRowWords > 0) {
    FLASHSPARK_NO_UNROLL
    for (auto n = static_cast<int32_t>(ptx::thread_index()); n < T::rows(a); n += T::kThreads) {
      // Rows past the sequence are written as the last one, and read by nobody who counts.
      const Quotient at = divide(min_of(tile.first_row + n, tile.end_row - 1), a.group);
      const FunctionRow row{tile.seq,
                            tile.head_kv * static_cast<int32_t>(a.group.value) + at.remainder,
                            at.quotient,
                            tile.seqlen_q,
                            keys.end - keys.begin,
                            tile.q_row,
                            static_cast<int32_t>(keys.row)};
      uint32_t words[T::ScoreMod::kFunctionWords + 1];
      Score::row(a.functions, row, inverse_scale, words);
      Mask::row(a.functions, row, inverse_scale, words + Score::kWords);
      FLASHSPARK_UNROLL
      for (int32_t word = 0; word < T::ScoreMod::kFunctionWords; ++word)
        ptx::store_shared_4(row_word<T>(memory, word) + n * 4, words[word]);
      if constexpr (T::ScoreMod::kDropout) {
        const DropoutRow kept = dropout_row(dropout_key, row.h, row.q_idx);
        ptx::store_shared_8(dropout_rows_of<T>(memory) + n * 8, kept.head, kept.row);
      }
    }
  }
}

// Calls f(score, words of its row, what depends on its key, its key, row, column) for each of the lane's scores, which
// lie in so many rows and columns.
//
// Row by row the words of one row are in registers at a time; column by column, what depends on the key is computed
// once for all rows.
template <class T, class Function, int32_t first_word, class F>
FLASHSPARK_DEVICE void for_each_function_score(Scores<T> &s, const FunctionArguments &a, ptx::SharedAddress rows,
                                               int32_t first_key, F &&f) {
  const int32_t column = first_key + ptx::lane() % 4 * 2;
  const auto column_f = static_cast<float>(column);
  const auto key_of = [&](int32_t c) {
    const int32_t step = c / 2 * 8 + c % 2;
    return FunctionKey{max_of(column + step, 0), column_f, static_cast<float>(step)};
  };
  const auto score = [&](int32_t n, int32_t c) -> float & { return s.at[n / 2][c / 2][n % 2 * 2 + c % 2]; };
  if constexpr (!Function::kUsesKeys) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kLaneRows; ++n) {
      uint32_t words[Function::kWords + 1];
      load_row_words<T, first_word, Function::kWords>(rows, n, words);
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < T::kScoreKeys / 4; ++c) f(score(n, c), words, typename Function::Key{}, key_of(c), n, c);
    }
  } else {
    uint32_t words[T::kLaneRows][Function::kWords + 1];
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kLaneRows; ++n) {
      load_row_words<T, first_word, Function::kWords>(rows, n, words[n]);
    }
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kScoreKeys / 4; ++c) {
      const typename Function::Key at = Function::key(a, key_of(c));
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < T::kLaneRows; ++n) f(score(n, c), words[n], at, key_of(c), n, c);
    }
  }
}

// Scores in units of log2 back to what Q K^T would give.
template <class T>
FLASHSPARK_DEVICE void to_raw_scores(Scores<T> &s, float factor) {
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kScoreKeys / 4; ++c) s.at[n / 2][c / 2][n % 2 * 2 + c % 2] *= factor;
  }
}

// `scale` gives natural units. first_key: as the function counts keys. Where the function is a bias, the products begin
// with what this leaves in `s`.
template <class T>
FLASHSPARK_DEVICE void apply_score_function(Scores<T> &s, const FunctionArguments &a, ptx::SharedAddress rows,
                                            float scale, int32_t first_key) {
  using Score = typename T::ScoreMod::Score;
  const float inverse_scale = 1.0f / scale;
  for_each_function_score<T, Score, 0>(
      s, a, rows, first_key,
      [&](float &x, const uint32_t *words, const typename Score::Key &at, const FunctionKey &key, int32_t, int32_t) {
        const float y = Score::apply(a, words, at, x, scale, inverse_scale, key);
        x = Score::kIsBias && !T::ScoreMod::kScoreBias ? x + y : y;
      });
}

// What the function adds alike to a row's scores, in units of log2: behind the products, which have no registers for
// it.
template <class T>
FLASHSPARK_DEVICE void find_score_offsets(ScoreOffsets<T> &offsets, const FunctionArguments &a, ptx::SharedAddress rows,
                                          float scale, int32_t first_key) {
  using Score = typename T::ScoreMod::Score;
  const auto first = static_cast<float>(first_key + ptx::lane() % 4 * 2);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    uint32_t words[Score::kWords + 1];
    load_row_words<T, 0, Score::kWords>(rows, n, words);
    offsets.at[n] = Score::offset(a, words, 1.0f / scale, first) * (scale * kLog2E);
  }
}

template <class T>
FLASHSPARK_DEVICE void apply_mask_function(Scores<T> &s, const FunctionArguments &a, ptx::SharedAddress rows,
                                           int32_t first_key) {
  using Mask = typename T::ScoreMod::Mask;
  if constexpr (Mask::kExists) {
    for_each_function_score<T, Mask, T::ScoreMod::Score::kWords>(
        s, a, rows, first_key,
        [&](float &x, const uint32_t *words, const typename Mask::Key &at, const FunctionKey &key, int32_t, int32_t) {
          if (!Mask::keep(a, words, at, key)) x = minus_infinity();
        });
  }
}

}  // namespace flashspark
