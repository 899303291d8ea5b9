// instances.def as a table for host and device, and what follows from a tile: threads and shared memory.
#pragma once

#include <cstdint>

namespace flashspark {

enum class Schedule : uint8_t { single, ring };
// Where Q lives: in shared memory; in registers, which it reaches through the second stage of K and V; or through
// memory of its own, so that the second tile of keys need not wait for it.
enum class QueryPlace : uint8_t { shared, registers, apart };
enum class Kind : uint8_t { wide, few, narrow, changed };
enum class Architecture : uint8_t { sm_80, sm_90, sm_120f };

struct Tile {
  int32_t warps, warp_rows, keys;
  int32_t score_keys;  // of the keys, those whose scores a warp holds at once
  int32_t key_groups;  // groups of warps that share the keys of every tile among them; joined at the end
  Schedule schedule;
  QueryPlace queries;
  int32_t blocks;  // resident blocks an SM that the registers must allow

  bool operator==(const Tile &) const = default;
  constexpr int32_t rows() const { return warps / key_groups * warp_rows; }
  // Tiles of four warps that share keys in pairs may as well go side by side, which ForwardArguments::key_groups says.
  // Where registers are so few that Q stays in shared memory, the choice would cost some that are not there.
  constexpr bool flexible() const {
    return key_groups == 2 && warps * warp_rows <= 64 && queries != QueryPlace::shared;
  }
  constexpr int32_t most_rows() const { return flexible() ? warps * warp_rows : rows(); }
  constexpr int32_t threads() const { return warps * 32; }
  constexpr int32_t stages() const { return schedule == Schedule::single ? 1 : 2; }
};

struct Instance {
  const char *name;
  int32_t head_dim, head_dim_v;
  Kind kind;
  Tile sm_90, sm_120f;

  constexpr const Tile &tile(Architecture arch) const { return arch == Architecture::sm_120f ? sm_120f : sm_90; }
};

#define FLASHSPARK_TILE(warps, rows, keys, score_keys, key_groups, schedule, queries, blocks) \
  {warps, rows, keys, score_keys, key_groups, Schedule::schedule, QueryPlace::queries, blocks}
#define FLASHSPARK_INSTANCE(name, head_dim, head_dim_v, kind, tile_90, tile_120f) \
  {#name, head_dim, head_dim_v, Kind::kind, tile_90, tile_120f},
inline constexpr Instance kInstances[] = {
#include "forward/instances.def"
};
#undef FLASHSPARK_INSTANCE

enum class InstanceIndex : int32_t {
#define FLASHSPARK_INSTANCE(name, head_dim, head_dim_v, kind, tile_90, tile_120f) name,
#include "forward/instances.def"
#undef FLASHSPARK_INSTANCE
};
#undef FLASHSPARK_TILE

// Of the shared memory that results pass through, what a warp has: its rows, or with key groups first what the warps of
// the same rows in other groups hand over, 16 bytes a lane at once: half a row each of two, all of more.
constexpr int32_t result_bytes(const Instance &instance, const Tile &tile) {
  if (tile.key_groups > 2) return (instance.head_dim_v / 8 + 1) * 512;
  const int32_t rows = tile.warp_rows * instance.head_dim_v * 2;
  const int32_t handed = tile.warp_rows / 16 * (instance.head_dim_v / 16 + 1) * 512;
  return tile.key_groups == 1 || (tile.flexible() && rows > handed) ? rows : handed;
}

// Shared memory of a block, bytes. Q lies behind the stages of K and V, or where it only passes through on its way to
// registers behind the first.
constexpr int32_t query_bytes(const Instance &instance, const Tile &tile) {
  return tile.most_rows() * instance.head_dim * 2;
}
// Rows of K or V in shared memory, in units of 16 bits: e4m3 (`converts`) takes half of them, up to whole groups of
// chunks (TileLayout).
constexpr int32_t stored_columns(int32_t columns, bool converts) {
  return converts ? (columns / 2 + 31) / 32 * 32 : columns;
}
constexpr int32_t stage_bytes(const Instance &instance, const Tile &tile, bool converts) {
  return tile.keys * (stored_columns(instance.head_dim, converts) + stored_columns(instance.head_dim_v, converts)) * 2;
}
constexpr int32_t loop_bytes(const Instance &instance, const Tile &tile, bool converts) {
  const int32_t stage = stage_bytes(instance, tile, converts), queries = query_bytes(instance, tile);
  const int32_t ring = stage * tile.stages();
  // At the end: rows of the result, or what key groups hand to each other (see join_groups).
  const int32_t joined = tile.warps * result_bytes(instance, tile);
  const int32_t loop =
      tile.queries != QueryPlace::registers ? ring + queries : (ring > stage + queries ? ring : stage + queries);
  return loop > joined ? loop : joined;
}
// Kernels that decode: their blocks can take even shares of all work (shares.cuh).
constexpr bool takes_shares(Kind kind) {
  return kind == Kind::few || kind == Kind::narrow;
}
// What a warp of kernels with shares keeps of its share lies behind all (shares.cuh).
constexpr int32_t kShareBytes = 32;
constexpr int32_t shared_bytes(const Instance &instance, const Tile &tile, bool converts = false) {
  const int32_t share = takes_shares(instance.kind) ? tile.warps * kShareBytes : 0;
  return loop_bytes(instance, tile, converts) + share;
}

}  // namespace flashspark
