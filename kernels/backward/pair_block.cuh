// A whole block of rows by pairs of warps, and dQ of the block before it. No mask touches its scores, so that all of it
// is one piece of code for the compiler, in which products go on while exponentials, copies and stores are under way:
//
//   products                             beside them
//   dQ of the last block, first S^T      copies of the next block; then dQ is added to memory
//   second S^T                           P^T of the first tile of rows
//   dV of the first                      P^T of the second
//   dV of the second
//
// for the warp that sums dV; for the one that sums dK dP^T, dS^T and dK in place of S^T, P^T and dV.
#pragma once

#include "backward/scores.cuh"

namespace flashspark {

// Columns [16 d, 16 d + 16) of score_product(), of a tile of 16 rows.
template <class T>
FLASHSPARK_DEVICE void score_step(ScoreTile<T> &scores, const KeyOperand<T, T::kHeadDim, true> &operand,
                                  ptx::SharedAddress rows, const BackwardOffsets<T> &lane, int32_t d) {
  uint32_t b[4];
  T::Mma::template load_k<typename T::KeyLayout>(b, rows, lane.of_head.columns, d);
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    ptx::mma_m16n8k16<typename T::Element>(scores.at[m][0], operand.at[m][d], b[0], b[1]);
    ptx::mma_m16n8k16<typename T::Element>(scores.at[m][1], operand.at[m][d], b[2], b[3]);
  }
}

// The same of gradient_product().
template <class T>
FLASHSPARK_DEVICE void gradient_step(KeyGradient<T, T::kHeadDim> &gradient, const ScoreOperand<T> &scores,
                                     ptx::SharedAddress rows, const BackwardOffsets<T> &lane, int32_t n) {
  uint32_t b[4];
  T::Mma::template load_v<typename T::KeyLayout>(b, rows, lane.of_head.rows, n);
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    ptx::mma_m16n8k16<typename T::Element>(gradient.at[m][2 * n], scores.at[m][0], b[0], b[1]);
    ptx::mma_m16n8k16<typename T::Element>(gradient.at[m][2 * n + 1], scores.at[m][0], b[2], b[3]);
  }
}

// Keys [16 step, 16 step + 16) of query_product().
template <class T>
FLASHSPARK_DEVICE void query_step(QueryGradient<T> &dq, ptx::SharedAddress scores, ptx::SharedAddress keys,
                                  const BackwardOffsets<T> &lane, int32_t step) {
  using Scores = typename T::ScoreLayout;
  uint32_t a[T::kSumAtoms][4];
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kSumAtoms; ++m)
    ptx::ldmatrix_x4_trans(a[m], scores + step * 16 * Scores::kPitch + Scores::step(lane.sum_rows, 2 * m));
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kSumColumns / 16; ++n) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, keys + step * 16 * T::KeyLayout::kPitch + lane.sum_columns[n]);
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kSumAtoms; ++m) {
      ptx::mma_m16n8k16<typename T::Element>(dq.at[m][2 * n], a[m], b[0], b[1]);
      ptx::mma_m16n8k16<typename T::Element>(dq.at[m][2 * n + 1], a[m], b[2], b[3]);
    }
  }
}

// A tile of 16 rows between a warp's two products of it, in four parts: of m16 tile n / 2 of its keys and n8 tile n % 2
// of the rows. A product of eight steps calls before() and after() around each: the warp with P^T has it ready in half
// of them, the other one waits for it no sooner.
template <class T, bool values_summed>
struct PairTile {
  static constexpr int32_t kSteps = 8, kParts = 4;
  static_assert(!T::kPaired || T::kStages != RowStages::all || (T::kMAtoms == 2 && T::kScoreRows == 16));

  int32_t pair, number;   // of pair_arrive()
  ptx::SharedAddress to;  // where the lane stores the tile
  float scale;
  ScoreTile<T> scores;
  ScoreOperand<T> operand;
  float lse[2][2];
  uint32_t p[kParts][2];  // P^T of the other warp

  // Before the first product. lse: what the lane has of it of the tile; delta lies T::kRows floats behind it.
  FLASHSPARK_DEVICE void begin(ptx::SharedAddress row_lse) {
    if constexpr (!values_summed) begin_with_delta<T>(scores, row_lse + T::kRows * 4);
  }
  FLASHSPARK_DEVICE void load_lse(ptx::SharedAddress row_lse) {
    if constexpr (values_summed) {
      for_row_pairs<T>(row_lse, [&](int32_t j, float first, float second) { lse[j][0] = first, lse[j][1] = second; });
    }
  }
  FLASHSPARK_DEVICE void before(int32_t step) {
    if (values_summed || step != kSteps - kParts) return;
    ptx::pair_wait(pair, number);
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kParts; ++n) {
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) p[n][x] = ptx::load_shared_4(place(n, x));
    }
  }
  FLASHSPARK_DEVICE void after(int32_t step) {
    const int32_t n = values_summed ? step : step - (kSteps - kParts);
    if (n < 0 || n >= kParts) return;
    float(&s)[4] = scores.at[n / 2][n % 2];
    if constexpr (values_summed) {
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) s[e] = ptx::exp2_approx(s[e] * scale - lse[n % 2][e % 2]);
    } else {
      using Element = typename T::Element;
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) {
        s[2 * x] *= ptx::to_float(Element{static_cast<uint16_t>(p[n][x])});
        s[2 * x + 1] *= ptx::to_float(Element{static_cast<uint16_t>(p[n][x] >> 16)});
      }
    }
    pack_tile(operand, n / 2, n % 2, s);
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) ptx::store_shared_4(place(n, x), operand.pair(n / 2, n % 2, x));
    if (values_summed && n == kParts - 1) ptx::pair_arrive(pair, number);
  }

 private:
  FLASHSPARK_DEVICE ptx::SharedAddress place(int32_t n, int32_t x) const {
    return T::ScoreLayout::step(to, n % 2) + (n / 2 * 16 + x * 8) * T::ScoreLayout::kPitch;
  }
};

// What a warp has of one stage: `first` are the rows of its first product, `second` those of its second one.
struct PairRows {
  ptx::SharedAddress first, second, lse, dscores;
};

// dq: of the last block, whose dS^T lies at last_dscores. copy() begins the copies of the next block, add_dq() adds dq
// to memory.
template <class T, bool values_summed, class Copy, class AddDq>
FLASHSPARK_DEVICE void add_whole_block(KeyGradient<T, T::kHeadDim> &sums,
                                       const KeyOperand<T, T::kHeadDim, true> &operand, const PairRows &rows,
                                       ptx::SharedAddress keys, ptx::SharedAddress last_dscores, float scale,
                                       const BackwardOffsets<T> &lane, Copy &&copy, AddDq &&add_dq) {
  using Tile = PairTile<T, values_summed>;
  constexpr int32_t kSteps = Tile::kSteps, kTileBytes = T::kScoreRows * T::KeyLayout::kPitch;
  static_assert(T::kRows == 2 * T::kScoreRows && T::kHeadDim == kSteps * 16 && T::kKeys == kSteps * 16);
  const int32_t pair = lane.warp_key / T::kWarpKeys;
  Tile first{pair, 0, rows.dscores + lane.score_store, scale, {}, {}, {}, {}};
  Tile second{pair, 1, T::ScoreLayout::step(first.to, 2), scale, {}, {}, {}, {}};
  const ptx::SharedAddress second_lse = rows.lse + T::kScoreRows * 4;
  QueryGradient<T> dq{};
  first.begin(rows.lse);
  FLASHSPARK_UNROLL
  for (int32_t d = 0; d < kSteps; ++d) {
    query_step(dq, last_dscores, keys, lane, d);
    score_step(first.scores, operand, rows.first, lane, d);
    if (d == 1) copy();
  }
  add_dq(dq);
  first.load_lse(rows.lse);
  second.begin(second_lse);
  FLASHSPARK_UNROLL
  for (int32_t d = 0; d < kSteps; ++d) {
    first.before(d);
    score_step(second.scores, operand, rows.first + kTileBytes, lane, d);
    first.after(d);
  }
  second.load_lse(second_lse);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kSteps; ++n) {
    second.before(n);
    gradient_step(sums, first.operand, rows.second, lane, n);
    second.after(n);
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kSteps; ++n) gradient_step(sums, second.operand, rows.second + kTileBytes, lane, n);
}

}  // namespace flashspark
