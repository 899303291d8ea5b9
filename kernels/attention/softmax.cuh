// Scores to probabilities, online (Milakov and Gimelshein 2018; Dao et al. 2022), in units of log2. The reference
// maximum of a row moves only when a new maximum exceeds it by more than 8: probabilities then reach 2^8 at most, which
// a 16-bit float holds as precisely, and most tiles need no rescaling of O (Dao 2025, FlashAttention-4).
#pragma once

#include "attention/score_mod.cuh"

namespace flashspark {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kRescaleThreshold = 8.0f;
// The lowest finite number: -inf (a masked score) minus it is -inf, where -inf minus itself would be NaN.
constexpr float kLowest = -3.4028234663852886e38f;

FLASHSPARK_DEVICE float minus_infinity() {
  return -__builtin_huge_valf();
}
FLASHSPARK_DEVICE float larger(float a, float b) {
  return __builtin_fmaxf(a, b);
}

// What a lane holds of a warp's tile, in the accumulator layout of mma_m16n8k16: [m_atom][n8 tile][register].
template <class T>
struct Scores {
  float at[T::kMAtoms][T::kScoreKeys / 8][4];
};
template <class T>
struct Output {
  float at[T::kMAtoms][T::kHeadDimV / 8][4];
};

// The rows of which a lane holds scores: its row n is row lane / 4 + 8 * (n % 2) of m_atom n / 2 of the warp.
template <class T>
FLASHSPARK_DEVICE int32_t lane_row(const typename T::Arguments &a, const RowTile &row_tile, int32_t n) {
  const int32_t lane = ptx::lane();
  return row_tile.first_row + T::first_warp_row(a) + n / 2 * 16 + n % 2 * 8 + lane / 4;
}

// Of each of the lane's rows.
template <class T>
struct RowState {
  float
      row_max[T::kLaneRows];  // reference maximum: what probabilities are relative to, units of log2; kLowest at first
  float row_sum[T::kLaneRows];            // of this lane's columns alone, until the epilogue
  float rescale_threshold[T::kLaneRows];  // a score above it moves row_max
};

// Calls f(score, row of the lane, distance of the column from the lane's first) for each of the lane's scores.
template <class T, class F>
FLASHSPARK_DEVICE void for_each_score(Scores<T> &s, F &&f) {
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kScoreKeys / 4; ++c) f(s.at[n / 2][c / 2][n % 2 * 2 + c % 2], n, c / 2 * 8 + c % 2);
  }
}

// Scales scores and applies the built-in modifications: to units of log2.
template <class T>
FLASHSPARK_DEVICE void apply_score_mod(Scores<T> &s, const typename T::ScoreMod::RowContext (&rows)[T::kLaneRows],
                                       const typename T::Arguments &a, float softmax_scale, int32_t first_key) {
  using Mod = NativeScoreMod;
  const int32_t column = first_key + static_cast<int32_t>(ptx::thread_index() % 4) * 2;
  if (a.softcap > 0) {
    const float cap = a.softcap * kLog2E, factor = softmax_scale * (2 * kLog2E / a.softcap);
    for_each_score<T>(s, [&](float &x, int32_t, int32_t) { x = Mod::capped(x, cap, factor); });
  } else {
    const float factor = softmax_scale * kLog2E;
    for_each_score<T>(s, [&](float &x, int32_t, int32_t) { x = Mod::scaled(x, factor); });
  }
  if (a.rel_logits != nullptr)
    for_each_score<T>(s, [&](float &x, int32_t n, int32_t step) { x += Mod::bias(a, rows[n], column + step); });
  if (a.alibi_slopes != nullptr) {
    float distance[T::kLaneRows];
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kLaneRows; ++n) distance[n] = static_cast<float>(rows[n].pos - column);
    for_each_score<T>(s, [&](float &x, int32_t n, int32_t step) {
      x -= Mod::alibi(rows[n], distance[n] - static_cast<float>(step));
    });
  }
}

template <class T>
FLASHSPARK_DEVICE void mask_scores(Scores<T> &s, const typename T::ScoreMod::RowContext (&rows)[T::kLaneRows],
                                   const typename T::Arguments &a, const RowTile &row_tile, const SequenceMask &mask,
                                   int32_t first_key) {
  // Relative to the lane's first key, so that every column compares with a constant.
  const int32_t shift = first_key + static_cast<int32_t>(ptx::thread_index() % 4) * 2;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    RowMask row;
    if constexpr (T::ScoreMod::kNative) {
      row = rows[n].keys;
    } else {
      // Rows past the sequence keep what their position says; nobody reads them.
      row.first = window_interval(a, mask, divide(lane_row<T>(a, row_tile, n), a.group).quotient);
    }
    const Interval one{row.first.begin - shift, row.first.end - shift};
    const Interval two{row.second.begin - shift, row.second.end - shift};
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kScoreKeys / 4; ++c) {
      const int32_t key = c / 2 * 8 + c % 2;
      bool keep = key >= one.begin && key < one.end;
      if constexpr (T::ScoreMod::kNative) keep = keep || (key >= two.begin && key < two.end);
      if (!keep) s.at[n / 2][c / 2][n % 2 * 2 + c % 2] = minus_infinity();
    }
  }
}

// Row n of the lane, reduced over its columns as a tree: a chain of 16 dependent operations would stall.
template <class T, class F>
FLASHSPARK_DEVICE float reduce_row(const Scores<T> &s, int32_t n, F &&f) {
  float part[T::kScoreKeys / 8];
  FLASHSPARK_UNROLL
  for (int32_t c = 0; c < T::kScoreKeys / 8; ++c) part[c] = f(s.at[n / 2][c][n % 2 * 2], s.at[n / 2][c][n % 2 * 2 + 1]);
  FLASHSPARK_UNROLL
  for (int32_t step = 1; step < T::kScoreKeys / 8; step *= 2) {
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c + step < T::kScoreKeys / 8; c += 2 * step) part[c] = f(part[c], part[c + step]);
  }
  return part[0];
}

// Largest score of each of the lane's rows among the lane's own columns, before the scale.
template <class T>
struct RowMaxima {
  float at[T::kLaneRows];
};
template <class T>
FLASHSPARK_DEVICE RowMaxima<T> row_maxima(const Scores<T> &s) {
  RowMaxima<T> highest;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) highest.at[n] = reduce_row<T>(s, n, larger);
  return highest;
}

// What a score function adds alike to all scores that a lane holds of a row in a subtile, in units of log2, and leaves
// out of the scores. The four lanes of a row have other keys, and other offsets.
template <class T, bool exists = T::ScoreMod::kScoreOffset>
struct ScoreOffsets {
  FLASHSPARK_DEVICE float add(float x, int32_t) const { return x; }
  FLASHSPARK_DEVICE float subtract(float x, int32_t) const { return x; }
};
template <class T>
struct ScoreOffsets<T, true> {
  float at[T::kLaneRows];

  FLASHSPARK_DEVICE float add(float x, int32_t n) const { return x + at[n]; }
  FLASHSPARK_DEVICE float subtract(float x, int32_t n) const { return x - at[n]; }
};

// Moves the reference maximum of the rows whose scores exceed their threshold, and of no others, so that a row's result
// does not depend on the rows beside it. `scale` turns scores into units of log2 (1 once apply_score_mod() has run).
template <class T>
FLASHSPARK_DEVICE void update_row_max(RowMaxima<T> highest, Output<T> &o, RowState<T> &state, float scale,
                                      const ScoreOffsets<T> &offsets) {
  const auto scaled = [&](int32_t n) { return offsets.add(highest.at[n] * scale, n); };
  bool moves = false;
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) moves = moves || scaled(n) > state.rescale_threshold[n];
  // One branch for all rows of the warp, not one a row. The four lanes of a row compare theirs behind it alone.
  if (!ptx::any(moves)) return;
  const float unit = T::ScoreMod::kScoreOffset ? 1.0f : scale;  // of what the lanes of a row compare
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n) {
    const uint32_t asking = ptx::ballot(scaled(n) > state.rescale_threshold[n]);
    const bool row_asks = (asking >> ptx::thread_index() % 32 / 4 * 4 & 15) != 0;
    if constexpr (T::ScoreMod::kScoreOffset) highest.at[n] = scaled(n);
    highest.at[n] = larger(highest.at[n], ptx::shuffle_xor(highest.at[n], 1));
    highest.at[n] = larger(highest.at[n], ptx::shuffle_xor(highest.at[n], 2));
    const float row_max = row_asks ? larger(state.row_max[n], highest.at[n] * unit) : state.row_max[n];
    const float factor = ptx::exp2_approx(state.row_max[n] - row_max);
    state.row_max[n] = row_max;
    state.row_sum[n] *= factor;
    FLASHSPARK_UNROLL
    for (int32_t c = 0; c < T::kHeadDimV / 8; ++c) {
      o.at[n / 2][c][n % 2 * 2] *= factor;
      o.at[n / 2][c][n % 2 * 2 + 1] *= factor;
    }
  }
}

// After a product with V, off the way of the next scores.
template <class T>
FLASHSPARK_DEVICE void update_rescale_thresholds(RowState<T> &state) {
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kLaneRows; ++n)
    state.rescale_threshold[n] =
        state.row_max[n] + __builtin_fminf(larger(ptx::log2_approx(state.row_sum[n]), 0.0f), kRescaleThreshold);
}

// Probabilities of 16 keys, as the A operand of P V: D of one product is A of the next, since the same lane holds the
// same rows, and two n8 tiles of S make one k16 step. Piece m of kPieces, so that the caller can spread the
// exponentials between the products of the 16 keys before.
template <class T>
struct Probabilities {
  uint32_t at[T::kMAtoms][4];
  static constexpr int32_t kFragments = T::kMAtoms * 4;

  // What dropout drops still counts in the row's sum.
  template <class Drops>
  FLASHSPARK_DEVICE void compute(int32_t fragment, const Scores<T> &s, int32_t step, RowState<T> &state, float scale,
                                 const ScoreOffsets<T> &offsets, Drops &dropout) {
    const int32_t m_atom = fragment / 4, half = fragment % 2, n = 2 * m_atom + half,
                  octet = 2 * step + fragment % 4 / 2;
    const float *x = &s.at[m_atom][octet][2 * half];
    const float row_max = offsets.subtract(state.row_max[n], n);
    const float low = ptx::exp2_approx(x[0] * scale - row_max), high = ptx::exp2_approx(x[1] * scale - row_max);
    state.row_sum[n] += low + high;
    at[m_atom][fragment % 4] = ptx::pack<typename T::Element>(low, high) & dropout.kept(n, octet);
  }
};

}  // namespace flashspark
