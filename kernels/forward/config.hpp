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
enum class ScoreMod : uint8_t { none, native, dropout };  // dropout: alone, of the backward pass
enum class Architecture : uint8_t { sm_80, sm_90, sm_120f };

struct Tile {
  int32_t warps, warp_rows, keys;
  int32_t score_keys;  // keys whose scores a warp holds at once
  int32_t key_groups;  // groups of warps that split the keys of every tile; the epilogue adds up their results
  Buffering buffering;
  QueryStorage queries;
  int32_t min_ctas;  // resident CTAs an SM that the registers must allow

  bool operator==(const Tile &) const = default;
  constexpr int32_t rows() const { return warps / key_groups * warp_rows; }
  // Whether the host chooses, by ForwardArguments::key_groups, if four warps split keys in pairs or have rows of their
  // own. Where Q stays in shared memory for want of registers, the choice would cost more of them.
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

// The tile of an instance's kernels with the user's functions. Large ones get 32 scores at once, where Q lies in
// registers and is not read again for the others. Dropout draws for 64 keys: with fewer scores it draws more often,
// which costs more than the few registers that otherwise spill.
constexpr Tile function_tile(Tile tile, bool dropout, bool large) {
  constexpr int32_t kScoreKeys = 32;
  if (large && !dropout && tile.score_keys > kScoreKeys && tile.queries == QueryStorage::registers)
    tile.score_keys = kScoreKeys;
  if (dropout && tile.score_keys < kScoreKeys && tile.keys % (kScoreKeys * tile.key_groups) == 0)
    tile.score_keys = kScoreKeys;
  return tile;
}

// Whether CTAs may take Stream-K ranges of all work (forward/scheduler/stream_k.cuh).
constexpr bool supports_stream_k(const Instance &instance) {
  return instance.tiling != Tiling::prefill;
}

}  // namespace flashspark
