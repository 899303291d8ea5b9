// The products of warps that share out the columns of dK and dV (KeySharing::columns), and where their operands lie.
//
// A step is 16 rows. Of it a warp computes S^T or dP^T of 16 keys, by operands that stay in its registers; but it sums
// dV or dK of all keys of the CTA, for some of the columns, so that what it reads of dO or Q serves four m16 tiles
// instead of one. P^T and dS^T therefore pass through shared memory.
#pragma once

#include "backward/scores.cuh"

namespace flashspark {

// P^T or dS^T of a step: 32 bytes a key, whose two chunks change places every four keys, so that eight neighbouring
// keys lie in different banks.
struct StepLayout {
  static constexpr int32_t kPitch = 32;

  static FLASHSPARK_DEVICE uint32_t offset(uint32_t key, uint32_t chunk) {
    return key * kPitch + ((chunk ^ (key >> 2 & 1)) << 4);
  }
  static FLASHSPARK_DEVICE uint32_t step(uint32_t offset, uint32_t chunk) { return offset ^ chunk << 4; }
};

// What a warp sums of dK or dV.
template <class T>
struct ColumnGradient {
  float at[T::kKeys / 16][T::kGradientColumns / 8][4];
};

// Where a lane reads the n-th 16 of a warp's columns of a tile. Mostly one offset leads to all. unknown() keeps the
// compiler from computing them ahead, for which there are no registers.
template <class T, int32_t columns>
class ColumnOffsets {
 public:
  // lane: of the tile's first columns. part: of the warp, of the tile's columns.
  FLASHSPARK_DEVICE ColumnOffsets(uint32_t lane, int32_t part) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kOffsets; ++n)
      at_[n] = keep_in_register(T::KeyLayout::step(lane, static_cast<uint32_t>(part * (columns / 8) + 2 * n)));
  }
  FLASHSPARK_DEVICE uint32_t operator[](int32_t n) const {
    if constexpr (kOffsets > 1) return at_[n];
    return T::KeyLayout::step(at_[0], static_cast<uint32_t>(2 * n));
  }
  FLASHSPARK_DEVICE ColumnOffsets here() const {
    ColumnOffsets x = *this;
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < kOffsets; ++n) x.at_[n] = ptx::unknown(at_[n]);
    return x;
  }
  // The second half of 64 columns if n is 1.
  FLASHSPARK_DEVICE ColumnOffsets half_here(int32_t n) const {
    static_assert(columns == 64);
    ColumnOffsets x = here();
    x.at_[0] ^= static_cast<uint32_t>(n) * 64;
    return x;
  }

 private:
  static constexpr int32_t kOffsets = columns % 64 == 0 ? 1 : columns / 16;
  uint32_t at_[kOffsets];
};

// Where a lane's accesses begin, in bytes, in tiles as their operand.
template <class T>
struct ColumnLane {
  uint32_t row_columns;                           // of Q and dO: the second of scores
  uint32_t score_store;                           // of P^T and dS^T: where the lane stores them
  uint32_t gradient_keys;                         // of P^T and dS^T: the first of dV and dK
  uint32_t sum_rows;                              // of dS^T: the first of dQ
  ColumnOffsets<T, T::kGradientColumns> columns;  // of dO and Q: the second of dV and dK; of K: of dQ
};

// warp: uniform, as all functions have it here.
template <class T>
FLASHSPARK_DEVICE ColumnLane<T> column_lane(int32_t warp) {
  using Keys = typename T::KeyLayout;
  const auto lane = static_cast<uint32_t>(ptx::lane());
  const uint32_t key = static_cast<uint32_t>(warp / 2 * T::kWarpKeys) + lane / 4;
  return {keep_in_register(T::Mma::template key_lane_offset<Keys>(lane)),
          keep_in_register(StepLayout::offset(key, 0) + lane % 4 * 4),
          keep_in_register(StepLayout::offset(lane % 16, lane / 16)),
          keep_in_register(StepLayout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)),
          {T::Mma::template value_lane_offset<Keys>(lane), warp / 2}};
}

// scores += K Q^T, or V dO^T. Even and odd k16 steps are summed apart: a step's scores are but two chains of dependent
// products.
template <class T>
FLASHSPARK_DEVICE void score_product(ScoreTile<T> &scores, const KeyOperand<T, T::kHeadDim, true> &operand,
                                     ptx::SharedAddress rows, uint32_t columns) {
  ScoreTile<T> odd{};
  FLASHSPARK_UNROLL
  for (int32_t d = 0; d < T::kHeadDim / 16; ++d) {
    uint32_t b[4];
    T::Mma::template load_k<typename T::KeyLayout>(b, rows, columns, d);
    ScoreTile<T> &sum = d % 2 == 0 ? scores : odd;
    ptx::mma_m16n8k16<typename T::Element>(sum.at[0][0], operand.at[0][d], b[0], b[1]);
    ptx::mma_m16n8k16<typename T::Element>(sum.at[0][1], operand.at[0][d], b[2], b[3]);
  }
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < 2; ++n) {
    FLASHSPARK_UNROLL
    for (int32_t e = 0; e < 4; ++e) scores.at[0][n][e] += odd.at[0][n][e];
  }
}

// dV += P^T dO, or dK += dS^T Q. before(n) and after(n) are called around the products of the warp's n-th 16 columns.
template <class T, class Before, class After>
FLASHSPARK_DEVICE void gradient_product(ColumnGradient<T> &gradient, ptx::SharedAddress scores, ptx::SharedAddress rows,
                                        const ColumnLane<T> &lane, Before &&before, After &&after) {
  const auto columns = lane.columns.here();
  uint32_t a[T::kKeys / 16][4];
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kKeys / 16; ++m)
    ptx::ldmatrix_x4(a[m], scores + lane.gradient_keys + m * 16 * StepLayout::kPitch);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < T::kGradientColumns / 16; ++n) {
    before(n);
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, rows + columns[n]);
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kKeys / 16; ++m) {
      ptx::mma_m16n8k16<typename T::Element>(gradient.at[m][2 * n], a[m], b[0], b[1]);
      ptx::mma_m16n8k16<typename T::Element>(gradient.at[m][2 * n + 1], a[m], b[2], b[3]);
    }
    after(n);
  }
}

// What a warp has of dQ of a step. Two warps have the columns of their sums: each half of them; or each has all of them
// every second step.
template <class T>
struct ColumnSums {
  static constexpr bool kHalf = T::kGradientColumns == 64;
  static constexpr int32_t kColumns = T::kGradientColumns / (kHalf ? 2 : 1);

  float at[kColumns / 8][4];
};

// dQ = dS K over the CTA's keys.
template <class T>
FLASHSPARK_DEVICE void query_product(ColumnSums<T> &dq, ptx::SharedAddress scores, ptx::SharedAddress keys,
                                     const ColumnLane<T> &lane, int32_t half) {
  const auto columns = [&] {
    if constexpr (ColumnSums<T>::kHalf) return lane.columns.half_here(half);
    return lane.columns.here();
  }();
  FLASHSPARK_UNROLL
  for (int32_t step = 0; step < T::kKeys / 16; ++step) {
    uint32_t a[4];
    ptx::ldmatrix_x4_trans(a, scores + lane.sum_rows + step * 16 * StepLayout::kPitch);
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < ColumnSums<T>::kColumns / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, keys + step * 16 * T::KeyLayout::kPitch + columns[n]);
      ptx::mma_m16n8k16<typename T::Element>(dq.at[2 * n], a, b[0], b[1]);
      ptx::mma_m16n8k16<typename T::Element>(dq.at[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Adds it to what other CTAs add. `sums` is at the step's rows.
template <class T>
FLASHSPARK_DEVICE void add_query_gradient(float *sums, const ColumnSums<T> &dq, int32_t warp) {
  const int32_t column = ColumnSums<T>::kHalf ? warp * ColumnSums<T>::kColumns : warp / 2 * T::kGradientColumns;
  sums += static_cast<uint32_t>(column / 8 * 128 + ptx::lane() * 4);
  FLASHSPARK_UNROLL
  for (int32_t n = 0; n < ColumnSums<T>::kColumns / 8; ++n) ptx::add_to_memory_4(sums + n * 128, dq.at[n]);
}

// Stores P^T or dS^T of the warp's keys.
template <class T>
FLASHSPARK_DEVICE void store_scores(ScoreOperand<T> &scores, ptx::SharedAddress to, const ColumnLane<T> &lane) {
  to += ptx::unknown(lane.score_store);
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < 2; ++j) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x)
      ptx::store_shared_4(StepLayout::step(to, j) + x * 8 * StepLayout::kPitch, scores.pair(0, j, x));
  }
}

// Each pair of numbers times that of P^T, which another warp has stored.
template <class T>
FLASHSPARK_DEVICE void multiply_by_stored(ScoreTile<T> &scores, ptx::SharedAddress from, const ColumnLane<T> &lane) {
  using Element = typename T::Element;
  from += ptx::unknown(lane.score_store);
  FLASHSPARK_UNROLL
  for (int32_t j = 0; j < 2; ++j) {
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 2; ++x) {
      const uint32_t word = ptx::load_shared_4(StepLayout::step(from, j) + x * 8 * StepLayout::kPitch);
      scores.at[0][j][2 * x] *= ptx::to_float(Element{static_cast<uint16_t>(word)});
      scores.at[0][j][2 * x + 1] *= ptx::to_float(Element{static_cast<uint16_t>(word >> 16)});
    }
  }
}

}  // namespace flashspark
