// Behind the main kernel: dq from its sums, scaled, in its own type and order. One CTA a block of rows and query head.
#pragma once

#include "backward/blocks.cuh"
#include "forward/output.cuh"

namespace flashspark {

constexpr int32_t kPostprocessThreads = 128;

template <class Element>
FLASHSPARK_DEVICE void postprocess(const BackwardArguments &a) {
  ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
  ptx::grid_dependency_launch();
  const auto cta = static_cast<int32_t>(ptx::cta_x()), thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t head = quotient(cta, a.num_row_blocks), index = cta - head * a.num_row_blocks;
  const RowBlock block = find_row_block(a, index);
  if (!block.valid) return;
  const float *sums = a.dq_sum + (static_cast<int64_t>(head) * a.padded_rows + index * a.row_block) * a.sum_columns;
  const int64_t batch = a.cu_seqlens_q != nullptr ? 0 : block.seq * a.dq_strides.batch;
  auto *dq = static_cast<Element *>(a.dq) + batch + head * a.dq_strides.head;
  const int32_t chunks = a.head_dim / 8, all_chunks = a.sum_columns / 8;
  // A thread takes eight columns of two rows, 8 apart, which four lanes of the main kernel have summed.
  for (int32_t n = thread; n < a.row_block / 2 * chunks; n += kPostprocessThreads) {
    const int32_t pair = quotient(n, chunks), chunk = n - pair * chunks;
    const int32_t atom = pair / 8, row = pair % 8;
    const auto *from = reinterpret_cast<const ptx::Vector16 *>(sums) + ((atom * all_chunks + chunk) * 32 + row * 4);
    ptx::Vector16 out[2];
    FLASHSPARK_UNROLL
    for (int32_t lane = 0; lane < 4; ++lane) {
      const ptx::Vector16 four = from[lane];
      FLASHSPARK_UNROLL
      for (int32_t half = 0; half < 2; ++half)
        out[half].word[lane] = ptx::pack<Element>(ptx::as_float(four.word[2 * half]) * a.softmax_scale,
                                                  ptx::as_float(four.word[2 * half + 1]) * a.softmax_scale);
    }
    FLASHSPARK_UNROLL
    for (int32_t half = 0; half < 2; ++half) {
      const int32_t token = block.first + atom * 16 + half * 8 + row;
      if (token >= block.end) continue;
      if (token >= block.tokens) {
        FLASHSPARK_UNROLL
        for (int32_t lane = 0; lane < 4; ++lane) out[half].word[lane] = 0;
      }
      store_8(dq + (block.row + token) * a.dq_strides.token + chunk * 8, out[half]);
    }
  }
}

}  // namespace flashspark
