// Dropout: which scores of a block of rows are kept.
#pragma once

#include "attention/dropout.cuh"
#include "backward/scores.cuh"

namespace flashspark {

// A draw is for sixteen keys of a row, of which a lane holds two, so the CTA draws for its keys together, one block of
// rows ahead: for each two rows and sixteen keys a word of what is kept, the bits of the second row in the upper half.
template <class T>
FLASHSPARK_DEVICE void draw_kept(const BackwardArguments &a, PhiloxKey key, int32_t seq, int32_t first_key,
                                 const RowWalk &at, ptx::SharedAddress to) {
  static_assert(T::kKeys % kDropoutKeys == 0);
  constexpr int32_t kGroups = T::kKeys / 16;
  const int32_t lane = ptx::lane(), quarter = lane % 4;
  const auto other = [lane](uint32_t x, int32_t mask) {
    return static_cast<uint32_t>(ptx::shuffle(static_cast<int32_t>(x), static_cast<uint32_t>(lane ^ mask)));
  };
  // A warp's count of turns is the same for all lanes, and ptxas knows it.
  FLASHSPARK_NO_UNROLL
  for (int32_t base = ptx::uniform(ptx::warp()) * 32; base < T::kKeys / kDropoutKeys * T::kRows * 4;
       base += T::kThreads) {
    const int32_t n = base + lane;
    const int32_t row = n / 4 % T::kRows, block = n / (4 * T::kRows);
    uint32_t row_words[kPhiloxRowWords + 1];
    dropout_row(key, at.head, at.block * T::kRows + row, row_words);
    const int32_t draw = (first_key / kDropoutKeys + block) * (kDropoutKeys / 16) + quarter;
    const PhiloxWords drawn = dropout_draws(key, dropout_keys(key, seq, draw), row_words);
    uint32_t bits[4];
    FLASHSPARK_UNROLL
    for (int32_t group = 0; group < 4; ++group) {
      bits[group] = 0;
      FLASHSPARK_UNROLL
      for (int32_t octet = 0; octet < 2; ++octet) {
        const uint32_t word = octet == 0 ? drawn.at[group] : ptx::permute_bytes(drawn.at[group], 0x0321);
        const uint32_t kept = ptx::magnitude_not_less_f16x2(word, a.dropout.limit) ^ a.dropout.flip;
        bits[group] |= ((kept & 1) | (kept >> 16 & 1) << 1) << (2 * quarter + 8 * octet + row % 2 * 16);
      }
    }
    // Lanes that hold bits of the same words join them: each of four ends with one group's.
    const int32_t odd = quarter % 2, high = quarter / 2;
    uint32_t two[2];
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x)
      two[x] = (odd ? bits[2 * x + 1] : bits[2 * x]) | other(odd ? bits[2 * x] : bits[2 * x + 1], 1);
    uint32_t one = (high ? two[1] : two[0]) | other(high ? two[0] : two[1], 2);
    one |= other(one, 4);
    if (row % 2 == 0) ptx::store_shared_4(to + (row / 2 * kGroups + block * 4 + quarter) * 4, one);
  }
}

// The words of a lane's rows in a tile of scores whose first row is `first_row` of the block.
template <class T>
struct KeptScores {
  uint32_t at[T::kMAtoms][T::kScoreRows / 8];

  FLASHSPARK_DEVICE bool keeps(int32_t m, int32_t j, int32_t e) const {
    return at[m][j] >> (e % 2 * 16 + e / 2 * 8 + ptx::lane() / 4) & 1;
  }
};
template <class T>
FLASHSPARK_DEVICE void load_kept(KeptScores<T> &kept, ptx::SharedAddress from, int32_t first_row) {
  constexpr int32_t kGroups = T::kKeys / 16;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t j = 0; j < T::kScoreRows / 8; ++j) {
      const int32_t pair = first_row / 2 + j * 4 + ptx::lane() % 4;
      kept.at[m][j] = ptx::load_shared_4(from + (pair * kGroups + T::key_warp() * T::kMAtoms + m) * 4);
    }
  }
}

}  // namespace flashspark
