// The two products of a tile on the tensor cores: S = Q K^T and O += P V.
#pragma once

#include "forward/softmax.cuh"

namespace flashspark {

// Where a lane's ldmatrix addresses begin, for each operand. Bytes within a tile.
struct LaneOffsets {
  uint32_t query, key, value;
};

// Q as A (a[0..3]: rows 0-7 | 8-15 of columns 0-7, then of columns 8-15), K as B by columns = rows of K (n8 tile 0:
// columns 0-7 | 8-15, then n8 tile 1), V as B transposed (keys 0-7 | 8-15 of columns 0-7, then of columns 8-15).
template <class T>
FLASHSPARK_DEVICE LaneOffsets lane_offsets(const ForwardArguments &a) {
  const uint32_t lane = ptx::thread_index() % 32;
  // What has passed through a shuffle the compiler keeps; otherwise it finds these anew for every tile, from the number
  // of the thread, while the first ldmatrix waits.
  const auto keep = [lane](uint32_t x) { return static_cast<uint32_t>(ptx::shuffle(static_cast<int32_t>(x), lane)); };
  return {keep(T::QueryLayout::offset(static_cast<uint32_t>(first_warp_row<T>(a)) + lane % 16, lane / 16)),
          keep(T::kDequantizeKV ? T::KeyLayout::offset(lane % 16, 0)
                                : T::KeyLayout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)),
          keep(T::ValueLayout::offset(lane % 16, T::kDequantizeKV ? 0 : lane / 16))};
}

template <class T>
FLASHSPARK_DEVICE void load_queries(Queries<T> &q, ptx::SharedAddress queries, const LaneOffsets &lane) {
  FLASHSPARK_UNROLL
  for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
    FLASHSPARK_UNROLL
    for (int32_t d = 0; d < T::kDimSteps; ++d)
      ptx::ldmatrix_x4(q.at[m_atom][d],
                       queries + T::QueryLayout::step(lane.query, 2 * d) + m_atom * 16 * T::QueryLayout::kPitch);
  }
}

// With K in e4m3 a chunk holds 16 columns, and a lane receives four neighbours of them: two for each half of a k16 step
// whose columns are in the order that copy_queries gives those of Q.
template <class T>
FLASHSPARK_DEVICE void multiply_keys(Scores<T> &s, const Queries<T> &q, ptx::SharedAddress queries,
                                     ptx::SharedAddress keys, const LaneOffsets &lane) {
  // A score is a chain of products that wait for each other. With 16 keys a warp has but two such chains, and makes
  // four of them: columns of the head in turn.
  constexpr int32_t kChains = T::kWarpPrivateKV && T::kKeySteps == 1 ? 2 : 1;
  Scores<T> part[kChains];
  FLASHSPARK_UNROLL
  for (int32_t chain = 0; chain < kChains; ++chain) part[chain] = Scores<T>{};
  FLASHSPARK_UNROLL
  for (int32_t d = 0; d < T::kDimSteps; ++d) {
    uint32_t a[T::kMAtoms][4];
    FLASHSPARK_UNROLL
    for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
      if constexpr (T::kQueriesInRegisters) {
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x) a[m_atom][x] = q.at[m_atom][d][x];
      } else {
        ptx::ldmatrix_x4(a[m_atom],
                         queries + T::QueryLayout::step(lane.query, 2 * d) + m_atom * 16 * T::QueryLayout::kPitch);
      }
    }
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kKeySteps; ++n) {
      uint32_t b[4];
      if constexpr (T::kDequantizeKV) {
        uint32_t four[2];
        ptx::ldmatrix_x2(four, keys + T::KeyLayout::step(lane.key, d) + n * 16 * T::KeyLayout::kPitch);
        ptx::convert_e4m3x4_to_f16x4(b[0], b[1], four[0]);
        ptx::convert_e4m3x4_to_f16x4(b[2], b[3], four[1]);
      } else {
        ptx::ldmatrix_x4(b, keys + T::KeyLayout::step(lane.key, 2 * d) + n * 16 * T::KeyLayout::kPitch);
      }
      FLASHSPARK_UNROLL
      for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
        ptx::mma_m16n8k16<typename T::Element>(part[d % kChains].at[m_atom][2 * n], a[m_atom], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(part[d % kChains].at[m_atom][2 * n + 1], a[m_atom], b[2], b[3]);
      }
    }
  }
  s = part[0];
  if constexpr (kChains > 1) {
    FLASHSPARK_UNROLL
    for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
      FLASHSPARK_UNROLL
      for (int32_t n = 0; n < T::kScoreKeys / 8; ++n) {
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x) s.at[m_atom][n][x] += part[1].at[m_atom][n][x];
      }
    }
  }
}

// O += exp2(S) V. The exponentials of 16 keys are issued between the products of the 16 keys before: they take the
// units that the tensor cores leave idle. With V in e4m3 a lane receives two neighbouring columns of each of two keys:
// the even ones of 16 columns make one n8 tile, the odd ones the next (see output_column).
template <class T>
FLASHSPARK_DEVICE void multiply_values(Output<T> &o, const Scores<T> &s, RowState<T> &state, float scale,
                                       ptx::SharedAddress values, const LaneOffsets &lane) {
  using P = Probabilities<T>;
  P p[2];
  FLASHSPARK_UNROLL
  for (int32_t fragment = 0; fragment < P::kFragments; ++fragment) p[0].compute(fragment, s, 0, state, scale);
  FLASHSPARK_UNROLL
  for (int32_t step = 0; step < T::kKeySteps; ++step) {
    FLASHSPARK_UNROLL
    for (int32_t n = 0; n < T::kValueSteps; ++n) {
      uint32_t b[4];
      if constexpr (T::kDequantizeKV) {
        uint32_t four[2];
        ptx::ldmatrix_x2_trans(four, values + T::ValueLayout::step(lane.value, n) + step * 16 * T::ValueLayout::kPitch);
        // Of two keys the numbers in an even column, then those in the odd one behind it.
        ptx::convert_e4m3x4_to_f16x4(b[0], b[2], ptx::permute_bytes(four[0], 0x3120));
        ptx::convert_e4m3x4_to_f16x4(b[1], b[3], ptx::permute_bytes(four[1], 0x3120));
      } else {
        ptx::ldmatrix_x4_trans(b,
                               values + T::ValueLayout::step(lane.value, 2 * n) + step * 16 * T::ValueLayout::kPitch);
      }
      FLASHSPARK_UNROLL
      for (int32_t m_atom = 0; m_atom < T::kMAtoms; ++m_atom) {
        ptx::mma_m16n8k16<typename T::Element>(o.at[m_atom][2 * n], p[step % 2].at[m_atom], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(o.at[m_atom][2 * n + 1], p[step % 2].at[m_atom], b[2], b[3]);
      }
      if (step + 1 == T::kKeySteps) continue;
      FLASHSPARK_UNROLL
      for (int32_t fragment = n * P::kFragments / T::kValueSteps; fragment < (n + 1) * P::kFragments / T::kValueSteps;
           ++fragment)
        p[(step + 1) % 2].compute(fragment, s, step + 1, state, scale);
    }
  }
}

}  // namespace flashspark
