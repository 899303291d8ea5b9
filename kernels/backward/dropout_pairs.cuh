// Dropout in pairs of warps, as PairTile (pair_block.cuh) does the rest. What is kept lies, 16 bits a score, all ones
// or 0, where P^T and then dS^T of the block will lie: rows of 16 keys in a matrix of 8 rows and 8 keys each, at the
// place of the matrix of 8 keys and 8 rows that P^T has of the same scores. So the warp with P^T reads it transposed,
// and writes P^T there. It leaves P^T with the sign set where a score is dropped.
//
// P comes times the scale 1 / (1 - dropout_p), and delta divided by it (BackwardArguments::lse_shift, delta_scale):
//   dV = (P kept)^T dO        dS = P (kept ? dO V^T - delta : -delta)
// and where the warp with dP^T begins its sums with -delta, only what is dropped differs from a block without dropout.
//
// A call of Philox draws for sixteen scores, as many as a thread has of a block, and goes on beside the last products
// of the block before. By then dS^T of the block before that one, which has lain there, is multiplied: a third
// mbarrier, at which warps arrive behind this product, says so.
#pragma once

#include "attention/dropout.cuh"
#include "backward/pair_block.cuh"

namespace flashspark {

// What all of a thread's draws have in common: what its keys decide, and where its first word of a block lies. The
// threads of four neighbouring lanes draw for a row, two of each eight keys; those of four neighbouring warps for a
// block, and 64 keys.
template <class T>
FLASHSPARK_DEVICE void keep_draws(PhiloxKey key, int32_t seq, int32_t first_key) {
  const auto thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t quarter = thread % 4, row = thread / 4 % T::kRows, keys_before = thread / 128 * kDropoutKeys;
  const DropoutKeys keys = dropout_keys(key, seq, (first_key + keys_before) / 16 + quarter);
  const uint32_t to = T::ScoreLayout::offset(keys_before + row % 8, row / 8) + quarter * 4;
  ptx::Vector16 common;
  common.word[0] = keys.high, common.word[1] = keys.low, common.word[2] = keys.draw,
  common.word[3] = to | T::Mma::template key_lane_offset<typename T::KeyLayout>(thread % 32) << 16;
  ptx::store_shared_16(ptx::shared_memory() + T::kMemory.draws + thread * 16, common);
}

template <class T>
FLASHSPARK_DEVICE uint32_t kept_columns(uint32_t thread) {
  return ptx::load_shared_16(ptx::shared_memory() + T::kMemory.draws + ptx::unknown(thread) * 16).word[3] >> 16;
}

// A thread's draw for a block of rows: of one row and, of 64 keys, two in each eight.
template <class T>
struct BlockDraw {
  using Layout = typename T::ScoreLayout;
  static_assert(T::kThreads == T::kKeys / kDropoutKeys * T::kRows * 4 && T::kRows == 32);

  PhiloxKey key;
  uint32_t limit;
  bool flip;
  int32_t head, token;  // of the row
  uint32_t thread;
  ptx::SharedAddress common, to;
  PhiloxWords words;

  template <class Loop>
  FLASHSPARK_DEVICE void set(const Loop &loop, int32_t q_head, int32_t first_row, int32_t stage) {
    key = loop.dropout_key, limit = loop.a.dropout.limit, flip = loop.a.dropout.flip != 0;
    head = q_head, token = first_row, thread = T::kSparesRegisters ? ptx::thread_index() : loop.lane.thread;
    common = loop.shared + T::kMemory.draws;
    to = loop.dscores(stage);
  }
  FLASHSPARK_DEVICE void begin() {
    const uint32_t own = ptx::unknown(thread);  // else what follows from it is kept through the loop
    const ptx::Vector16 kept = ptx::load_shared_16(common + own * 16);
    token += static_cast<int32_t>(own / 4 % T::kRows);
    uint32_t row[kPhiloxRowWords + 1];
    dropout_row(key, head, token, row);
    words = begin_dropout_draws({kept.word[0], kept.word[1], kept.word[2]}, row);
    to += kept.word[3] & 0xffff;
  }
  FLASHSPARK_DEVICE void round(int32_t n) { words = philox_round(key, words, n); }
  // Of eight keys.
  FLASHSPARK_DEVICE void store(int32_t octet) const {
    const uint32_t word = words.at[octet / 2];
    const uint32_t kept =
        ptx::magnitude_not_less_f16x2(octet % 2 == 0 ? word : ptx::permute_bytes(word, 0x0321), limit, flip);
    ptx::store_shared_4(to + octet * 8 * Layout::kPitch, kept);
  }
  FLASHSPARK_DEVICE void all() {
    begin();
    FLASHSPARK_UNROLL
    for (int32_t n = kFirstDropoutRound; n < kPhiloxRounds; ++n) round(n);
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kDropoutKeys / 8; ++n) store(n);
  }
};

template <class T, bool values_summed>
struct DropoutTile : PairTile<T, values_summed> {
  using Base = PairTile<T, values_summed>;
  using Layout = typename T::ScoreLayout;
  static constexpr uint32_t kSigns = 0x80008000u;

  ptx::SharedAddress kept;   // of the warp's keys: the lane's first row of a matrix
  ptx::SharedAddress delta;  // of the lane's rows
  float dropped[2];          // of the next n8 tile of rows: what takes the place of dP - delta
  uint32_t masks[4];         // of the next 16 keys: [which eight of them][n8 tile of rows]
  BlockDraw<T> draw;
  ptx::SharedAddress summed;  // the third mbarrier
  uint32_t parity;

  FLASHSPARK_DEVICE void begin(ptx::SharedAddress row_lse) {
    delta = row_lse + T::kRows * 4;
    if constexpr (!values_summed) {
      for_row_pairs<T>(delta, [&](int32_t j, float first, float second) {
        FLASHSPARK_UNROLL
        for (int32_t m = 0; m < T::kMAtoms; ++m) {
          FLASHSPARK_UNROLL
          for (int32_t e = 0; e < 4; ++e) this->scores.at[m][j][e] = e % 2 == 0 ? first : second;
        }
      });
    }
  }
  FLASHSPARK_DEVICE void load_lse(ptx::SharedAddress row_lse) {
    Base::load_lse(row_lse);
    if constexpr (values_summed) load_masks(0);
  }
  FLASHSPARK_DEVICE void before(int32_t step) {
    if (values_summed || step != Base::kWait) return;
    ptx::pair_wait(this->pair, this->number);
    load_rows(0);
  }
  FLASHSPARK_DEVICE void load_rows(int32_t j) {
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) this->p[m][x] = ptx::load_shared_4(this->place(m * 2 + j, x));
    }
    uint32_t words[2];
    ptx::load_shared_8(words, delta + j * 8 * 4);
    dropped[0] = ptx::as_float(words[0]), dropped[1] = ptx::as_float(words[1]);
  }
  FLASHSPARK_DEVICE void load_masks(int32_t m) {
    ptx::ldmatrix_x4_trans(masks, kept + m * 16 * Layout::kPitch + this->number * T::kScoreRows * 2);
    ptx::warp_barrier();  // all lanes have read what others write P^T over
  }
  FLASHSPARK_DEVICE void after(int32_t step) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < Base::kParts; ++n) {
      if (step == (values_summed ? n : Base::kWait + n * (Base::kSteps - Base::kWait) / Base::kParts)) part(n);
    }
  }
  FLASHSPARK_DEVICE void part(int32_t n) {
    if constexpr (values_summed) {
      const int32_t m = n / 2, j = n % 2;
      float(&s)[4] = this->scores.at[m][j];
      FLASHSPARK_UNROLL
      for (int32_t e = 0; e < 4; ++e) s[e] = ptx::exp2_approx(s[e] * this->scale - this->lse[j][e % 2]);
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) {
        const uint32_t p = ptx::pack<typename T::Element>(s[2 * x], s[2 * x + 1]), mask = masks[2 * x + j];
        this->operand.pair(m, j, x) = p & mask;
        // fp16 has three bits more than bf16, and P times the scale of dropout is at most 100.
        const uint32_t handed_on = ptx::pack<ptx::Float16>(s[2 * x], s[2 * x + 1]);
        ptx::store_shared_4(this->place(n, x), handed_on | (~mask & kSigns));
      }
      if (n == 1) load_masks(1);
      if (n == Base::kParts - 1) ptx::pair_arrive(this->pair, this->number);
    } else {
      const int32_t m = n % 2, j = n / 2, at = m * 2 + j;
      float(&s)[4] = this->scores.at[m][j];
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) {
        const uint32_t p = this->p[m][x];
        float dp[2] = {s[2 * x], s[2 * x + 1]};
        ptx::select_by_signs(dp, p, dropped);
        s[2 * x] = dp[0] * ptx::magnitude(ptx::to_float(ptx::Float16{static_cast<uint16_t>(p)}));
        s[2 * x + 1] = dp[1] * ptx::magnitude(ptx::to_float(ptx::Float16{static_cast<uint16_t>(p >> 16)}));
      }
      pack_tile(this->operand, m, j, s);
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 2; ++x) ptx::store_shared_4(this->place(at, x), this->operand.pair(m, j, x));
      if (n == 1) load_rows(1);
    }
  }
  // Two rounds a product, then two words.
  FLASHSPARK_DEVICE void beside(int32_t n) {
    if (n == 0) {
      ptx::mbarrier_wait(summed, parity);
      draw.begin();
    }
    FLASHSPARK_UNROLL
    for (int32_t i = 2 * n; i < 2 * n + 2; ++i) {
      if (n < 4) {
        draw.round(kFirstDropoutRound + i);
      } else {
        draw.store(i - 8);
      }
    }
  }
};

// As PairTiles.
template <class T, bool values_summed>
struct DropoutTiles {
  // Where what is kept of the warp's keys lies, and the sum of both places: of a number that changes with each block
  // the compiler does not keep sums with what lanes add to it.
  uint32_t kept, both;
  int32_t head, end;  // `end`: the token behind the rows that are drawn last

  template <class Loop>
  FLASHSPARK_DEVICE DropoutTiles(const Loop &loop, const RowWalk &at, int32_t stage, int32_t count)
      : kept(first(loop, stage)),
        both(first(loop, 0) + first(loop, 1)),
        head(at.head),
        end((at.block + 1 + count) * T::kRows) {}
  template <class Loop>
  static FLASHSPARK_DEVICE uint32_t first(const Loop &loop, int32_t stage) {
    return loop.dscores(stage) + loop.lane.warp_key * T::ScoreLayout::kPitch;
  }
  // left: blocks, with this one.
  template <class Loop>
  FLASHSPARK_DEVICE DropoutTile<T, values_summed> next(const Loop &loop, int32_t stage, int32_t left) {
    DropoutTile<T, values_summed> tile{};
    tile.scale = loop.a.scale_log2;
    tile.kept = kept + loop.lane.sum_rows;
    kept = both - kept;
    tile.draw.set(loop, head, end - left * T::kRows, 1 - stage);
    tile.summed = loop.summed();
    // There is a sequence: else ptxas keeps the stage where it has no register for it.
    tile.parity = static_cast<uint32_t>(stage ^ static_cast<int32_t>(T::kSparesRegisters && loop.a.num_seqs == 0));
    return tile;
  }
  template <class Loop>
  FLASHSPARK_DEVICE BackwardOffsets<T> lane(const Loop &loop) const {
    BackwardOffsets<T> lane = loop.lane;
    lane.of_head.columns = kept_columns<T>(loop.lane.thread);
    if constexpr (T::kSparesRegisters) {  // else sums with these are kept
      lane.of_head.rows = ptx::unknown(lane.of_head.rows);
      lane.score_store = ptx::unknown(lane.score_store);
    }
    return lane;
  }
};

// BackwardLoop::add_rows_of_pair() with dropout.
template <bool values_summed, class Loop>
FLASHSPARK_DEVICE void add_dropout_rows(Loop &loop, const RowWalk &at, int32_t stage, int32_t first_row) {
  using T = typename Loop::T;
  const int32_t token = at.block * T::kRows + first_row, key = loop.warp_key();
  const ptx::SharedAddress q_rows = loop.queries(stage) + first_row * T::KeyLayout::kPitch;
  const ptx::SharedAddress dout_rows = loop.douts(stage) + first_row * T::KeyLayout::kPitch;
  const ptx::SharedAddress lse = loop.row_values(stage, first_row);
  BackwardOffsets<T> lane = loop.lane;
  if constexpr (T::kSparesRegisters) lane.of_head.columns = kept_columns<T>(lane.thread);
  DropoutTile<T, values_summed> tile{};
  tile.kept = loop.dscores(stage) + loop.lane.warp_key * T::ScoreLayout::kPitch + loop.lane.sum_rows;
  tile.pair = loop.lane.warp_key / T::kWarpKeys, tile.number = first_row / T::kScoreRows;
  tile.to = T::ScoreLayout::step(loop.dscores(stage) + loop.lane.score_store, static_cast<uint32_t>(first_row / 8));
  tile.scale = loop.a.scale_log2;
  const Interval visited = loop.mask.visited(key, T::kWarpKeys), unmasked = loop.mask.unmasked(key, T::kWarpKeys);
  if (token >= visited.end || token + T::kScoreRows <= visited.begin) {
    if (!values_summed) store_scores(tile.operand, loop.dscores(stage), loop.lane.score_store, first_row);
    return;
  }
  tile.begin(lse);
  score_product<T, typename T::KeyLayout>(tile.scores, loop.keys, loop.shared, values_summed ? q_rows : dout_rows,
                                          lane);
  if (values_summed && (token < unmasked.begin || token + T::kScoreRows > unmasked.end))
    mask_score_tile(tile.scores, loop.mask, key, token);
  tile.load_lse(lse);
  tile.before(tile.kWait);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < tile.kParts; ++n) tile.part(n);
  gradient_product<T, typename T::KeyLayout>(loop.dk, tile.operand, values_summed ? dout_rows : q_rows, loop.lane);
}

}  // namespace flashspark
