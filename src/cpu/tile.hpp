// What engine.cpp hands to the SIMD kernels: one tile of query rows against one stretch of keys.
#pragma once

#include <cstddef>
#include <span>

#include "cpu/mask.hpp"
#include "dropout.hpp"
#include "problem.hpp"

namespace flashspark::cpu {

// Keys in one step of the online softmax of the streaming kernel: a multiple of 3 and of 16 (its steps over keys).
constexpr int kBlockKeys = 48;

// The streaming kernel takes several KV heads that lie side by side, up to so many bytes of a token, since memory is
// faster in longer stretches (docs/experiments.md E1). K and V of two blocks of such tokens are 384 KB, which fit in L2
// (E3).
constexpr int64_t kStreamBytes = 2048;
constexpr int kMaxStreamHeads = 16;

// Keys in one step of the packed kernel. More would mean fewer passes over O, but 128 keys x (K + V) x 128 floats
// already take 128 KB of L2.
constexpr int kPackedKeys = 128;

// Rows that the packed kernel multiplies at once, and the widest panel of any target (AVX-512), to which V's width is
// padded.
constexpr int kRowGroup = 6;
constexpr int kPackedPad = 32;
constexpr int kMaxTileRows = 192;

// Tiles of at most so many rows stream K and V from memory; larger ones first copy each block into panels, which pays
// when enough rows use the copy.
constexpr int kStreamRows = 16;

class TileFunctions;

struct Tile {
  const Params *p;
  TileFunctions *functions;  // NULL: neither functions nor block lists
  Sequence s;
  int64_t h_kv;           // first KV head
  int32_t num_heads;      // KV heads, each with all rows; 1 for the packed kernel
  int64_t group;          // query heads a KV head
  int64_t row0;           // packed row r is query token r / group, head h_kv * group + r % group
  int32_t rows;           // rows of this tile
  const RowMask *masks;   // of the tokens row0 / group ..
  const Interval *spans;  // the keys that any row keeps, disjoint and in order: nothing else is read
  int32_t num_spans;
  Dropout dropout;
  int64_t leftpad;    // dropout counts keys from here on: key j of the sequence is its key leftpad + j
  bool with_sink;     // adds the sink to the sums of its rows: one split of a row does
  float *partial_o;   // (num_heads, rows, head_dim_v) sums not yet divided, or NULL: write out and lse
  float *partial_ml;  // (num_heads, rows, 2) row maximum in units of log2, row sum
  float *scratch;     // scratch_floats() of this tile's shape, 64-byte aligned

  int64_t token(int64_t r) const { return (row0 + r) / group; }
  int64_t head(int64_t r) const { return h_kv * group + (row0 + r) % group; }
  const RowMask &mask(int64_t r) const { return masks[token(r) - row0 / group]; }
};

// The functions' part of rows [first, first + rows) of the tile's first KV head, as TileFunctions::apply().
void apply_functions(const Tile &tile, int64_t first, int64_t rows, int64_t key, int64_t count, float *scores,
                     int64_t row_stride, int64_t key_stride);

// One SIMD target's kernels. The conversions are those that `run` loads and stores rows with, for tests of every code.
struct Kernels {
  const char *target;
  void (*run)(const Tile &tile);
  // `count` elements of `dtype` as floats, in vectors of `lanes` = 4, 8 or 16 (at most the target's), which divide
  // count.
  void (*widen)(const void *from, int64_t count, int32_t dtype, int lanes, float *to);
  // The other way; count % 8 == 0.
  void (*narrow)(const float *from, int64_t count, int32_t dtype, void *to);
};

// Those that this CPU can run, best first.
std::span<const Kernels *const> all_kernels();
// The best of them, or the one that FLASHSPARK_CPU_TARGET names.
const Kernels &kernels();
// For tests: kernels() returns these from now on; nullptr: its own choice again.
void use_kernels(const Kernels *kernels);

// Rows in a tile, so that its Q, scores and O stay in L2.
int32_t tile_rows(int64_t head_dim, int64_t head_dim_v, int64_t packed_rows);
// KV heads in a tile of so many rows.
int32_t tile_heads(const Params &p, int32_t rows);
size_t scratch_floats(int64_t head_dim, int64_t head_dim_v, int32_t rows, int32_t num_heads);

}  // namespace flashspark::cpu
