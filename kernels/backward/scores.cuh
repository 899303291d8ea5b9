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

// The mask of kernels with ScoreMod::native, where a row keeps up to two intervals of keys and the tokens that keep a
// key need not be an interval: between what tokens_of_keys() says of a warp's keys, each row of a tile is asked.
template <class T>
struct RowMasks {
  const SequenceArguments &a;
  SequenceMask of;
  TokenBounds tokens;  // of the warp's keys

  FLASHSPARK_DEVICE Interval visited(int32_t, int32_t) const { return tokens.visited; }
  FLASHSPARK_DEVICE Interval unmasked(int32_t, int32_t) const { return tokens.unmasked; }

  // Of a row of the tile for each lane, the last ones again where a tile has fewer: the begin and the length of both
  // intervals. Rows past the sequence keep nothing.
  struct Lengths {
    int32_t begin[2], length[2];
  };
  FLASHSPARK_DEVICE Lengths of_lane(int32_t first_row) const {
    const int32_t token = first_row + ptx::lane() % T::kScoreRows;
    RowMask row{};
    if (token < of.end - of.shift) row = row_mask<true>(a, of, token);
    return {{row.first.begin, row.second.begin},
            {max_of(0, row.first.end - row.first.begin), max_of(0, row.second.end - row.second.begin)}};
  }
};
template <class T>
using BackwardMask = std::conditional_t<T::kNative, RowMasks<T>, KeyMask>;

// first_key: of the warp.
template <class T>
FLASHSPARK_DEVICE BackwardMask<T> backward_mask(const SequenceArguments &a, const SequenceMask &mask,
                                                int32_t first_key) {
  if constexpr (T::kNative) {
    SequenceMask of = mask;
    of.begin = 0;  // no key is padding
    of.causal = ptx::uniform(mask.causal) != 0;
    of.token_row = static_cast<int32_t>(mask.token_row);  // there are fewer than 2^31
    TokenBounds tokens = tokens_of_keys<true>(a, of, {first_key, first_key + T::kWarpKeys}, of.end - of.shift);
    if (first_key + T::kWarpKeys > of.end) tokens.unmasked = {0, 0};  // it speaks of keys in use alone
    return {a, of, {uniform(tokens.visited), uniform(tokens.unmasked)}};
  } else {
    return key_mask(a, mask);
  }
}

// The blocks of rows that may keep keys of the tile that begins at first_key.
template <class T, bool native = T::kNative>
FLASHSPARK_DEVICE Interval visited_blocks(const SequenceArguments &a, const SequenceMask &mask, int32_t first_key,
                                          int32_t tokens) {
  const Interval keys{first_key, min_of(first_key + T::kKeys, mask.end)};
  const Interval visited = tokens_of_keys<native>(a, mask, keys, tokens).visited;
  const int32_t begin = visited.begin / T::kRows;
  return {begin, is_empty(visited) ? begin : ceil_div(visited.end, T::kRows)};
}

// Whether a row of a tile keeps one of the warp's keys, where both may see each other. Only PrefixLM ranges leave it
// open. All threads of the warp call it.
template <class T>
FLASHSPARK_DEVICE bool any_row_keeps(const BackwardMask<T> &mask, int32_t first_key, int32_t first_row) {
  if constexpr (T::kNative) {
    if (mask.a.prefix_mode == PrefixMode::none) return true;
    const typename RowMasks<T>::Lengths row = mask.of_lane(first_row);
    bool any = false;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < 2; ++n)
      any |= row.length[n] > 0 && row.begin[n] < first_key + T::kWarpKeys && row.begin[n] + row.length[n] > first_key;
    return ptx::ballot(any) != 0;
  }
  return true;
}

// Calls f(m16 tile, n8 tile, e, whether the row keeps the key) for the lane's scores of a tile, as ScoreTile has them.
// All threads of the warp call it.
template <class T, class F>
FLASHSPARK_DEVICE void for_kept_scores(const RowMasks<T> &mask, int32_t first_key, int32_t first_row, F &&f) {
  const int32_t lane = ptx::lane();
  const typename RowMasks<T>::Lengths own = mask.of_lane(first_row);
  FLASHSPARK_UNROLL
  for (int32_t c = 0; c < T::kScoreRows / 4; ++c) {
    const auto from = static_cast<uint32_t>(c / 2 * 8 + lane % 4 * 2 + c % 2);
    uint32_t begin[2], length[2];
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < 2; ++n) {
      begin[n] = static_cast<uint32_t>(ptx::shuffle(own.begin[n], from));
      length[n] = static_cast<uint32_t>(ptx::shuffle(own.length[n], from));
    }
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) {
        const auto key = static_cast<uint32_t>(first_key + m * 16 + x * 8 + lane / 4);
        f(m, c / 2, 2 * x + c % 2, key - begin[0] < length[0] || key - begin[1] < length[1]);
      }
    }
  }
}

template <class T>
FLASHSPARK_DEVICE void mask_score_tile(ScoreTile<T> &scores, const RowMasks<T> &mask, int32_t first_key,
                                       int32_t first_row) {
  for_kept_scores<T>(mask, first_key, first_row, [&](int32_t m, int32_t j, int32_t e, bool keeps) {
    if (!keeps) scores.at[m][j][e] = minus_infinity();
  });
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
FLASHSPARK_DEVICE void pack_tile(ScoreOperand<T> &to, int32_t m, int32_t j, const float (&from)[4]) {
  FLASHSPARK_UNROLL
  for (int32_t x = 0; x < 2; ++x) to.pair(m, j, x) = ptx::pack<typename T::Element>(from[2 * x], from[2 * x + 1]);
}
template <class T>
FLASHSPARK_DEVICE void pack_scores(ScoreOperand<T> &to, const ScoreTile<T> &from) {
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t j = 0; j < T::kScoreRows / 8; ++j) pack_tile(to, m, j, from.at[m][j]);
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
