// Joins the pieces of a split problem: out = sum of 2^(lse_n - lse) out_n, and the sink enters here. One warp a row.
#pragma once

#include "forward/results.cuh"

namespace flashspark {

constexpr int32_t kMergeWarps = 4;

template <class Number>
FLASHSPARK_DEVICE void merge(const ForwardArguments &a) {
  const Place place = find_place(a);
  ptx::grid_dependency_wait();  // as in forward()
  ptx::grid_dependency_launch();
  const Work work = find_work<kMergeWarps>(a, place);
  if (!work.found) return;
  const int32_t lane = static_cast<int32_t>(ptx::thread_index() % 32);
  const ResultRow r = result_row(a, work, work.first_row + static_cast<int32_t>(ptx::thread_index() / 32));
  if (!r.in_use) return;
  const int64_t row = partial_row(a, r);

  float maximum = minus_infinity();
  for (int32_t n = lane; n < a.num_splits; n += 32)
    maximum = larger(maximum, a.partial_lse[n * a.partial_rows + row] * kLog2E);
  ptx::warp_barrier();
  FLASHSPARK_UNROLL
  for (uint32_t mask = 16; mask > 0; mask /= 2) maximum = larger(maximum, ptx::shuffle_xor(maximum, mask));
  const Joined joined = join_sink(maximum, sink_of(a, r.head));
  const float base = joined.maximum == minus_infinity() ? 0.0f : joined.maximum;

  float sum = joined.sink;
  for (int32_t n = 0; n < a.num_splits; ++n)
    sum += ptx::exp2_approx(a.partial_lse[n * a.partial_rows + row] * kLog2E - base);
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
  if (lane == 0) store_lse(a, work, r, lse_of(joined.maximum, sum));

  auto *out = static_cast<Number *>(a.out) + out_offset(a, work, r);
  for (int32_t column = lane * 8; column < a.head_dim_v; column += 256) {
    float total[8] = {};
    for (int32_t n = 0; n < a.num_splits; ++n) {
      const int64_t at = n * a.partial_rows + row;
      const float weight = ptx::exp2_approx(a.partial_lse[at] * kLog2E - base) * inverse;
      if (weight == 0) continue;  // a piece without keys wrote nothing
      FLASHSPARK_UNROLL
      for (int32_t x = 0; x < 8; ++x) total[x] += weight * a.partial_out[at * a.head_dim_v + column + x];
    }
    ptx::Vector16 packed;
    FLASHSPARK_UNROLL
    for (int32_t x = 0; x < 4; ++x) packed.word[x] = ptx::pack<Number>(total[2 * x], total[2 * x + 1]);
    store_8(out + column, packed);
  }
}

}  // namespace flashspark
