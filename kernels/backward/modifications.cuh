// What only kernels with ScoreMod::native do to scores: softcap, ALiBi, the bias by distance, dropout; and the
// gradients of what these depend on. The masks that these kernels have beside windows are RowMasks (scores.cuh).
//
// A lane takes its scores four at a time, those of one m16n8 tile: [e] is of row e % 2 and key e / 2 of its two each.
//
//   modify()       S          -> scores in units of log2, and the slopes of softcap
//   probability()  scores     -> P
//   derivative()   P, dP      -> the gradient of modified scores, and what biases get of it
//
// and dS is the derivative times the slope.
#pragma once

#include "attention/score_mod.cuh"
#include "backward/kept.cuh"

namespace flashspark {

// Of one lane and one tile of scores. All that depends on the place of a score is found here.
template <class T>
struct NativeScores {
  const BackwardArguments &a;
  const SequenceMask &mask;
  int32_t head;
  int32_t token, key;  // of the lane's first score
  float alibi_slope;   // units of log2
  float slope_sum;     // what the tile adds to the gradient of alibi_slopes

  FLASHSPARK_DEVICE NativeScores(const BackwardArguments &arguments, const SequenceMask &of, int32_t q_head,
                                 int32_t first_key, int32_t first_row)
      : a(arguments),
        mask(of),
        head(q_head),
        token(first_row + ptx::lane() % 4 * 2),
        key(first_key + ptx::lane() / 4),
        alibi_slope(0),
        slope_sum(0) {
    if (a.alibi_slopes != nullptr) alibi_slope = a.alibi_slopes[mask.seq * a.alibi_batch_stride + head] * kLog2E;
  }

  // Whether there is more than a mask, which scores have already. Where there is not, a tile of scores has a way of its
  // own (`modified` false), on which nothing is asked.
  FLASHSPARK_DEVICE bool is_modified() const {
    return a.softcap > 0 || a.rel_logits != nullptr || a.alibi_slopes != nullptr || a.dropout.scale != 1.0f;
  }

  // How far a score's key lies before its row.
  FLASHSPARK_DEVICE int32_t distance(int32_t m, int32_t j, int32_t e) const {
    return token + mask.shift - key + j * 8 + e % 2 - m * 16 - e / 2 * 8;
  }
  FLASHSPARK_DEVICE float magnitude(int32_t m, int32_t j, int32_t e) const {
    const float x =
        static_cast<float>(token + mask.shift - key) + static_cast<float>(j * 8 + e % 2 - m * 16 - e / 2 * 8);
    return x < 0 ? -x : x;
  }
  // Of row c of two in rel_logits and in its gradient, as elements.
  FLASHSPARK_DEVICE int64_t rel_row(int32_t j, int32_t c) const {
    return (mask.token_row + static_cast<uint32_t>(token + j * 8 + c)) * a.rel_token_stride + head * a.rel_head_stride;
  }

  // A masked score is -inf and stays it: nothing is read for it, as its row may not exist.
  template <bool modified>
  FLASHSPARK_DEVICE void modify(int32_t m, int32_t j, const float (&s)[4], float (&score)[4], float (&slope)[4]) const {
    const bool capped = modified && a.softcap > 0;
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) {
      score[e] = s[e] * a.scale_log2, slope[e] = 1.0f;
      if (capped) {
        // tanh y = 1 - 2 r and its derivative 4 r (1 - r), with r = 1 / (e^2y + 1). A masked score is -inf: r = 1.
        const float r = ptx::reciprocal_approx(ptx::exp2_approx(s[e] * a.cap_factor) + 1);
        score[e] = s[e] == minus_infinity() ? s[e] : a.cap_log2 - 2 * a.cap_log2 * r;
        slope[e] = 4 * r * (1 - r);
      }
    }
    if constexpr (!modified) return;
    if (a.rel_logits != nullptr) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) {
        const int32_t at = distance(m, j, e);
        if (s[e] != minus_infinity() && at >= 0 && at < a.rel_extent)
          score[e] += load_as_float(a.rel_logits, rel_row(j, e % 2) + at, a.rel_dtype) * kLog2E;
      }
    }
    if (a.alibi_slopes != nullptr) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) score[e] -= alibi_slope * magnitude(m, j, e);
    }
  }

  // dp: of kept scores, before 1 - dropout_p divides it. Every element of drel_logits has one key, and so one writer;
  // those that no kept key belongs to are 0 since preprocess.
  template <bool modified>
  FLASHSPARK_DEVICE void derivative(int32_t m, int32_t j, const float (&p)[4], const float (&dp)[4],
                                    const uint32_t (&delta)[2], const KeptScores<T> &kept, float (&ds)[4]) {
    const bool drops = modified && a.dropout.scale != 1.0f;
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) {
      float x = dp[e];
      if (drops) x = kept.keeps(m, j, e) ? x * a.dropout.scale : 0.0f;
      ds[e] = p[e] * (x - ptx::as_float(delta[e % 2]));
    }
    if constexpr (!modified) return;
    if (a.drel_logits != nullptr) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) {
        const int32_t at = distance(m, j, e);
        if (p[e] != 0 && at >= 0 && at < a.rel_extent) a.drel_logits[rel_row(j, e % 2) + at] = ds[e];
      }
    }
    if (a.dalibi_slopes != nullptr) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) slope_sum -= ds[e] * magnitude(m, j, e);
    }
  }
};

// The values of a lane's two rows in n8 tile j; of_rows: from the lane's first row on.
FLASHSPARK_DEVICE void load_row_pair(uint32_t (&values)[2], ptx::SharedAddress of_rows, int32_t j) {
  ptx::load_shared_8(values, of_rows + j * 8 * 4);
}

// From scores to P, and to what dropout leaves of it in 16 bits.
template <bool modified, class T>
FLASHSPARK_DEVICE void probabilities(const BackwardArguments &a, int32_t m, int32_t j, const float (&score)[4],
                                     const uint32_t (&lse)[2], const KeptScores<T> &kept, float (&p)[4],
                                     ScoreOperand<T> &dropped) {
  const bool drops = modified && a.dropout.scale != 1.0f;
  float left[4];
  FLASHSPARK_UNROLL
  for (int32_t e = 0; e < 4; ++e) {
    p[e] = ptx::exp2_approx(score[e] - ptx::as_float(lse[e % 2]));
    left[e] = !drops || kept.keeps(m, j, e) ? p[e] : 0.0f;
  }
  pack_tile(dropped, m, j, left);
}

// P^T and dS^T in 16 bits. `scores` are S^T, masked, and `gradients` dP^T, from 0 on; bits: of dropout.
template <bool modified, class T>
FLASHSPARK_DEVICE void modify_scores(NativeScores<T> &mod, const ScoreTile<T> &scores, const ScoreTile<T> &gradients,
                                     ptx::SharedAddress row_lse, ptx::SharedAddress row_delta, ptx::SharedAddress bits,
                                     int32_t first_row, ScoreOperand<T> &p, ScoreOperand<T> &ds) {
  KeptScores<T> kept{};
  if (modified && mod.a.dropout.scale != 1.0f) load_kept(kept, bits, first_row);
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
    uint32_t lse[2], delta[2];
    load_row_pair(lse, row_lse, j);
    load_row_pair(delta, row_delta, j);
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      float score[4], slope[4], probability[4], derivative[4];
      mod.template modify<modified>(m, j, scores.at[m][j], score, slope);
      probabilities<modified>(mod.a, m, j, score, lse, kept, probability, p);
      mod.template derivative<modified>(m, j, probability, gradients.at[m][j], delta, kept, derivative);
      FLASHSPARK_UNROLL
      for (int32_t e = 0; modified && e < 4; ++e) derivative[e] *= slope[e];
      pack_tile(ds, m, j, derivative);
    }
  }
}

template <class T>
FLASHSPARK_DEVICE void modified_scores(NativeScores<T> &mod, const ScoreTile<T> &scores, const ScoreTile<T> &gradients,
                                       ptx::SharedAddress row_lse, ptx::SharedAddress row_delta,
                                       ptx::SharedAddress bits, int32_t first_row, ScoreOperand<T> &p,
                                       ScoreOperand<T> &ds) {
  if (mod.is_modified()) {
    modify_scores<true>(mod, scores, gradients, row_lse, row_delta, bits, first_row, p, ds);
  } else {
    modify_scores<false>(mod, scores, gradients, row_lse, row_delta, bits, first_row, p, ds);
  }
}

// The same for a pair of warps with KeySharing::columns. The one that has S hands on P, and slopes of softcap if there
// are any, from lane to lane: `to` is at its part of BackwardMemory::modified. P is whole, in 32 bits: the gradient of
// alibi_slopes is a sum in which nearly all cancels. What dropout leaves of P^T is for the products ...
constexpr int32_t kModifiedSlopes = 2 * 32 * 16;  // behind P of two tiles

template <bool modified, class T>
FLASHSPARK_DEVICE void modify_probabilities(const NativeScores<T> &mod, const ScoreTile<T> &scores,
                                            ptx::SharedAddress row_lse, ptx::SharedAddress bits, int32_t first_row,
                                            ptx::SharedAddress to, ScoreOperand<T> &p) {
  static_assert(T::kMAtoms == 1 && T::kScoreRows == 16);
  const int32_t lane = ptx::lane();
  const bool capped = modified && mod.a.softcap > 0;
  KeptScores<T> kept{};
  if (modified && mod.a.dropout.scale != 1.0f) load_kept(kept, bits, first_row);
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < 2; ++j) {
    uint32_t lse[2];
    load_row_pair(lse, row_lse, j);
    float score[4], slope[4], probability[4];
    mod.template modify<modified>(0, j, scores.at[0][j], score, slope);
    probabilities<modified>(mod.a, 0, j, score, lse, kept, probability, p);
    ptx::Vector16 words;
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) words.word[e] = ptx::as_word(probability[e]);
    ptx::store_shared_16(to + (j * 32 + lane) * 16, words);
    if (capped)
      ptx::store_shared_8(to + kModifiedSlopes + (j * 32 + lane) * 8, ptx::pack<ptx::Float16>(slope[0], slope[1]),
                          ptx::pack<ptx::Float16>(slope[2], slope[3]));
  }
}

template <class T>
FLASHSPARK_DEVICE void modified_probabilities(const NativeScores<T> &mod, const ScoreTile<T> &scores,
                                              ptx::SharedAddress row_lse, ptx::SharedAddress bits, int32_t first_row,
                                              ptx::SharedAddress to, ScoreOperand<T> &p) {
  if (mod.is_modified()) {
    modify_probabilities<true>(mod, scores, row_lse, bits, first_row, to, p);
  } else {
    modify_probabilities<false>(mod, scores, row_lse, bits, first_row, to, p);
  }
}

// ... the one that has dP makes dS^T of both.
template <bool modified, class T>
FLASHSPARK_DEVICE void modify_gradients(NativeScores<T> &mod, const ScoreTile<T> &gradients,
                                        ptx::SharedAddress row_delta, ptx::SharedAddress bits, int32_t first_row,
                                        ptx::SharedAddress from, ScoreOperand<T> &ds) {
  const int32_t lane = ptx::lane();
  const bool capped = modified && mod.a.softcap > 0;
  KeptScores<T> kept{};
  if (modified && mod.a.dropout.scale != 1.0f) load_kept(kept, bits, first_row);
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < 2; ++j) {
    uint32_t delta[2];
    load_row_pair(delta, row_delta, j);
    const ptx::Vector16 words = ptx::load_shared_16(from + (j * 32 + lane) * 16);
    float probability[4], derivative[4];
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) probability[e] = ptx::as_float(words.word[e]);
    mod.template derivative<modified>(0, j, probability, gradients.at[0][j], delta, kept, derivative);
    if (capped) {
      uint32_t slopes[2];
      ptx::load_shared_8(slopes, from + kModifiedSlopes + (j * 32 + lane) * 8);
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e)
        derivative[e] *= ptx::to_float(ptx::Float16{static_cast<uint16_t>(slopes[e / 2] >> e % 2 * 16)});
    }
    pack_tile(ds, 0, j, derivative);
  }
}

template <class T>
FLASHSPARK_DEVICE void modified_gradients(NativeScores<T> &mod, const ScoreTile<T> &gradients,
                                          ptx::SharedAddress row_delta, ptx::SharedAddress bits, int32_t first_row,
                                          ptx::SharedAddress from, ScoreOperand<T> &ds) {
  if (mod.is_modified()) {
    modify_gradients<true>(mod, gradients, row_delta, bits, first_row, from, ds);
  } else {
    modify_gradients<false>(mod, gradients, row_delta, bits, first_row, from, ds);
  }
}

// A warp's part of the gradient of a head's ALiBi slope goes to scratch memory, and another sum begins.
template <class T>
FLASHSPARK_DEVICE void store_slope_sum(const BackwardArguments &a, int32_t head, float &sum) {
  if (a.dalibi_slopes == nullptr) return;
  FLASHSPARK_UNROLL
  for (uint32_t lanes = 16; lanes > 0; lanes /= 2) sum += ptx::shuffle_xor(sum, lanes);
  const KeyTile tile =
      find_key_tile(a, static_cast<int32_t>(ptx::cta_x()));  // again, instead of being kept through the loop
  const int32_t slot = first_key_slot(a, tile.seq, static_cast<int32_t>(tile.row)) + tile.first / T::kKeys;
  const int64_t at = (static_cast<int64_t>(head) * a.key_slots + slot) * T::kWarps + ptx::warp();
  if (ptx::lane() == 0) a.slope_sums[at] = sum;
  sum = 0;
}

}  // namespace flashspark
