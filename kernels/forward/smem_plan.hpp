// Where everything lies in a CTA's shared memory, for the kernel and for the host that launches it.
#pragma once

#include "forward/config.hpp"

namespace flashspark {

constexpr int32_t kMaxSharedBytes = 99 * 1024;  // of a CTA on SM12x
// What every warp of a Stream-K kernel keeps of its range (save_range).
constexpr int32_t kWorkRangeBytes = 32;

// Columns of K or V in shared memory, in units of 16 bits: elements of one byte take half of them, up to whole groups
// of chunks (TileLayout).
constexpr int32_t kv_columns(int32_t columns, int32_t element_bytes) {
  return element_bytes == 1 ? (columns / 2 + 31) / 32 * 32 : columns;
}

// Offsets and sizes in bytes. While the mainloop runs:
//
//   | K, V of stage 0 | K, V of stage 1 | Q | ... | work range of each warp |
//
// Where Q passes on to registers (QueryStorage::registers) it lies in the second stage before that is filled. The
// epilogue uses everything before the work ranges, `epilogue` bytes a warp.
struct SharedMemoryPlan {
  int32_t keys;         // a tile of K; V follows it
  int32_t stage;        // a tile of K and one of V
  int32_t queries;      // offset of Q
  int32_t epilogue;     // of a warp
  int32_t work_ranges;  // offset
  int32_t total;
};

// What a warp has of the memory that results pass through: its rows of out; with key groups also what the warps of the
// same rows hand to each other (reduce_key_groups), 16 bytes a lane at once: half of each row between two groups, all
// columns between more.
constexpr int32_t epilogue_bytes(const Instance &instance, const Tile &tile) {
  constexpr int32_t kWarpVector = 32 * 16;  // 16 bytes of every lane
  if (tile.key_groups > 2) return (instance.head_dim_v / 8 + 1) * kWarpVector;
  const int32_t rows = tile.warp_rows * instance.head_dim_v * 2;
  const int32_t handed = tile.warp_rows / 16 * (instance.head_dim_v / 16 + 1) * kWarpVector;
  return tile.key_groups == 1 || (tile.runtime_key_groups() && rows > handed) ? rows : handed;
}

constexpr SharedMemoryPlan shared_memory_plan(const Instance &instance, const Tile &tile, int32_t kv_element_bytes) {
  const auto larger = [](int32_t a, int32_t b) { return a > b ? a : b; };
  SharedMemoryPlan plan{};
  plan.keys = tile.keys * kv_columns(instance.head_dim, kv_element_bytes) * 2;
  plan.stage = plan.keys + tile.keys * kv_columns(instance.head_dim_v, kv_element_bytes) * 2;
  const int32_t stages = plan.stage * tile.stages(), queries = tile.max_rows() * instance.head_dim * 2;
  plan.queries = tile.queries == QueryStorage::registers ? plan.stage : stages;
  plan.epilogue = epilogue_bytes(instance, tile);
  plan.work_ranges = larger(larger(stages, plan.queries + queries), tile.warps * plan.epilogue);
  plan.total = plan.work_ranges + (supports_stream_k(instance) ? tile.warps * kWorkRangeBytes : 0);
  return plan;
}

// Of a kernel with the user's functions, behind the others: so many words for each row.
constexpr int32_t function_row_bytes(const Tile &tile, int32_t words) {
  return tile.max_rows() * words * 4;
}

constexpr int32_t shared_bytes(const Instance &instance, const Tile &tile, bool dequantizes_kv = false) {
  return shared_memory_plan(instance, tile, dequantizes_kv ? 1 : 2).total;
}

}  // namespace flashspark
