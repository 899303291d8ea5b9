// What backward.cpp hands to the SIMD kernels of the backward pass: a tile of keys, and one tile of query rows after
// the other.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cpu/tile.hpp"

namespace flashspark::cpu {

// Keys of a tile: whole row groups and whole panels of every target. With 96 rows of D = Dv = 128 a pair of tiles takes
// 800 KB, or 700 in pairs of bfloat16, of the 1 MB L2 of the cores that this is tuned on. With half as many keys, rows
// of q, dout and dq come from further away twice as often, which takes longer.
constexpr int kBackwardKeys = 192;
static_assert(kBackwardKeys % kRowGroup == 0 && kBackwardKeys % kPackedPad == 0);
constexpr int kBackwardRows = 96;

// From row to row of the copies that a product reads across: an odd number of cache lines, so that the rows of a column
// do not fall on the same few sets of L1.
constexpr int64_t kPitchPad = 16;
constexpr int64_t backward_width(int64_t width) {
  return (width + kPackedPad - 1) / kPackedPad * kPackedPad;
}
constexpr int64_t backward_pitch(int64_t width) {
  return backward_width(width) + kPitchPad;
}
constexpr int64_t kScorePitch = kBackwardKeys + kPitchPad;

class FunctionGradients;

struct BackwardTile {
  const BackwardParams *p;
  FunctionGradients *function_gradients;  // NULL without score_mod
  Tile rows;                              // the forward problem and the query rows; spans, partials and sinks unused
  int64_t key, count;                     // keys [key, key + count), at most kBackwardKeys
  const float *common;                    // of each packed row of the KV head: dlse - dot(dout, out)
  float *dq;       // (packed rows, backward_width(head_dim)), without the factor softmax_scale; NULL: not wanted
  double *slopes;  // (group) sums for dalibi_slopes; NULL: not wanted
  float *scratch;  // backward_scratch_floats(), 64-byte aligned

  // Columns of scores that products read: those of the last six keys, and of whole panels.
  int64_t columns() const {
    return std::min<int64_t>((count + kRowGroup - 1 + kPackedPad - 1) / kPackedPad * kPackedPad, kBackwardKeys);
  }
};

// Rows of a tile at most, so that a pair of tiles stays in L2.
constexpr int32_t backward_rows(int64_t head_dim, int64_t head_dim_v) {
  return head_dim + head_dim_v <= 256 ? kBackwardRows : head_dim + head_dim_v <= 512 ? kBackwardRows / 2 : 24;
}

size_t backward_scratch_floats(int64_t head_dim, int64_t head_dim_v);

// One SIMD target's kernels.
struct BackwardKernels {
  const char *target;
  // A tile of keys begins, meets one tile of rows after the other, and ends: then dk and dv of its keys are written.
  void (*begin)(const BackwardTile &t);
  void (*add_rows)(const BackwardTile &t);
  void (*end)(const BackwardTile &t);
  // Dot products of kRowGroup pairs of rows, `width` elements of `dtype` long.
  void (*dots)(const void *const *a, const void *const *b, int64_t width, int32_t dtype, float *dots);
  // Writes a row of floats, times `factor`, as elements of `dtype` from element `at` of data.
  void (*store)(const float *row, int64_t count, float factor, void *data, int64_t at, int32_t dtype);
};

// Those of the target that kernels() chooses.
const BackwardKernels &backward_kernels();

// Gradients through the user's functions of rows that tile_functions has started, as FunctionGradients::apply().
void apply_function_gradients(const BackwardTile &t, int64_t first, int64_t rows, int64_t key, int64_t count,
                              const float *scores, float *ds);

}  // namespace flashspark::cpu
