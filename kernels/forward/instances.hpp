// instances.def as a table for host and device, and what follows from a tile: threads and shared memory.
#pragma once

#include <cstdint>

namespace flashspark {

enum class Schedule : uint8_t { single, ring };
enum class QueryPlace : uint8_t { shared, registers };
enum class Kind : uint8_t { wide, few, changed };
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
    return key_groups == 2 && warps * warp_rows <= 64 && queries == QueryPlace::registers;
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

// Of the shared memory that results pass through, what a warp has: its rows, or with two key groups first what the warp
// of the same rows in the other group hands over, 16 bytes a lane at once.
constexpr int32_t result_bytes(const Instance &instance, const Tile &tile) {
  const int32_t rows = tile.warp_rows * instance.head_dim_v * 2;
  const int32_t handed = tile.warp_rows / 16 * (instance.head_dim_v / 16 + 1) * 512;
  return tile.key_groups == 1 || (tile.flexible() && rows > handed) ? rows : handed;
}

// Shared memory of a block, bytes. Q in registers passes through memory that later holds a stage of K and V: it lies
// behind the first stage (see tile_memory.cuh).
constexpr int32_t query_bytes(const Instance &instance, const Tile &tile) {
  return tile.most_rows() * instance.head_dim * 2;
}
constexpr int32_t stage_bytes(const Instance &instance, const Tile &tile) {
  return tile.keys * (instance.head_dim + instance.head_dim_v) * 2;
}
// Kernels that convert K and V from e4m3 (`converts`) keep one tile of them as the 16-bit numbers that they compute
// with, and the next two, as they lie in the cache, in places that each thread has for itself. Threads that copy one
// row, 16 bytes each: as many as there are chunks in a group (TileLayout).
constexpr int32_t row_threads(const Instance &instance) {
  return instance.head_dim % 64 == 0 && instance.head_dim_v % 64 == 0 ? 8 : 4;
}
constexpr int32_t raw_loads(int32_t columns, int32_t row_threads) {  // of a thread in one row
  return (columns / 16 + row_threads - 1) / row_threads;
}
constexpr int32_t raw_bytes(const Instance &instance, const Tile &tile) {
  const int32_t lanes = row_threads(instance);
  const int32_t loads = raw_loads(instance.head_dim, lanes) + raw_loads(instance.head_dim_v, lanes);
  return tile.keys * lanes * 16 * loads;
}
// Where the tiles in e4m3 lie: behind Q, if Q passes through shared memory into registers.
struct RawPlaces {
  int32_t first, second, end;
};
constexpr RawPlaces raw_places(const Instance &instance, const Tile &tile) {
  const int32_t stage = stage_bytes(instance, tile), raw = raw_bytes(instance, tile);
  const int32_t queries = tile.queries == QueryPlace::registers ? query_bytes(instance, tile) : 0;
  const int32_t first = stage > queries ? stage : queries;
  return {first, first + raw, first + 2 * raw};
}

constexpr int32_t shared_bytes(const Instance &instance, const Tile &tile, bool converts = false) {
  const int32_t stage = stage_bytes(instance, tile), queries = query_bytes(instance, tile);
  const int32_t ring = stage * tile.stages();
  // At the end: rows of the result, or what key groups hand to each other (see join_groups).
  const int32_t joined = tile.warps * result_bytes(instance, tile);
  const int32_t loop = converts ? raw_places(instance, tile).end + (tile.queries == QueryPlace::shared ? queries : 0)
                       : tile.queries == QueryPlace::shared ? ring + queries
                                                            : (ring > stage + queries ? ring : stage + queries);
  return loop > joined ? loop : joined;
}

}  // namespace flashspark
