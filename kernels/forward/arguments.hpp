// What the host hands to the kernels of the forward pass: one copy in the constant bank of each launch.
#pragma once

#include "attention/arguments.hpp"
#include "attention/dropout.hpp"
#include "attention/function_arguments.hpp"

namespace flashspark {

// The combine kernel's CTAs: warps, columns of out, shared memory of a warp in bytes, and partials of a row that a lane
// loads at once.
constexpr int32_t kCombineWarps = 8, kCombineColumns = 128, kCombineWarpBytes = kCombineColumns * 4 + 16,
                  kCombinePartials = 8;

// How the device may cut all work into Stream-K ranges (forward/scheduler/stream_k.cuh).
struct StreamKLimits {
  int32_t ctas;                 // ranges at most; 0: no Stream-K
  int32_t min_tiles_shift;      // the mean range has 2^min_tiles_shift key tiles at least
  int32_t small_problem_ctas;   // ranges at most of a problem of fewer than
  int32_t small_problem_tiles;  // ... so many key tiles
  int32_t tile_start_cost;      // the start of a row tile counts as so many key tiles
};

constexpr int32_t kRecordWords = 32;  // of a CTA's scheduler metadata: one 128-byte line of the L2

// The tile schedulers' part (forward/scheduler). Without Stream-K, CTA x is (L2 section, row tile, head): the heads of
// a section share the L2, and row tiles go from the last rows of a sequence to the first, since those see most keys. A
// "head" is a KV head of one sequence, or with cu_seqlens_q, where the sequence is found on the device, a KV head
// alone.
struct TileSchedulerArguments {
  int32_t num_m_blocks;           // row tiles of a head (bound)
  int32_t num_heads_times_batch;  // all heads
  int32_t l2_section_heads;       // heads of a section
  int32_t num_splits;             // CTAs of y: every row tile's keys are cut into as many even splits
  StreamKLimits stream_k;         // ctas > 0: CTA x takes the x-th range of all work instead
  int32_t tile_rows, tile_keys;   // of the forward kernel, where results are partial
  // (CTAs of x, kRecordWords), written by the schedule kernel; NULL: none. The fingerprint is of these arguments.
  int32_t *scheduler_metadata;
  int32_t metadata_fingerprint;
};

// Partial results of split row tiles, which the combine kernel joins.
struct PartialArguments {
  // (slots, tile_rows, partial_columns) in the order of partial_row(), and (slots, tile_rows).
  float *partial_out, *partial_lse;
  int32_t partial_columns;        // head_dim_v up to a multiple of 16
  int32_t partial_pair_distance;  // columns between a lane's two pairs in a partial: 8, or 2 where V is e4m3
};

struct ForwardArguments : AttentionArguments, TileSchedulerArguments, PartialArguments {
  int32_t key_groups;  // 1 or 2, of tiles that let the host choose (Tile::runtime_key_groups)
};

// Of kernels with the user's functions, block lists or dropout.
struct FunctionForwardArguments : ForwardArguments {
  FunctionArguments functions;
  DropoutArguments dropout;
};

struct CombineArguments : AttentionArguments, TileSchedulerArguments, PartialArguments {
  int32_t ctas_per_tile;  // CTAs of y
  int32_t row_tiles;      // of a sequence and KV head, where CTA x is for row tile x; 0: CTA x is for Stream-K range x
};

struct ScheduleArguments : SequenceArguments, TileSchedulerArguments {};

struct QuantizeArguments {
  ForwardArguments forward;  // which rows exist; its out holds them in 16 bits, of type out_dtype
  void *out;                 // e4m3
  Strides out_strides;
  const float *output_scale;  // out is divided by it; NULL: 1
};

}  // namespace flashspark
