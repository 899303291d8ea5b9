// The shared memory of a backward kernel with the user's functions: what the others have, and words of each row of a
// block, that is 4 bytes a row each, in two stages where all has two. They lie behind dS^T, where V is before it passes
// on to registers, or behind V. With two stages of all, what a CTA has found for one query head, and uses for the other
// ones, lies behind all else, as far as there is room.
#pragma once

#include "backward/smem_plan.hpp"

namespace flashspark {

struct FunctionBackwardMemory : BackwardMemory {
  int32_t words, word_stage;
  int32_t windows;          // of each warp, what the lists say of kWindows windows of blocks (function_walk.cuh)
  int32_t cuts, cut_slots;  // of blocks that a mask cuts, which scores are kept
};
inline constexpr int32_t kWindows = 8, kWindowBytes = 32;
// A word of each thread with P^T, and of each pair of warps which block it is of.
inline constexpr int32_t kCutWords = 4 * 32, kCutBytes = (kCutWords + 4) * 4, kMostCuts = 12;

constexpr FunctionBackwardMemory function_backward_memory(const BackwardInstance &instance, const BackwardTile &tile,
                                                          int32_t words) {
  FunctionBackwardMemory m{backward_memory(instance, tile), 0, 0, 0, 0, 0};
  m.words = tile.values_in_registers ? m.behind_dscores : m.values + tile.keys() * instance.head_dim_v * 2;
  const int32_t bytes = words * tile.rows * 4;
  m.word_stage = tile.stages == RowStages::all ? bytes : 0;
  const int32_t end = m.words + bytes + m.word_stage;
  const int32_t more = end > m.rows ? end - m.rows : 0;
  m.rows += more, m.kept += more, m.barriers += more, m.pieces += more, m.turns += more, m.total += more;
  if (tile.stages == RowStages::all) {
    m.windows = (m.total + 31) / 32 * 32;
    m.cuts = m.windows + tile.warps * kWindows * kWindowBytes;
    const int32_t room = (kMaxSharedBytes - m.cuts) / kCutBytes;
    m.cut_slots = room < 0 ? 0 : room < kMostCuts ? room : kMostCuts;
    m.total = m.cuts + m.cut_slots * kCutBytes;
  }
  return m;
}

}  // namespace flashspark
