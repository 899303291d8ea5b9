// The user's lists name key blocks for each query block; a backward kernel owns keys and walks over rows. This turns
// the lists into a table of what they say of each pair (BlockStatusTable). One CTA a row of the lists.
#pragma once

#include "attention/block_list.cuh"
#include "backward/function_arguments.hpp"

namespace flashspark {

constexpr int32_t kBlockStatusThreads = 128;

FLASHSPARK_DEVICE void find_block_statuses(const BlockStatusArguments &a) {
  ptx::grid_dependency_wait();  // in every CTA, see wait_for_previous_kernel()
  ptx::grid_dependency_launch();
  const BlockStatusTable &table = a.table;
  const auto cta = static_cast<int32_t>(ptx::cta_x()), thread = static_cast<int32_t>(ptx::thread_index());
  const int32_t list = quotient(cta, table.query_blocks), query_block = cta - list * table.query_blocks;
  const Quotient at = divide(list, a.heads);
  uint8_t *statuses = table.data + at.quotient * table.batch_stride + at.remainder * table.head_stride + query_block;
  const int64_t stride = table.query_blocks;
  for (int32_t n = thread; n < table.key_blocks; n += kBlockStatusThreads) statuses[n * stride] = kUnlisted;
  for (int32_t which = 0; which < 2; ++which) {
    ptx::cta_barrier();
    const BlockListRow row = row_of(a.lists[which], at.quotient, at.remainder, query_block, table.key_blocks);
    for (int32_t n = thread; n < row.blocks; n += kBlockStatusThreads)
      statuses[clamp(row.indices[n], 0, table.key_blocks - 1) * stride] = which == 0 ? kListed : kWhole;
  }
}

}  // namespace flashspark
