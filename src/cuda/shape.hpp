// The facts of a problem that plans and arguments are made of, worked out once a call and handed on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.hpp"

namespace flashspark::cuda {

// Rows and keys are counted in 32 bits on the device. Windows that reach further than any sequence are open.
inline constexpr int64_t kMaxTokens = int64_t{1} << 30;

// Whether positions go beyond 2^23, up to which their differences are exact as floats (graph::CudaSourceOptions).
inline bool has_wide_positions(int64_t seqlen_q, int64_t seqlen_k) {
  return std::max(seqlen_q, seqlen_k) > int64_t{1} << 23;
}

// Neighbouring rows of a tile that look up one page (TileLoader).
inline constexpr int64_t kGroupRows = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Shape {
  int64_t num_seqs, num_heads_kv, head_dim, head_dim_v, max_seqlen_q, max_seqlen_k;
  int64_t group;            // query heads a KV head
  int64_t rows;             // of the longest sequence; a row is one (query token, query head of the group)
  int64_t tokens;           // query tokens of all sequences
  int64_t seq_heads;        // (sequence, KV head) pairs
  int64_t grid_heads;       // the same, or KV heads alone with cu_seqlens_q, where row tiles count all sequences
  int64_t key_rows;         // rows of k that there are: of all sequences with cu_seqlens_k, else of each
  int64_t key_bytes;        // K and V of one key of one KV head
  int64_t partial_columns;  // of one row of a partial result: head_dim_v up to a multiple of 16
  int64_t window_left, window_right, attention_chunk;  // as in Params
  int32_t num_splits;
  bool varlen_q, causal, prefix, deterministic;
  bool dequantizes_kv;   // k and v are e4m3, which the kernels turn into fp16
  bool needs_score_mod;  // only the instances with ScoreMod::native can run it
  // User's functions, block lists or dropout: the kernel is compiled at run time, and keeps so many words of each row.
  bool has_functions, block_sparse;
  int32_t function_words;
  bool wide_positions;  // beyond what floats hold exactly
  int64_t block_size_q, block_size_k;
  bool left_padded;

  bool is_empty() const { return num_seqs == 0 || tokens == 0 || rows == 0; }

  // The most row tiles that a grid has for each of grid_heads.
  int64_t num_m_blocks(int64_t tile_rows) const;

  // The most keys that a row tile of so many query tokens can visit.
  int64_t visible_keys(int64_t tile_tokens) const;
};

Shape shape_of(const Params &p);

// ALiBi, rel_logits, PrefixLM ranges, R-SWA or chunks.
bool has_built_in_biases_or_masks(const Params &p);

}  // namespace flashspark::cuda
