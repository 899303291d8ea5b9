// What the host tells a kernel about the user's functions (docs/design/score-graph.md), and what the kernel tells them.
// Plain data; every pointer lies on the device.
#pragma once

#include <cstdint>

#include "common/divisor.hpp"

namespace flashspark {

constexpr int32_t kMaxCapturedTensors = 16, kMaxCapturedScalars = 16, kMaxCapturedRank = 8;

// A captured tensor. Its type and rank are part of the compiled function; its contents, shape and strides are not.
struct CapturedTensor {
  const void *data;
  int64_t strides[kMaxCapturedRank];  // elements
  int32_t shape[kMaxCapturedRank];
};

// A number that the call gives: the member that the function's graph names.
union CapturedScalar {
  int64_t integer;
  double real;
};

// Lists of key blocks for each block of query tokens: FlexAttention's BlockMask, FA4's block_sparse_tensors. Blocks of
// the first list ask mask_mod, those of the second keep all their keys. A list may name blocks that lie outside the
// other masks or the keys; a count is clamped to the width, a block to those that exist.
struct BlockList {
  const int32_t *counts;   // (batch or 1, heads or 1, query blocks); NULL: no list
  const int32_t *indices;  // (batch or 1, heads or 1, query blocks, width)
  int64_t count_batch_stride, count_head_stride, count_block_stride;  // elements; 0: one for all
  int64_t index_batch_stride, index_head_stride, index_block_stride;
  int32_t width;
};

// What the user's lists say of the blocks that a kernel's row tiles touch, where the blocks do not fit its tiles: the
// kernel then walks lists of its own tiles, and looks up the blocks inside those of `masked`. Both are derived by a
// launch of their own (attention/block_tiles.cuh).
enum BlockStatus : uint8_t { kUnlisted = 0, kListed = 1, kWhole = 3 };  // bit 0: some keys are kept; bit 1: all are
struct BlockStatuses {
  const uint8_t *data;               // (lists of row tiles, key blocks, query blocks that a row tile touches)
  int64_t row_tile_stride;           // bytes
  int32_t tile_blocks;               // query blocks that a row tile touches, at most
  Divisor block_tokens, block_keys;  // of the user's blocks
  int32_t last_key_block;
};

struct BlockSparseArguments {
  BlockList masked, full;
  Divisor block_tokens;     // query tokens of a block: a multiple of those of a row tile
  Divisor tiles_per_block;  // key tiles of a block
  int32_t last_query_block, last_key_block;
  Divisor kv_group;  // heads of the grid for each KV head: above 1 where the heads of a group have lists of their own
  BlockStatuses statuses;  // of derived lists, whose blocks are the kernel's tiles
};

// The part of a function kernel's arguments that other kernels lack.
struct FunctionArguments {
  BlockSparseArguments blocks;
  CapturedScalar scalars[2 * kMaxCapturedScalars];
  CapturedTensor tensors[2 * kMaxCapturedTensors];  // of the score function, then of the mask function
};

// Where a row stands: the inputs of a function that do not depend on the key.
struct FunctionRow {
  int32_t b, h, q_idx, seqlen_q, seqlen_k, offset_q, offset_k;
};

// A key of the lane: as a function counts it, and as the sum of two floats, of which the second is a constant.
// Positions below 2^23 are exact as floats, and their differences take no conversion.
struct FunctionKey {
  int32_t idx;  // not below 0: keys of the left padding, which no row keeps, must not be loaded for
  float first, step;
};

}  // namespace flashspark
