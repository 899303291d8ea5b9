// The two products of a tile on the tensor cores: S = Q K^T and O += P V. Formats are T::Mma's business.
#pragma once

#include "attention/softmax.cuh"
#include "attention/tile_layout.cuh"

namespace flashspark {

// Q as the A operands of all k16 steps, where it stays in registers.
template <class T>
struct Queries {
  uint32_t at[T::kMAtoms][T::kQueriesInRegisters ? T::kDimSteps : 1][4];
};

// Where a lane's ldmatrix addresses begin in a tile of each operand, in bytes.
struct LaneOffsets {
  uint32_t query, key, value;
};

// Q as A: rows 0-7 | 8-15 of columns 0-7, then of columns 8-15.
template <class T>
FLASHSPARK_DEVICE LaneOffsets lane_offsets(const typename T::Arguments &a) {
  const uint32_t lane = ptx::thread_index() % 32;
  // The compiler keeps what has passed through a shuffle; otherwise it computes these anew for every tile, from the
  // thread index, while the first ldmatrix waits.
  const auto keep = [lane](uint32_t x) { return static_cast<uint32_t>(ptx::shuffle(static_cast<int32_t>(x), lane)); };
  return {keep(T::QueryLayout::offset(static_cast<uint32_t>(T::first_warp_row(a)) + lane % 16, lane / 16)),
          keep(T::Mma::template key_lane_offset<typename T::KeyLayout>(lane)),
          keep(T::Mma::template value_lane_offset<typename T::ValueLayout>(lane))};
}

template <class T>
FLASHSPARK_DEVICE void load_queries(Queries<T> &q, ptx::SharedAddress queries, const LaneOffsets &lane) {
  FLASHSPARK_UNROLL
  for (int32_t m = 0; m < T::kMAtoms; ++m) {
    FLASHSPARK_UNROLL
    for (int32_t d = 0; d < T::kDimSteps; ++d)
      ptx::ldmatrix_x4(q.at[m][d], queries + T::QueryLayout::step(lane.query, 2 * d) + m * 16 * T::QueryLayout::kPitch);
  }
}

// S = Q K^T of kScoreKeys keys.
template <class T>
FLASHSPARK_DEVICE void qk_product(Scores<T> &s, const Queries<T> &q, ptx::SharedAddress queries,
                                  ptx::SharedAddress keys, const LaneOffsets &lane) {
  // A score is a chain of dependent products. With 16 keys a warp has only two such chains; summing even and odd k16
  // steps apart makes it four (docs/experiments.md E37).
  constexpr int32_t kChains = T::kWarpPrivateKV && T::kKeySteps == 1 ? 2 : 1;
  Scores<T> part[kChains];
  FLASHSPARK_UNROLL
  for (int32_t chain = 0; chain < kChains; ++chain) part[chain] = Scores<T>{};
  if constexpr (T::ScoreMod::kScoreBias) part[0] = s;
  FLASHSPARK_UNROLL
  for (int32_t d = 0; d < T::kDimSteps; ++d) {
    uint32_t a[T::kMAtoms][4];
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      if constexpr (T::kQueriesInRegisters) {
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x) a[m][x] = q.at[m][d][x];
      } else {
        ptx::ldmatrix_x4(a[m], queries + T::QueryLayout::step(lane.query, 2 * d) + m * 16 * T::QueryLayout::kPitch);
      }
    }
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kKeySteps; ++n) {
      uint32_t b[4];
      T::Mma::template load_k<typename T::KeyLayout>(b, keys + n * 16 * T::KeyLayout::kPitch, lane.key, d);
      FLASHSPARK_UNROLL
      for (int32_t m = 0; m < T::kMAtoms; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(part[d % kChains].at[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(part[d % kChains].at[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
  s = part[0];
  if constexpr (kChains > 1) {
    FLASHSPARK_UNROLL
    for (int32_t m = 0; m < T::kMAtoms; ++m) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < T::kScoreKeys / 8; ++n) {
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x) s.at[m][n][x] += part[1].at[m][n][x];
      }
    }
  }
}

// O += exp2(S) V. The exponentials of 16 keys are issued between the products of the 16 keys before: they use the units
// that the tensor cores leave idle.
template <class T, class Drops>
FLASHSPARK_DEVICE void pv_product(Output<T> &o, const Scores<T> &s, RowState<T> &state, float scale,
                                  const ScoreOffsets<T> &offsets, ptx::SharedAddress values, const LaneOffsets &lane,
                                  Drops dropout) {
  using P = Probabilities<T>;
  P p[2];
  FLASHSPARK_UNROLL
  for (int32_t fragment = 0; fragment < P::kFragments; ++fragment)
    p[0].compute(fragment, s, 0, state, scale, offsets, dropout);
  FLASHSPARK_UNROLL
  for (int32_t step = 0; step < T::kKeySteps; ++step) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kValueSteps; ++n) {
      uint32_t b[4];
      T::Mma::template load_v<typename T::ValueLayout>(b, values + step * 16 * T::ValueLayout::kPitch, lane.value, n);
      FLASHSPARK_UNROLL
      for (int32_t m = 0; m < T::kMAtoms; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(o.at[m][2 * n], p[step % 2].at[m], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(o.at[m][2 * n + 1], p[step % 2].at[m], b[2], b[3]);
      }
      if (step + 1 == T::kKeySteps) continue;
      FLASHSPARK_UNROLL
      for (int32_t fragment = n * P::kFragments / T::kValueSteps; fragment < (n + 1) * P::kFragments / T::kValueSteps;
           ++fragment)
        p[(step + 1) % 2].compute(fragment, s, step + 1, state, scale, offsets, dropout);
    }
  }
}

}  // namespace flashspark
