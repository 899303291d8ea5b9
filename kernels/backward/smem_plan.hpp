// Where everything lies in a CTA's shared memory.
#pragma once

#include "backward/config.hpp"
#include "forward/smem_plan.hpp"

namespace flashspark {

// Offsets and sizes in bytes:
//
//   | K | Q, stage 0 | dO | Q, stage 1 | dS^T | V | lse and delta of a stage, twice | what is kept, twice |
//
// Where V passes on to registers it lies on stage 1 and dS^T, which are written after that. Behind dS^T a pair's slopes
// of softcap lie, if there are any. At the end results pass through K's memory.
struct BackwardMemory {
  int32_t queries, query_stage;  // of stage 0, and a stage's size; stage 1 is at second_stage
  int32_t dout, second_stage, dscores, slopes, values;
  int32_t rows, row_stage;
  int32_t kept, kept_stage;  // bits of dropout: for each 16 keys 16 bits a row
  int32_t total;
};

constexpr BackwardMemory backward_memory(const BackwardInstance &instance, const BackwardTile &tile) {
  BackwardMemory m{};
  const int32_t value_bytes = tile.keys() * instance.head_dim_v * 2;
  m.queries = tile.keys() * instance.head_dim * 2;
  m.query_stage = tile.rows * instance.head_dim * 2;
  m.dout = m.queries + m.query_stage;
  m.second_stage = m.dout + tile.rows * instance.head_dim_v * 2;
  m.dscores = m.second_stage + (tile.query_stages - 1) * m.query_stage;
  const bool native = instance.score_mod == ScoreMod::native;
  const int32_t score_bytes = tile.keys() * tile.rows * 2;
  m.slopes = m.dscores + score_bytes;
  int32_t end = m.slopes + (native && tile.sharing == KeySharing::gradients ? score_bytes : 0);
  m.values = tile.values_in_registers ? m.second_stage : end;
  if (end < m.values + value_bytes) end = m.values + value_bytes;
  m.rows = end;
  m.row_stage = 2 * tile.rows * 4;
  m.kept = m.rows + 2 * m.row_stage;
  m.kept_stage = native ? tile.keys() * tile.rows / 8 : 0;
  m.total = m.kept + 2 * m.kept_stage;
  return m;
}

constexpr int32_t shared_bytes(const BackwardInstance &instance, const BackwardTile &tile) {
  return backward_memory(instance, tile).total;
}

}  // namespace flashspark
