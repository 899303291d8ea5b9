// The shared memory of a backward kernel with the user's functions: what the others have, and words of each row of a
// block, that is 4 bytes a row each. They lie behind dS^T, where V is before it passes on to registers, or behind V.
#pragma once

#include "backward/smem_plan.hpp"

namespace flashspark {

struct FunctionBackwardMemory : BackwardMemory {
  int32_t words;
};

constexpr FunctionBackwardMemory function_backward_memory(const BackwardInstance &instance, const BackwardTile &tile,
                                                          int32_t words) {
  FunctionBackwardMemory m{backward_memory(instance, tile), 0};
  m.words = tile.values_in_registers ? m.slopes : m.values + tile.keys() * instance.head_dim_v * 2;
  const int32_t end = m.words + words * tile.rows * 4;
  const int32_t more = end > m.rows ? end - m.rows : 0;
  m.rows += more, m.kept += more, m.total += more;
  return m;
}

}  // namespace flashspark
