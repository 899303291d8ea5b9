// Joins the pieces of split row tiles: out = sum of 2^(lse_n - lse) out_n, and the sink enters here. Block (x, y, z)
// looks at split tile x, takes rows y, y + merge_rows, ... of it and columns [128 z, 128 z + 128). Its warps share the
// pieces among them and are joined through shared memory.
#pragma once

#include "forward/results.cuh"

namespace flashspark {

// What some pieces of a row add up to: four columns of a lane, relative to `base` in units of log2.
struct Sums {
  float base, sum, at[4];
};

FLASHSPARK_DEVICE float finite_base(float maximum) {
  return maximum == minus_infinity() ? 0.0f : maximum;
}

// Pieces warp, warp + kMergeWarps, ... of a row; what a lane needs of four of them is read at once.
FLASHSPARK_DEVICE Sums sum_pieces(const ForwardArguments &a, const SplitTile &tile, int32_t tile_row, int32_t warp,
                                  int32_t column) {
  constexpr int32_t kAtOnce = 4;
  Sums sums{minus_infinity(), 0, {}};
  for (int32_t first = warp; first < tile.count; first += kAtOnce * kMergeWarps) {
    float lse[kAtOnce];
    ptx::Vector16 out[kAtOnce];
    float high = sums.base;
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const int32_t n = first + i * kMergeWarps;
      const int64_t row = (n == 0 ? tile.first : tile.rest + n) * static_cast<int64_t>(a.tile_rows) + tile_row;
      lse[i] = n < tile.count ? a.partial_lse[row] * kLog2E : minus_infinity();
      out[i] = {};
      if (n < tile.count && column < a.head_dim_v)
        out[i] = *reinterpret_cast<const ptx::Vector16 *>(a.partial_out + row * a.head_dim_v + column);
      high = larger(high, lse[i]);
    }
    const float factor = ptx::exp2_approx(sums.base - finite_base(high));
    sums.base = high;
    sums.sum *= factor;
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 4; ++x) sums.at[x] *= factor;
    FLASHSPARK_UNROLL
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const float weight = ptx::exp2_approx(lse[i] - finite_base(high));
      sums.sum += weight;
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 4; ++x) sums.at[x] += weight * ptx::as_float(out[i].word[x]);
    }
  }
  return sums;
}

template <class Number>
FLASHSPARK_DEVICE void merge(const ForwardArguments &a) {
  ptx::grid_dependency_wait();  // as in forward()
  ptx::grid_dependency_launch();
  const SplitTile tile = a.split_tiles[ptx::block_x()];
  if (tile.count < 2) return;
  const Work work{true, tile.seq, tile.head_kv, 0, tile.q_row, tile.first_row, tile.end_row};
  const auto warp = static_cast<int32_t>(ptx::thread_index() / 32), lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const int32_t column = static_cast<int32_t>(ptx::block_z()) * kMergeColumns + lane * 4;
  const int32_t end = min_of(tile.first_row + a.tile_rows, tile.end_row);
  const auto memory = [lane](int32_t of_warp) {
    return ptx::shared_memory() + of_warp * kMergeWarpBytes + static_cast<uint32_t>(lane) * 16;
  };
  for (int32_t row = tile.first_row + static_cast<int32_t>(ptx::block_y()); row < end; row += a.merge_rows) {
    Sums sums = sum_pieces(a, tile, row - tile.first_row, warp, column);
    if (warp > 0) {
      store_4(memory(warp), sums.at[0], sums.at[1], sums.at[2], sums.at[3]);
      if (lane == 0) store_4(memory(warp) + 512, sums.base, sums.sum, 0, 0);
    }
    ptx::block_barrier();  // the other warps' sums are there
    if (warp == 0) {
      const ResultRow r = result_row(a, work, row);
      float bases[kMergeWarps], high = sums.base;
      ptx::Vector16 ends[kMergeWarps];
      FLASHSPARK_UNROLL
      for (int32_t w = 1; w < kMergeWarps; ++w) {
        ends[w] = ptx::load_shared_16(memory(w) - static_cast<uint32_t>(lane) * 16 + 512);
        bases[w] = ptx::as_float(ends[w].word[0]);
        high = larger(high, bases[w]);
      }
      const float sink = sink_of(a, r.head);
      high = larger(high, sink);
      const float factor = ptx::exp2_approx(sums.base - finite_base(high));
      float sum = sums.sum * factor + ptx::exp2_approx(sink - finite_base(high));
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 4; ++x) sums.at[x] *= factor;
      FLASHSPARK_UNROLL
      for (int32_t w = 1; w < kMergeWarps; ++w) {
        const float weight = ptx::exp2_approx(bases[w] - finite_base(high));
        sum += weight * ptx::as_float(ends[w].word[1]);
        const ptx::Vector16 v = ptx::load_shared_16(memory(w));
        FLASHSPARK_UNROLL
        for (int32_t x = 0; x < 4; ++x) sums.at[x] += weight * ptx::as_float(v.word[x]);
      }
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      if (column == 0) store_lse(a, work, r, lse_of(high, sum));
      if (column < a.head_dim_v)
        store_pairs(static_cast<Number *>(a.out) + out_offset(a, work, r) + column,
                    ptx::pack<Number>(sums.at[0] * inverse, sums.at[1] * inverse),
                    ptx::pack<Number>(sums.at[2] * inverse, sums.at[3] * inverse));
    }
    ptx::block_barrier();  // warp 0 has read them
  }
}

}  // namespace flashspark
