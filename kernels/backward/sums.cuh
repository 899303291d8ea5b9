// Behind the other kernels: dsinks and dalibi_slopes, each number from its parts, which are added in an order that does
// not depend on when they were written. A warp a number.
#pragma once

#include "backward/blocks.cuh"
#include "backward/preprocess.cuh"

namespace flashspark {

constexpr int32_t kSumsThreads = 128;

// All threads of the warp call it.
FLASHSPARK_DEVICE float sum_of(const float *parts, int64_t count) {
  float sum = 0;
  for (int64_t n = ptx::lane(); n < count; n += 32) sum += parts[n];
  ptx::warp_barrier();
  FLASHSPARK_UNROLL
  for (uint32_t lanes = 16; lanes > 0; lanes /= 2) sum += ptx::shuffle_xor(sum, lanes);
  return sum;
}

FLASHSPARK_DEVICE float slope_gradient(const BackwardArguments &a, int32_t head, int32_t seq) {
  int32_t first = 0, count = a.key_slots;
  if (a.alibi_batch_stride != 0) {
    count = a.num_key_tiles;
    int32_t row = 0;
    if (a.cu_seqlens_k != nullptr) {
      row = clamp(a.cu_seqlens_k[seq], 0, a.key_rows);
      count = ceil_div(clamp(a.cu_seqlens_k[seq + 1], row, a.key_rows) - row, a.key_tile);
    }
    first = first_key_slot(a, seq, row);
  }
  const int64_t at = static_cast<int64_t>(head) * a.key_slots + first;
  return sum_of(a.slope_sums + at * a.slot_warps, static_cast<int64_t>(count) * a.slot_warps);
}

FLASHSPARK_DEVICE void sums(const BackwardArguments &a) {
  ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
  ptx::grid_dependency_launch();
  const int32_t heads = a.num_heads_kv * static_cast<int32_t>(a.group.value);
  const int32_t number = static_cast<int32_t>(ptx::cta_x()) * (kSumsThreads / 32) + ptx::warp();
  const int32_t of_sinks = a.sink_sums != nullptr ? heads : 0;
  const int32_t sequences = a.alibi_batch_stride != 0 ? a.num_seqs : 1;
  if (number < of_sinks) {
    const int64_t parts = static_cast<int64_t>(a.num_row_blocks) * (kPreprocessThreads / 32);
    const float sum = sum_of(a.sink_sums + number * parts, parts);
    if (ptx::lane() == 0) a.dsinks[number] = sum;
  } else if (a.slope_sums != nullptr && number - of_sinks < sequences * heads) {
    const int32_t seq = quotient(number - of_sinks, heads), head = number - of_sinks - seq * heads;
    const float sum = slope_gradient(a, head, seq);
    if (ptx::lane() == 0) a.dalibi_slopes[number - of_sinks] = sum;
  }
}

}  // namespace flashspark
