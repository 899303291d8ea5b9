// The shared memory of a backward kernel with the user's functions: what the others have, and words of each row of a
// block, that is 4 bytes a row each, in two stages where all has two. They lie behind dS^T, where V is before it passes
// on to registers, or behind V.
#pragma once

#include "backward/smem_plan.hpp"

namespace flashspark {

struct FunctionBackwardMemory : BackwardMemory {
  int32_t words, word_stage;
};

constexpr FunctionBackwardMemory function_backward_memory(const BackwardInstance &instance, const BackwardTile &tile,
                                                          int32_t words) {
  FunctionBackwardMemory m{backward_memory(instance, tile), 0, 0};
  m.words = tile.values_in_registers ? m.behind_dscores : m.values + tile.keys() * instance.head_dim_v * 2;
  const int32_t bytes = words * tile.rows * 4;
  m.word_stage = tile.stages == RowStages::all ? bytes : 0;
  const int32_t end = m.words + bytes + m.word_stage;
  const int32_t more = end > m.rows ? end - m.rows : 0;
  m.rows += more, m.kept += more, m.barriers += more, m.pieces += more, m.turns += more, m.total += more;
  return m;
}

}  // namespace flashspark
