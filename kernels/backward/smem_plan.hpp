// Where everything lies in a CTA's shared memory.
#pragma once

#include "backward/config.hpp"
#include "forward/smem_plan.hpp"

namespace flashspark {

// Offsets and sizes in bytes:
//
//   | K | Q and dO, stage 0 | Q and dO, stage 1 | dS^T | V | lse and delta of a stage, twice | what is kept, twice |
//   | a warp's piece, of each | turns |
//
// What has one stage has it twice here. Where V passes on to registers it lies on stage 1 and dS^T, which are written
// after that. At the end results pass through K's memory.
inline constexpr int32_t kPieceBytes = 48, kTurnBytes = 32, kModifiedBytes = 1536, kStateBytes = 64;
struct BackwardMemory {
  int32_t queries, dout, dscores, second_queries, second_dout, second_dscores;
  int32_t behind_dscores, values;
  int32_t rows, row_stage;
  int32_t kept, kept_stage;  // bits of dropout: for each 16 keys 16 bits a row
  int32_t draws;             // of pairs with dropout: 16 bytes a thread, of what all its draws have in common
  int32_t barriers;          // two mbarriers, with two stages of all; a third one of pairs with dropout
  int32_t probabilities;     // of RowStages::steps
  int32_t modified, state;   // of the same: kModifiedBytes of each pair of warps, kStateBytes of each warp
  // What would have to stay in registers through the loop (pieces.cuh, turns.cuh); not of native ones, which are full.
  int32_t pieces, turns;
  int32_t walk_turns;  // walk_turns.cuh
  int32_t total;
};

// The same where steps have three slots, the first of which is written while V lies on the others:
//
//   | K | Q and dO of a step, three times | P^T of a step, twice | dS^T, three times | lse and delta of a block, twice
//   | barrier, turns | what is kept, twice | P and slopes of softcap of each pair of warps | state of each warp |
constexpr BackwardMemory column_memory(const BackwardInstance &instance, const BackwardTile &tile) {
  BackwardMemory m{};
  const int32_t slot_bytes = 2 * tile.score_rows * tile.row_bytes(instance.head_dim),
                score_bytes = tile.keys() * tile.score_rows * 2;
  m.queries = tile.keys() * tile.row_bytes(instance.head_dim);
  m.values = m.queries + slot_bytes;
  m.probabilities = m.queries + 3 * slot_bytes;
  m.dscores = m.probabilities + 2 * score_bytes;
  m.rows = m.dscores + 3 * score_bytes;
  m.row_stage = 2 * tile.rows * 4;
  m.barriers = m.rows + 2 * m.row_stage;
  m.turns = m.barriers + 2 * 8;
  m.kept = m.turns + kTurnBytes;
  const bool native = instance.score_mod == ScoreMod::native;
  m.kept_stage = native ? tile.keys() * tile.rows / 8 : 0;
  m.modified = m.kept + 2 * m.kept_stage;
  m.state = m.modified + (native ? tile.key_warps() * kModifiedBytes : 0);
  m.total = m.state + tile.warps * kStateBytes;
  return m;
}

constexpr BackwardMemory backward_memory(const BackwardInstance &instance, const BackwardTile &tile) {
  if (tile.stages == RowStages::steps) return column_memory(instance, tile);
  BackwardMemory m{};
  const int32_t value_bytes = tile.keys() * tile.row_bytes(instance.head_dim_v);
  const bool native = instance.score_mod == ScoreMod::native, dropout = instance.score_mod == ScoreMod::dropout;
  const int32_t query_bytes = tile.rows * tile.row_bytes(instance.head_dim),
                dout_bytes = tile.rows * tile.row_bytes(instance.head_dim_v),
                score_bytes = tile.keys() * tile.row_bytes(tile.rows);
  const bool two_queries = tile.stages != RowStages::one, two_of_all = tile.stages == RowStages::all;
  m.queries = m.second_queries = tile.keys() * tile.row_bytes(instance.head_dim);
  m.dout = m.second_dout = m.queries + query_bytes;
  const int32_t second_stage = m.dout + dout_bytes;
  int32_t end = second_stage;
  if (two_queries) m.second_queries = end, end += query_bytes;
  if (two_of_all) m.second_dout = end, end += dout_bytes;
  m.dscores = m.second_dscores = end, end += score_bytes;
  if (two_of_all) m.second_dscores = end, end += score_bytes;
  m.behind_dscores = end;
  m.values = tile.values_in_registers ? second_stage : end;
  if (end < m.values + value_bytes) end = m.values + value_bytes;
  m.rows = end;
  m.row_stage = 2 * tile.rows * 4;
  m.kept = m.rows + 2 * m.row_stage;
  m.kept_stage = native ? tile.keys() * tile.rows / 8 : 0;
  m.draws = m.kept + 2 * m.kept_stage;
  m.barriers = m.draws + (dropout ? tile.threads() * 16 : 0);
  m.pieces = m.barriers + (dropout ? 4 * 8 : two_of_all ? 2 * 8 : 0);
  m.turns = m.pieces + (native ? 0 : tile.warps * kPieceBytes);
  m.walk_turns = m.turns + (native ? 0 : kTurnBytes);
  m.total = m.walk_turns + (tile.order == SumOrder::walks ? kMostWalkTurns * (8 + 4 * kWalkTurnBlocks) : 0);
  return m;
}

constexpr int32_t shared_bytes(const BackwardInstance &instance, const BackwardTile &tile) {
  return backward_memory(instance, tile).total;
}

}  // namespace flashspark
