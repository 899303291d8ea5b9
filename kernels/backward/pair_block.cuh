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

#include "backward/block_copies.cuh"
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

// Keys [16 step, 16 step + 16) of query_product(); `keys` is at the warp's columns.
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
    T::Mma::template load_v<typename T::KeyLayout>(b, keys + step * 16 * T::KeyLayout::kPitch, lane.of_head.rows, n);
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kSumAtoms; ++m) {
      ptx::mma_m16n8k16<typename T::Element>(dq.at[m][2 * n], a[m], b[0], b[1]);
      ptx::mma_m16n8k16<typename T::Element>(dq.at[m][2 * n + 1], a[m], b[2], b[3]);
    }
  }
}

// A tile of 16 rows between a warp's two products of it, in four parts: of m16 tile n / 2 of its keys and n8 tile n % 2
// of the rows. A product of eight steps calls before() and after() around each. The warp with P^T has it ready in the
// first half of them; the other one waits for it after two and takes all the others.
template <class T, bool values_summed>
struct PairTile {
  static constexpr int32_t kSteps = 8, kParts = 4, kWait = 2;
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
    if (values_summed || step != kWait) return;
    ptx::pair_wait(pair, number);
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kParts; ++n) {
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) p[n][x] = ptx::load_shared_4(place(n, x));
    }
  }
  FLASHSPARK_DEVICE void after(int32_t step) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kParts; ++n) {
      if (step == (values_summed ? n : kWait + n * (kSteps - kWait) / kParts)) part(n);
    }
  }
  FLASHSPARK_DEVICE void part(int32_t n) {
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
    hand_on(n);
  }
  FLASHSPARK_DEVICE void hand_on(int32_t n) {
    pack_tile(operand, n / 2, n % 2, scores.at[n / 2][n % 2]);
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) ptx::store_shared_4(place(n, x), operand.pair(n / 2, n % 2, x));
    if (values_summed && n == kParts - 1) ptx::pair_arrive(pair, number);
  }
  // Beside each product of the block's last eight steps, of the second tile.
  FLASHSPARK_DEVICE void beside(int32_t) {}
  FLASHSPARK_DEVICE ptx::SharedAddress place(int32_t n, int32_t x) const {
    return T::ScoreLayout::step(to, n % 2) + (n / 2 * 16 + x * 8) * T::ScoreLayout::kPitch;
  }
};

// What a warp has of one stage: `first` are the rows of its first product, `second` those of its second one.
struct PairRows {
  ptx::SharedAddress first, second, lse, dscores;
};

// tile: a PairTile, or what offers the same, with all that its two tiles have in common but for their places.
// dq: of the last block, whose dS^T lies at last_dscores. copy() begins the copies of the next block, add_dq() adds dq
// to memory, arrive() says that this block's dS^T is there.
template <class T, class Tile, class Copy, class AddDq, class Arrive>
FLASHSPARK_DEVICE void add_whole_block(const Tile &tile, KeyGradient<T, T::kHeadDim> &sums,
                                       const KeyOperand<T, T::kHeadDim, true> &operand, const PairRows &rows,
                                       ptx::SharedAddress keys, ptx::SharedAddress last_dscores,
                                       const BackwardOffsets<T> &lane, Copy &&copy, AddDq &&add_dq, Arrive &&arrive) {
  constexpr int32_t kSteps = Tile::kSteps, kTileBytes = T::kScoreRows * T::KeyLayout::kPitch;
  static_assert(T::kRows == 2 * T::kScoreRows && T::kHeadDim == kSteps * 16 && T::kKeys == kSteps * 16);
  Tile first = tile, second = tile;
  first.pair = second.pair = lane.warp_key / T::kWarpKeys;
  first.number = 0, second.number = 1;
  first.to = rows.dscores + lane.score_store, second.to = T::ScoreLayout::step(first.to, 2);
  const ptx::SharedAddress second_lse = rows.lse + T::kScoreRows * 4;
  QueryGradient<T> dq{};
  first.begin(rows.lse);
  FLASHSPARK_UNROLL
  for (int32_t d = 0; d < kSteps; ++d) {
    query_step(dq, last_dscores, keys, lane, d);
    score_step(first.scores, operand, rows.first, lane, d);
  }
  copy();
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
  arrive();
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < kSteps; ++n) {
    gradient_step(sums, second.operand, rows.second + kTileBytes, lane, n);
    second.beside(n);
  }
}

// The tiles of blocks one after another: next() is what a block's two have in common, lane() the warp's offsets.
template <class T, bool values_summed>
struct PairTiles {
  template <class Loop>
  FLASHSPARK_DEVICE PairTiles(const Loop &, const RowWalk &, int32_t, int32_t) {}
  template <class Loop>
  FLASHSPARK_DEVICE PairTile<T, values_summed> next(const Loop &loop, int32_t, int32_t) {
    PairTile<T, values_summed> tile{};
    tile.scale = loop.a.scale_log2;
    return tile;
  }
  template <class Loop>
  FLASHSPARK_DEVICE const BackwardOffsets<T> &lane(const Loop &loop) const {
    return loop.lane;
  }
};
template <class T, bool values_summed>
struct DropoutTiles;  // dropout_pairs.cuh

// So many blocks from `at` on, whose Q and dO are on their way, as is dS^T of the last one. Loop: BackwardLoop. With
// turns, `at` is not the first block of a head.
template <bool values_summed, class Loop, class Walk>
FLASHSPARK_DEVICE void add_whole_blocks(Loop &loop, const BlockCopies<typename Loop::T> &copies, const Walk &last,
                                        const Walk &at, int32_t stage, int32_t count, int32_t done_blocks) {
  using T = typename Loop::T;
  const BackwardArguments &a = loop.a;
  const uint32_t thread = loop.lane.thread;
  const int32_t warp = ptx::uniform(ptx::warp());
  const ptx::SharedAddress keys = loop.shared + T::KeyLayout::step(0, warp * (T::kSumColumns / 8));
  BlockPlace step = copies.step();
  if constexpr (T::kHasWalks) {
    if (at.step < 0) step = {-step.q, -step.dout, -step.row};
  }
  BlockPlace next = place_of<T>(a, loop.q, loop.dout, loop.first_padded_row, at) + step;
  int64_t last_row = T::kHasWalks ? 0 : loop.padded_row(last);
  std::conditional_t<T::kDropout, DropoutTiles<T, values_summed>, PairTiles<T, values_summed>> tiles(loop, at, stage,
                                                                                                     count);
  const int32_t end = at.block + count, walked = done_blocks + count;
  float *const sums = a.dq_sum;
  FLASHSPARK_NO_UNROLL
  for (; count > 0; --count, stage ^= 1) {
    if constexpr (T::kHasWalks) stage = (walked - count) % 2;
    ptx::mbarrier_wait(loop.ready(), static_cast<uint32_t>(stage));
    if constexpr (T::kInTurns) {
      // All have added to the last block but one.
      constexpr int32_t kTurn = decltype(loop.turns)::kBlocks;
      const int32_t block = end - count;
      if (block % kTurn == 1 && block > at.block) loop.turns.pass({at.begin, at.end, at.head, block - 2});
    }
    if constexpr (T::kHasWalks) {
      if (walked - count > 1) loop.turns.pass(walked - count - 2);
    }
    const PairRows rows{values_summed ? loop.queries(stage) : loop.douts(stage),
                        values_summed ? loop.douts(stage) : loop.queries(stage), loop.row_values(stage, 0),
                        loop.dscores(stage)};
    const auto copy = [&] {
      if constexpr (T::kDropout) ptx::mbarrier_arrive(loop.summed());
      ptx::mbarrier_wait(loop.done(), static_cast<uint32_t>(1 - stage));
      if constexpr (T::kHasWalks) next.row = loop.turns.row(walked - count + 1);
      copies.copy(next, loop.queries(1 - stage), loop.douts(1 - stage), loop.rows(1 - stage), thread, warp);
      ptx::cp_async_commit();
    };
    const auto add_dq = [&](const QueryGradient<T> &dq) {
      static_assert(T::kSumRowWarps == 1 && T::kSumColumns == 16);
      // As add_query_gradient(), with a thread's part that others share.
      [[maybe_unused]] int32_t sign = 0;
      if constexpr (T::kHasWalks) {
        const auto sum = loop.turns.row_of_sum(walked - count - 1);
        last_row = sum.row, sign = sum.sign;
      }
      float *const to = sums + last_row * T::kHeadDim + warp * 128 + thread * 4;
      // Never; but over a branch ptxas moves no product, and spills less.
      if (T::kInTurns && a.dq_sum == nullptr) return;
      FLASHSPARK_UNROLL
      for (int32_t m = 0; m < T::kSumAtoms; ++m) {
        FLASHSPARK_UNROLL
        for (int32_t n = 0; n < 2; ++n) {
          float *const at = to + (m * (T::kHeadDim / 8) + n) * 128;
          if constexpr (T::kHasWalks) {
            ptx::store_or_add_to_memory_4(sign, at, dq.at[m][n]);
          } else {
            ptx::add_to_memory_4(at, dq.at[m][n]);
          }
        }
      }
    };
    const auto tile = tiles.next(loop, stage, count);
    const auto &lane = tiles.lane(loop);
    add_whole_block<T>(tile, loop.dk, loop.keys, rows, keys, loop.dscores(1 - stage), lane, copy, add_dq,
                       [&] { loop.arrive_ready(); });
    if constexpr (T::kInTurns) {
      // None adds to this block before all are done with it.
      constexpr int32_t kTurn = decltype(loop.turns)::kBlocks;
      const int32_t block = end - count;
      if (block % kTurn == 0) loop.turns.wait(loop.mask, {at.begin, at.end, at.head, block});
    }
    if constexpr (T::kHasWalks) loop.turns.wait(walked - count);
    ptx::mbarrier_arrive(loop.done());
    last_row = next.row - T::kRows;
    next = next + step;
  }
}

}  // namespace flashspark
