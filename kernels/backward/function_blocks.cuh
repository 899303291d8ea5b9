// Blocks of rows as pair_block.cuh computes them, with the user's functions: one after another, or one of which a mask
// keeps a part.
#pragma once

#include "backward/function_pairs.cuh"
#include "backward/function_walk.cuh"

namespace flashspark {

// Of which of a lane's scores of a block the row keeps the key: a bit each, in the order of PairTile's parts.
template <class T>
FLASHSPARK_DEVICE uint32_t kept_scores(const FunctionBackwardArguments &a, const KeyMask &mask, int32_t tokens,
                                       const FunctionPairTile &tile) {
  using Mask = typename T::Functions::Mask;
  constexpr int32_t kTiles = T::kScoreRows / 8;
  // Else the compiler keeps what is the same for all tiles in registers.
  const auto own = static_cast<int32_t>(keep_in_register(static_cast<uint32_t>(ptx::lane())));
  const int32_t row = tile.token + own % 4 * 2;
  uint32_t kept = (1u << T::kMAtoms * kTiles * 4) - 1;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; tile.masks && m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      const int32_t key = tile.first_key + m * 16 + x * 8 + own / 4;
      const Interval rows{key + mask.low - row, key < mask.end ? min_of(key + mask.high, tokens) - row : INT32_MIN};
      FLASHSPARK_UNROLL
      for (int32_t c = 0; c < 2 * kTiles; ++c) {
        const int32_t at = c / 2 * 8 + c % 2;
        if (at < rows.begin || at >= rows.end) kept &= ~(1u << ((m * kTiles + c / 2) * 4 + 2 * x + c % 2));
      }
    }
  }
  if constexpr (Mask::kExists) {
    if (!tile.asks_mask) return kept;
    const auto first_real = static_cast<float>(tile.first_key + own / 4);
    uint32_t words[kTiles][2][Mask::kWords + 1];
    FLASHSPARK_UNROLL
    for (int32_t j = 0; j < kTiles; ++j)
      load_function_words<T, T::Functions::Score::kWords, Mask::kWords>(words[j], tile.words,
                                                                        tile.first_row + j * 8 + own % 4 * 2);
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) {
        const int32_t step = m * 16 + x * 8;
        const FunctionKey key{tile.first_key + own / 4 + step, first_real, static_cast<float>(step)};
        const typename Mask::Key of_key = Mask::key(a.functions, key);
        uint32_t dropped = 0;  // of the key, so that no chain goes through all scores
        FLASHSPARK_UNROLL
        for (int32_t c = 0; c < 2 * kTiles; ++c) {
          if (!Mask::keep(a.functions, words[c / 2][c % 2], of_key, key))
            dropped |= 1u << ((m * kTiles + c / 2) * 4 + 2 * x + c % 2);
        }
        kept &= ~dropped;
      }
    }
  }
  return kept;
}

// The warp with P^T (pair_block.cuh). cut: some scores are not kept.
template <class T, bool cut>
struct FunctionScoreTile : PairTile<T, true> {
  using Base = PairTile<T, true>;
  using Score = typename T::Functions::Score;
  static constexpr bool kChanges = Score::kExists && !Score::kIsBias;

  const FunctionBackwardArguments &a;
  int32_t first_key;  // of the warp
  ptx::SharedAddress words;
  uint32_t kept;  // of the block, with `cut`

  FLASHSPARK_DEVICE FunctionPairTile where() const {
    return {first_key, 0, this->number * T::kScoreRows, false, false, 0, words};
  }
  FLASHSPARK_DEVICE void begin(ptx::SharedAddress) { begin_with_bias(a, where(), this->scores); }
  FLASHSPARK_DEVICE void load_lse(ptx::SharedAddress row_lse) {
    Base::load_lse(row_lse);
    if constexpr (Score::kHasOffset) {
      const auto first = static_cast<float>(first_key + ptx::lane() / 4);
      for_each_function_row<T, Score, 0>(where(), ptx::lane(), [&](int32_t j, int32_t c, const uint32_t *w) {
        this->lse[j][c] -= Score::offset(a.functions, w, inverse_bias_scale(a), first) * this->scale;
      });
    }
  }
  FLASHSPARK_DEVICE bool keeps(int32_t n, int32_t e) const {
    return !cut || (kept >> (this->number * 16 + n * 4 + e) & 1) != 0;
  }
  FLASHSPARK_DEVICE void after(int32_t n) {
    if (n >= Base::kParts) return;
    float(&s)[4] = this->scores.at[n / 2][n % 2];
    if constexpr (!kChanges) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) {
        s[e] = ptx::exp2_approx(s[e] * this->scale - this->lse[n % 2][e % 2]);
        if (!keeps(n, e)) s[e] = 0;
      }
      this->hand_on(n);
    } else {
      const int32_t m = n / 2, j = n % 2, first = first_key + ptx::lane() / 4;
      const auto first_real = static_cast<float>(first);
      uint32_t w[2][Score::kWords + 1];
      load_function_words<T, 0, Score::kWords>(w, words, this->number * T::kScoreRows + j * 8 + ptx::lane() % 4 * 2);
      float product[4];
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) {
        const int32_t step = m * 16 + e / 2 * 8;
        const FunctionKey key{first + step, first_real, static_cast<float>(step)};
        const auto y = Score::apply(a.functions, a.gradients, w[e % 2], Score::key(a.functions, key), s[e],
                                    a.softmax_scale, 1.0f, key);
        s[e] = ptx::exp2_approx(y.value * kLog2E - this->lse[j][e % 2]);
        if (!keeps(n, e)) s[e] = 0;
        // What is not kept has a derivative, too, of which nothing is known.
        product[e] = s[e] == 0 ? 0.0f : s[e] * y.by_score;
      }
      pack_tile(this->operand, m, j, s);
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x)
        ptx::store_shared_4(this->place(n, x), ptx::pack<typename T::Element>(product[2 * x], product[2 * x + 1]));
      if (n == Base::kParts - 1) ptx::pair_arrive(this->pair, this->number);
    }
  }
};

// What the tiles of a warp of a pair are of: dP^T and dK; or S^T and dV, of a block without and with a mask.
enum class PairWork : uint8_t { keys, values, cut_values };

// As add_whole_blocks() without functions, which ptxas compiles worse with any of what is different here: the next
// block may be anywhere, but behind the others follows the one before it; and its words are written.
template <PairWork work, class Loop>
FLASHSPARK_DEVICE void add_listed_blocks(Loop &loop, const BlockCopies<typename Loop::T> &copies, const RowWalk &last,
                                         const ListedRows &at, RowWalk next_block, int32_t stage, int32_t count) {
  using T = typename Loop::T;
  constexpr bool values_summed = work != PairWork::keys;
  const BackwardArguments &a = loop.a;
  const int32_t warp = ptx::uniform(ptx::warp());
  const ptx::SharedAddress keys = loop.shared + T::KeyLayout::step(0, warp * (T::kSumColumns / 8));
  const BlockPlace step = copies.step();
  BlockPlace next = place_of<T>(a, loop.q, loop.dout, loop.first_padded_row, next_block);
  int64_t last_row = loop.padded_row(last);
  FLASHSPARK_NO_UNROLL
  for (; count > 0; --count, stage ^= 1) {
    ptx::mbarrier_wait(loop.ready(), static_cast<uint32_t>(stage));
    // Else what follows from it is kept in registers.
    const uint32_t thread = ptx::unknown(loop.lane.thread);
    const PairRows rows{values_summed ? loop.queries(stage) : loop.douts(stage),
                        values_summed ? loop.douts(stage) : loop.queries(stage), loop.rows(stage) + thread % 4 * 8,
                        loop.dscores(stage)};
    const auto copy = [&] {
      ptx::mbarrier_wait(loop.done(), static_cast<uint32_t>(1 - stage));
      copies.copy(next, loop.queries(1 - stage), loop.douts(1 - stage), loop.rows(1 - stage), thread, warp);
      ptx::cp_async_commit();
      if constexpr (work == PairWork::keys) loop.write_words(next_block, 1 - stage);
    };
    const auto add_dq = [&](const QueryGradient<T> &dq) {
      static_assert(T::kSumRowWarps == 1 && T::kSumColumns == 16);
      // As add_query_gradient(), with a thread's part that others share.
      float *const to = a.dq_sum + last_row * T::kHeadDim + warp * 128 + thread * 4;
      FLASHSPARK_UNROLL
      for (int32_t m = 0; m < T::kSumAtoms; ++m) {
        FLASHSPARK_UNROLL
        for (int32_t n = 0; n < 2; ++n) ptx::add_to_memory_4(to + (m * (T::kHeadDim / 8) + n) * 128, dq.at[m][n]);
      }
    };
    add_whole_block<T>(loop.template tile<work>(at, stage), loop.dk, loop.keys, rows, keys, loop.dscores(1 - stage),
                       loop.lane, copy, add_dq, [&] { loop.arrive_ready(); });
    ptx::mbarrier_arrive(loop.done());
    last_row = next.row - T::kRows;
    next = next + step;
    ++next_block.block;
  }
}

}  // namespace flashspark
