// instances.def as a table for host and device.
#pragma once

#include "forward/config.hpp"

namespace flashspark {

// Every warp has keys of its own; or two warps have the same, of which one sums dV, the other one dK: of these keys;
// or, with columns, of all keys of the CTA, but some of the columns.
enum class KeySharing : uint8_t { none, gradients, columns };

// Of what a block of rows needs shared memory has one stage; two of Q, so that the next is copied while the scores are
// computed; or two of Q, dO and dS^T, so that dQ of a block is computed beside the next one's scores, and one barrier a
// block is enough; or steps of score_rows rows have three, for which KeySharing::columns has a loop of its own.
enum class RowStages : uint8_t { one, queries, all, steps };

// How a kernel's CTAs sum dq: in no order, or in turns (turns.cuh), as they are asked, for which it has two loops, at
// the cost of registers, or with KeySharing::columns one that asks each time; in no order alone; in turns alone; or in
// turns by CTAs that have parts of walks (walks.cuh).
enum class SumOrder : uint8_t { as_asked, unordered, turns, walks };
// Blocks of rows of a turn of a walk, and how many turns a part may have.
inline constexpr int32_t kWalkTurnBlocks = 2, kMostWalkTurns = 512;

// A CTA owns `keys()` keys, a warp warp_keys of them, and all walk over blocks of `rows` rows of one query head.
struct BackwardTile {
  int32_t warps, warp_keys, rows;
  int32_t score_rows;        // of which a warp holds scores at once
  bool keys_in_registers;    // a warp's keys stay in registers as the operand of the scores
  bool values_in_registers;  // the same of its values, whose shared memory other operands then take
  RowStages stages;
  KeySharing sharing;
  int32_t min_ctas;  // resident CTAs an SM that the registers must allow
  SumOrder order = SumOrder::as_asked;

  bool operator==(const BackwardTile &) const = default;
  constexpr int32_t key_warps() const { return sharing == KeySharing::none ? warps : warps / 2; }
  constexpr int32_t keys() const { return key_warps() * warp_keys; }
  constexpr int32_t threads() const { return warps * 32; }
  // To begin and end a tile of keys takes about as long as so many blocks of rows (docs/experiments.md).
  constexpr int32_t tile_blocks() const { return rows < 64 ? 64 / rows : 1; }
  // Rows of shared memory have 16 bytes more instead of being permuted.
  constexpr bool padded() const { return stages == RowStages::all; }
  // Sums of dq, which postprocess adds up. Tiles of keys add to them in turn (turns.cuh), or walks to both (walks.cuh).
  constexpr int32_t dq_sums() const {
    return order == SumOrder::walks || (order == SumOrder::turns && sharing == KeySharing::columns) ? 2 : 1;
  }
  constexpr int32_t row_bytes(int32_t columns) const { return columns * 2 + (padded() ? 16 : 0); }
};

enum class BackwardIndex : int32_t {
  none = -1,
#define FLASHSPARK_INSTANCE(name, head_dim, head_dim_v, score_mod, tile_90, tile_120f) name,
#include "backward/instances.def"
// Then those of kernels with the user's functions.
#include "backward/function_instances.def"
#undef FLASHSPARK_INSTANCE
};

struct BackwardInstance {
  BackwardIndex index;
  const char *name;
  int32_t head_dim, head_dim_v;
  ScoreMod score_mod;
  BackwardTile sm_90, sm_120f;

  constexpr const BackwardTile &tile(Architecture arch) const {
    return arch == Architecture::sm_120f ? sm_120f : sm_90;
  }
};

#define FLASHSPARK_TILE(warps, warp_keys, rows, score_rows, keys, values, stages, sharing, min_ctas, ...) \
  {warps,                                                                                                 \
   warp_keys,                                                                                             \
   rows,                                                                                                  \
   score_rows,                                                                                            \
   keys,                                                                                                  \
   values,                                                                                                \
   RowStages::stages,                                                                                     \
   KeySharing::sharing,                                                                                   \
   min_ctas __VA_OPT__(, SumOrder::) __VA_ARGS__}
#define FLASHSPARK_INSTANCE(name, head_dim, head_dim_v, score_mod, tile_90, tile_120f) \
  {BackwardIndex::name, #name, head_dim, head_dim_v, ScoreMod::score_mod, tile_90, tile_120f},
namespace backward_instances {
constexpr bool registers = true, shared = false;
inline constexpr BackwardInstance kTable[] = {
#include "backward/instances.def"
};
// Of kernels with the user's functions: their indices follow.
inline constexpr BackwardInstance kFunctionTable[] = {
#include "backward/function_instances.def"
};
}  // namespace backward_instances
#undef FLASHSPARK_INSTANCE
#undef FLASHSPARK_TILE
inline constexpr auto &kBackwardInstances = backward_instances::kTable;
inline constexpr auto &kBackwardFunctionInstances = backward_instances::kFunctionTable;

constexpr int32_t kNumBackwardInstances = sizeof kBackwardInstances / sizeof kBackwardInstances[0];
constexpr bool is_of_functions(BackwardIndex index) {
  return static_cast<int32_t>(index) >= kNumBackwardInstances;
}
constexpr const BackwardInstance &instance_of(BackwardIndex index) {
  const auto n = static_cast<int32_t>(index);
  return is_of_functions(index) ? kBackwardFunctionInstances[n - kNumBackwardInstances] : kBackwardInstances[n];
}

}  // namespace flashspark
