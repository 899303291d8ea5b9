// What the host hands to the kernels of the backward pass: one copy in the constant bank of each launch.
#pragma once

#include "attention/arguments.hpp"
#include "attention/dropout.hpp"

namespace flashspark {

// Every query head has padded_rows rows of scratch memory: those of a sequence begin at a multiple of row_block, and
// the rows behind its last one, up to the next such multiple, hold what makes their probabilities 0.
struct BackwardArguments : AttentionArguments {
  const void *dout;
  void *dq, *dk, *dv;  // NULL: not wanted
  Strides dout_strides, dq_strides, dk_strides, dv_strides;
  const float *dlse;     // strides of lse; NULL: 0
  float *dsinks;         // (Hq); NULL: not wanted
  float *drel_logits;    // strides of rel_logits; NULL: not wanted
  float *dalibi_slopes;  // (Hq), or (num_seqs, Hq) with alibi_batch_stride; NULL: not wanted

  // Scratch. dq_sum is summed by atomic additions in the order of mma_m16n8k16's results: for each 16 rows and each 8
  // columns the four numbers of every lane, (Hq, padded_rows / 16, sum_columns / 8, 32, 4). NULL without dq.
  float *dq_sum;
  int64_t dq_sum_rows;  // not 0: there are two of them, (2, Hq, padded_rows, ..), which postprocess adds up
  // The same of dk and dv, where the query heads of a group are of a CTA each (head_parts): (tiles, key_tile / 16,
  // sum_columns / 8, 32, 4), and with sum_columns_v. Else NULL.
  float *dk_sum, *dv_sum;
  // With num_pieces, in num_slots places, of every CTA one, or two: what it leaves of dk, then of dv, of a tile that
  // another one ends, in the same order as dk_sum; and for each warp whether it has. How far the sums of dq are. Else
  // NULL.
  float *piece_sums;
  int32_t num_slots;      // places for what CTAs leave
  int32_t *piece_flags;   // (num_slots, warps)
  int32_t *added_blocks;  // (num_seqs, Hq), blocks of rows whose dq has been added, of all tiles
  int32_t head_blocks;    // so many when a head's dq is complete
  // With `deterministic`: (Hq, num_row_blocks) for each sum of dq, which CTAs have added to blocks (turns.cuh). Else
  // NULL.
  int32_t *dq_turns;
  float *row_lse;    // (Hq, padded_rows) lse in units of log2; +inf where no key counts
  float *row_delta;  // (Hq, padded_rows) sum of dout * out, minus dlse
  int32_t sum_columns, sum_columns_v, padded_rows, row_block;
  int32_t num_row_blocks;  // of a head: padded_rows / row_block; without cu_seqlens_q: seq_row_blocks a sequence
  int32_t seq_row_blocks;
  int32_t key_tile;                     // keys of a CTA
  int32_t num_key_tiles;                // of a KV head of one sequence, or with cu_seqlens_k of all sequences (bound)
  int32_t section_heads;                // heads whose tiles take turns
  int32_t head_parts;                   // CTAs that share a tile of keys and the query heads of its group
  int32_t num_pieces;                   // CTAs that have equal parts of all tiles (pieces.cuh); 0: a CTA has one tile
  Divisor head_length;                  // positions of the tiles of a KV head in the row of all tiles
  int32_t piece_length, longer_pieces;  // positions of a CTA; the first longer_pieces of them have one more
  // With num_pieces in turns (walks.cuh): walks of some query heads of a group, so many of them, and parts of a walk,
  // of a CTA each.
  int32_t num_walks, walk_heads, walk_parts;

  // What the sums kernel adds up in its order, so that a run gives the bits of the one before; NULL: not wanted.
  float *sink_sums;   // (Hq, num_row_blocks, warps of preprocess)
  float *slope_sums;  // (Hq, key_slots, slot_warps): a number of each warp of a key tile's CTA (first_key_slot())
  int32_t key_slots, slot_warps;  // slot_warps: of the main kernel's CTAs

  float scale_log2;  // softmax_scale times log2(e); softmax_scale itself is in natural units here
  float cap_log2;    // softcap times log2(e)
  float cap_factor;  // softmax_scale times 2 log2(e) / softcap: e^(2 score / softcap) as a power of two
  DropoutArguments dropout;
  // With ScoreMod::dropout row_lse and row_delta make P times the scale of dropout, whose own scale is 1 then: what is
  // added to the one, and what the other one is multiplied by. Else 0 and 1.
  float lse_shift, delta_scale;
};

}  // namespace flashspark
