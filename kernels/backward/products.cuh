// The products of the backward pass on the tensor cores. Scores are transposed, a key a row: what a warp computes for
// its keys are then, register by register, the first operands of dV += P^T dO and dK += dS^T Q.
#pragma once

#include "backward/traits.cuh"
#include "ptx/backward.cuh"

namespace flashspark {

// What a lane holds of a warp's keys x kScoreRows rows, as mma_m16n8k16 lays out its result: [m_atom][n8 tile of
// rows][register]. Register e is of key lane / 4 + 8 * (e / 2) of the m_atom and row lane % 4 * 2 + e % 2 of the tile.
template <class T>
struct ScoreTile {
  float at[T::kMAtoms][T::kScoreRows / 8][4];
};
// The same in 16 bits, as the first operand of k16 steps over rows.
template <class T>
struct ScoreOperand {
  uint32_t at[T::kMAtoms][T::kRowSteps][4];

  // The pair x (0: key lane / 4, 1: key + 8) of n8 tile j.
  FLASHSPARK_DEVICE uint32_t &pair(int32_t m, int32_t j, int32_t x) { return at[m][j / 2][j % 2 * 2 + x]; }
};
// Keys or values of a warp, as the first operand of k16 steps over columns, where they stay in registers.
template <class T, int32_t columns, bool in_registers>
struct KeyOperand {
  uint32_t at[T::kMAtoms][in_registers ? columns / 16 : 1][4];
};
// dK or dV of a warp's keys.
template <class T, int32_t columns>
struct KeyGradient {
  float at[T::kMAtoms][columns / 8][4];
};

// Where a lane's ldmatrix addresses begin in a tile, in bytes, by its layout.
struct TileOffsets {
  uint32_t columns;  // as the second operand of a product over columns
  uint32_t rows;     // of a product over rows
};
template <class T>
struct BackwardOffsets {
  TileOffsets of_head, of_head_v;             // the same where both heads are equally wide
  uint32_t score_store;                       // where the lane stores dS^T
  uint32_t sum_rows;                          // of dS^T as the first operand of dQ
  uint32_t sum_columns[T::kSumColumns / 16];  // of K as its second
  uint32_t thread;
  int32_t warp_key;  // first key of the warp in the tile, uniform

  template <class Layout>
  FLASHSPARK_DEVICE const TileOffsets &of() const {
    if constexpr (std::is_same_v<Layout, typename T::KeyLayout>) return of_head;
    return of_head_v;
  }
};

// The compiler keeps what has passed through a shuffle; otherwise it computes these anew for every tile.
FLASHSPARK_DEVICE uint32_t keep_in_register(uint32_t x) {
  return static_cast<uint32_t>(ptx::shuffle(static_cast<int32_t>(x), static_cast<uint32_t>(ptx::lane())));
}

template <class T, class Layout>
FLASHSPARK_DEVICE TileOffsets tile_offsets() {
  const auto lane = static_cast<uint32_t>(ptx::lane());
  return {keep_in_register(T::Mma::template key_lane_offset<Layout>(lane)),
          keep_in_register(T::Mma::template value_lane_offset<Layout>(lane))};
}

template <class T>
FLASHSPARK_DEVICE BackwardOffsets<T> backward_offsets() {
  using Scores = typename T::ScoreLayout;
  const auto lane = static_cast<uint32_t>(ptx::lane()), warp = static_cast<uint32_t>(ptx::warp());
  BackwardOffsets<T> o{};
  o.of_head = tile_offsets<T, typename T::KeyLayout>();
  if constexpr (!std::is_same_v<typename T::KeyLayout, typename T::ValueLayout>)
    o.of_head_v = tile_offsets<T, typename T::ValueLayout>();
  const uint32_t warp_key = static_cast<uint32_t>(T::key_warp()) * T::kWarpKeys;
  o.score_store = keep_in_register(Scores::offset(warp_key + lane / 4, 0) + lane % 4 * 4);
  const uint32_t chunk = warp / T::kSumColumnWarps * (2 * T::kSumAtoms) + lane / 8 % 2;
  o.sum_rows = keep_in_register(Scores::step(Scores::offset(lane % 8 + lane / 16 * 8, chunk % Scores::kGroup),
                                             chunk / Scores::kGroup * Scores::kGroup));
  FLASHSPARK_UNROLL
  for (uint32_t n = 0; n < T::kSumColumns / 16; ++n) {
    const uint32_t columns = warp % T::kSumColumnWarps * (T::kSumColumns / 8) + 2 * n;
    o.sum_columns[n] = T::kSparesRegisters
                           ? T::KeyLayout::step(o.of_head.rows, columns)
                           : keep_in_register(T::KeyLayout::step(
                                 T::Mma::template value_lane_offset<typename T::KeyLayout>(lane), columns));
  }
  // Heads of 256 columns leave no register for it.
  o.thread = T::kHeadDim > 192 && !T::kNative ? ptx::thread_index() : keep_in_register(ptx::thread_index());
  o.warp_key = ptx::uniform(static_cast<int32_t>(warp_key));
  return o;
}

template <class T, class Layout, int32_t columns, bool in_registers>
FLASHSPARK_DEVICE void load_key_operand(KeyOperand<T, columns, in_registers> &operand, ptx::SharedAddress keys,
                                        const BackwardOffsets<T> &lane) {
  if constexpr (in_registers) {
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t d = 0; d < columns / 16; ++d)
        ptx::ldmatrix_x4(operand.at[m][d], keys + m * 16 * Layout::kPitch + lane.warp_key * Layout::kPitch +
                                               Layout::step(lane.template of<Layout>().rows, 2 * d));
    }
  }
}

// scores += K Q^T, or V dO^T: of the warp's keys and kScoreRows rows that begin at `rows`.
template <class T, class Layout, int32_t columns, bool in_registers>
FLASHSPARK_DEVICE void score_product(ScoreTile<T> &scores, const KeyOperand<T, columns, in_registers> &operand,
                                     ptx::SharedAddress keys, ptx::SharedAddress rows, const BackwardOffsets<T> &lane) {
  FLASHSPARK_UNROLL
  for (int32_t d = 0; d < columns / 16; ++d) {
    uint32_t a[T::kMAtoms][4];
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      if constexpr (in_registers) {
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x) a[m][x] = operand.at[m][d][x];
      } else {
        ptx::ldmatrix_x4(a[m], keys + m * 16 * Layout::kPitch + lane.warp_key * Layout::kPitch +
                                   Layout::step(lane.template of<Layout>().rows, 2 * d));
      }
    }
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kRowSteps; ++n) {
      uint32_t b[4];
      T::Mma::template load_k<Layout>(b, rows + n * 16 * Layout::kPitch, lane.template of<Layout>().columns, d);
      FLASHSPARK_UNROLL
      for (int32_t m = 0; m < T::kMAtoms; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(scores.at[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(scores.at[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// dV += P^T dO, or dK += dS^T Q.
template <class T, class Layout, int32_t columns>
FLASHSPARK_DEVICE void gradient_product(KeyGradient<T, columns> &gradient, const ScoreOperand<T> &scores,
                                        ptx::SharedAddress rows, const BackwardOffsets<T> &lane) {
  FLASHSPARK_UNROLL
  for (int32_t step = 0; step < T::kRowSteps; ++step) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < columns / 16; ++n) {
      uint32_t b[4];
      T::Mma::template load_v<Layout>(b, rows + step * 16 * Layout::kPitch, lane.template of<Layout>().rows, n);
      FLASHSPARK_UNROLL
      for (int32_t m = 0; m < T::kMAtoms; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(gradient.at[m][2 * n], scores.at[m][step], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(gradient.at[m][2 * n + 1], scores.at[m][step], b[2], b[3]);
      }
    }
  }
}

// What a warp has of dQ of a block.
template <class T>
struct QueryGradient {
  float at[T::kSumAtoms][T::kSumColumns / 8][4];
};

// dQ = dS K over the CTA's keys.
template <class T>
FLASHSPARK_DEVICE void query_product(QueryGradient<T> &dq, ptx::SharedAddress scores, ptx::SharedAddress keys,
                                     const BackwardOffsets<T> &lane) {
  using Scores = typename T::ScoreLayout;
  using Keys = typename T::KeyLayout;
  FLASHSPARK_UNROLL
  for (int32_t step = 0; step < T::kKeys / 16; ++step) {
    uint32_t a[T::kSumAtoms][4];
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kSumAtoms; ++m)
      ptx::ldmatrix_x4_trans(a[m], scores + step * 16 * Scores::kPitch + Scores::step(lane.sum_rows, 2 * m));
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kSumColumns / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, keys + step * 16 * Keys::kPitch + lane.sum_columns[n]);
      FLASHSPARK_UNROLL
      for (int32_t m = 0; m < T::kSumAtoms; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(dq.at[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(dq.at[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// `sums` is at the block's rows. sign: of walks, less than 0 where none has added before.
template <class T>
FLASHSPARK_DEVICE void add_query_gradient(float *sums, const QueryGradient<T> &dq, const BackwardOffsets<T> &lane,
                                          [[maybe_unused]] int32_t sign = 0) {
  const int32_t warp = ptx::warp();
  const int32_t atom = warp / T::kSumColumnWarps * T::kSumAtoms,
                column = warp % T::kSumColumnWarps * (T::kSumColumns / 8);
  sums += (atom * (T::kHeadDim / 8) + column) * 128 + lane.thread % 32 * 4;
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kSumAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kSumColumns / 8; ++n) {
      float *const to = sums + (m * (T::kHeadDim / 8) + n) * 128;
      if constexpr (T::kHasWalks) {
        ptx::store_or_add_to_memory_4(sign, to, dq.at[m][n]);
      } else {
        ptx::add_to_memory_4(to, dq.at[m][n]);
      }
    }
  }
}

}  // namespace flashspark
