// instances.def as a table for host and device, and what follows from a tile: threads and shared memory.
#pragma once

#include <cstdint>

namespace flashspark {

enum class Buffering : uint8_t { single_buffer, double_buffer };
// Where Q lives: in shared memory; in registers, which it reaches through the second stage of K and V; or through
// memory of its own, so that the second tile of keys need not wait for it.
enum class QueryStorage : uint8_t { shared, registers, shared_dedicated };
// What a kernel's tile is for: many rows a CTA; 32 or 64 rows, short sequences and decode; 16 rows and keys of its own
// for every warp, decode of few query heads.
enum class Tiling : uint8_t { prefill, short_q, decode };
// native: softcap, ALiBi, relative bias, PrefixLM ranges, R-SWA, attention chunks, any page size.
enum class ScoreMod : uint8_t { none, native };
enum class Architecture : uint8_t { sm_80, sm_90, sm_120f };

struct Tile {
  int32_t warps, warp_rows, keys;
  int32_t score_keys;  // of the keys, those whose scores a warp holds at once
  int32_t key_groups;  // groups of warps that share the keys of every tile among them; joined at the end
  Buffering buffering;
  QueryStorage queries;
  int32_t min_ctas;  // resident blocks an SM that the registers must allow

  bool operator==(const Tile &) const = default;
  constexpr int32_t rows() const { return warps / key_groups * warp_rows; }
  // Tiles of four warps that share keys in pairs may as well go side by side, which ForwardArguments::key_groups says.
  // Where registers are so few that Q stays in shared memory, the choice would cost some that are not there.
  constexpr bool runtime_key_groups() const {
    return key_groups == 2 && warps * warp_rows <= 64 && queries != QueryStorage::shared;
  }
  constexpr int32_t max_rows() const { return runtime_key_groups() ? warps * warp_rows : rows(); }
  constexpr int32_t threads() const { return warps * 32; }
  constexpr int32_t stages() const { return buffering == Buffering::single_buffer ? 1 : 2; }
};

// A line of instances.def by its name; the value is its place in kInstances.
enum class InstanceIndex : int32_t {
  none = -1,  // of kernels that have no instances
#define FLASHSPARK_INSTANCE(name, head_dim, head_dim_v, tiling, score_mod, tile_90, tile_120f) name,
#include "forward/instances.def"
#undef FLASHSPARK_INSTANCE
};

struct Instance {
  InstanceIndex index;
  const char *name;
  int32_t head_dim, head_dim_v;
  Tiling tiling;
  ScoreMod score_mod;
  Tile sm_90, sm_120f;

  constexpr const Tile &tile(Architecture arch) const { return arch == Architecture::sm_120f ? sm_120f : sm_90; }
};

#define FLASHSPARK_TILE(warps, rows, keys, score_keys, key_groups, buffering, queries, min_ctas) \
  {warps, rows, keys, score_keys, key_groups, Buffering::buffering, QueryStorage::queries, min_ctas}
#define FLASHSPARK_INSTANCE(name, head_dim, head_dim_v, tiling, score_mod, tile_90, tile_120f) \
  {InstanceIndex::name, #name, head_dim, head_dim_v, Tiling::tiling, ScoreMod::score_mod, tile_90, tile_120f},
inline constexpr Instance kInstances[] = {
#include "forward/instances.def"
};
#undef FLASHSPARK_INSTANCE
#undef FLASHSPARK_TILE

// Of the shared memory that results pass through, what a warp has: its rows, or with key groups first what the warps of
// the same rows in other groups hand over, 16 bytes a lane at once: half a row each of two, all of more.
constexpr int32_t epilogue_bytes(const Instance &instance, const Tile &tile) {
  if (tile.key_groups > 2) return (instance.head_dim_v / 8 + 1) * 512;
  const int32_t rows = tile.warp_rows * instance.head_dim_v * 2;
  const int32_t handed = tile.warp_rows / 16 * (instance.head_dim_v / 16 + 1) * 512;
  return tile.key_groups == 1 || (tile.runtime_key_groups() && rows > handed) ? rows : handed;
}

// Shared memory of a block, bytes. Q lies behind the stages of K and V, or where it only passes through on its way to
// registers behind the first.
constexpr int32_t query_bytes(const Instance &instance, const Tile &tile) {
  return tile.max_rows() * instance.head_dim * 2;
}
// Rows of K or V in shared memory, in units of 16 bits: e4m3 (`dequantizes_kv`) takes half of them, up to whole groups
// of chunks (TileLayout).
constexpr int32_t kv_columns(int32_t columns, bool dequantizes_kv) {
  return dequantizes_kv ? (columns / 2 + 31) / 32 * 32 : columns;
}
constexpr int32_t stage_bytes(const Instance &instance, const Tile &tile, bool dequantizes_kv) {
  return tile.keys * (kv_columns(instance.head_dim, dequantizes_kv) + kv_columns(instance.head_dim_v, dequantizes_kv)) *
         2;
}
constexpr int32_t loop_bytes(const Instance &instance, const Tile &tile, bool dequantizes_kv) {
  const int32_t stage = stage_bytes(instance, tile, dequantizes_kv), queries = query_bytes(instance, tile);
  const int32_t ring = stage * tile.stages();
  // At the end: rows of the result, or what key groups hand to each other (see reduce_key_groups).
  const int32_t joined = tile.warps * epilogue_bytes(instance, tile);
  const int32_t loop =
      tile.queries != QueryStorage::registers ? ring + queries : (ring > stage + queries ? ring : stage + queries);
  return loop > joined ? loop : joined;
}
// Kernels that decode: their blocks can take even shares of all work (stream_k.cuh).
constexpr bool supports_stream_k(const Instance &instance) {
  return instance.tiling != Tiling::prefill && instance.score_mod == ScoreMod::none;
}
// What a warp of kernels with shares keeps of its share lies behind all (stream_k.cuh).
constexpr int32_t kWorkRangeBytes = 32;
constexpr int32_t shared_bytes(const Instance &instance, const Tile &tile, bool dequantizes_kv = false) {
  const int32_t share = supports_stream_k(instance) ? tile.warps * kWorkRangeBytes : 0;
  return loop_bytes(instance, tile, dequantizes_kv) + share;
}

}  // namespace flashspark
