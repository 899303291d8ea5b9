#include "cuda/shape.hpp"

#include <algorithm>

#include "attention/dropout.hpp"
#include "dtype.hpp"
#include "mod.hpp"

namespace flashspark::cuda {
namespace {

int32_t function_words(const Params &p, bool wide_positions) {
  int32_t words = 0;
  for (const flashspark_mod *mod : {p.score_mod.mod, p.mask_mod.mod}) {
    if (mod != nullptr) words += mod->row_words(wide_positions);
  }
  return words + (p.dropout_p > 0 ? kDropoutRowWords : 0);
}

bool needs_score_mod(const Params &p) {
  return p.softcap > 0 || has_built_in_biases_or_masks(p) || (is_paged(p) && p.page_size % kGroupRows != 0);
}

int64_t key_rows(const Params &p) {
  // Without pages there is nothing that a page number could name.
  if (is_paged(p)) return p.num_pages == 0 ? 0 : std::min(p.num_page_slots * p.page_size, kMaxTokens);
  return is_varlen_k(p) ? p.total_k : p.max_seqlen_k;
}

// Query heads that are packed into one row tile: those of a KV head, unless they have block lists of their own, or a
// row tile might not hold whole tokens.
int64_t packed_group(const Params &p) {
  const int64_t group = p.num_heads_q / p.num_heads_kv;
  constexpr int64_t kRowsOfSmallestTile = 16;
  const bool whole = kRowsOfSmallestTile % group == 0;
  return has_block_lists(p) && (p.block_heads > 1 || !whole) ? 1 : group;
}

}  // namespace

bool has_built_in_biases_or_masks(const Params &p) {
  return p.rel_logits != nullptr || p.alibi_slopes != nullptr || p.rswa_window > 0 ||
         p.prefix_mode != FLASHSPARK_PREFIX_NONE || p.attention_chunk > 0;
}

Shape shape_of(const Params &p) {
  const int64_t group = packed_group(p), num_heads_kv = p.num_heads_q / group;
  const bool wide = has_wide_positions(p.max_seqlen_q, p.max_seqlen_k);
  const bool varlen_q = is_varlen_q(p);
  constexpr int64_t kColumnStep = 16;  // columns of an MMA fragment pair, in which partial results are stored
  return {.num_seqs = p.num_seqs,
          .num_heads_kv = num_heads_kv,
          .head_dim = p.head_dim,
          .head_dim_v = p.head_dim_v,
          .max_seqlen_q = p.max_seqlen_q,
          .max_seqlen_k = p.max_seqlen_k,
          .group = group,
          .rows = p.max_seqlen_q * group,
          .tokens = varlen_q ? p.total_q : p.num_seqs * p.max_seqlen_q,
          .seq_heads = p.num_seqs * num_heads_kv,
          .grid_heads = varlen_q ? num_heads_kv : p.num_seqs * num_heads_kv,
          .key_rows = key_rows(p),
          .key_bytes = (p.head_dim + p.head_dim_v) * static_cast<int64_t>(dtype_size(p.k.dtype)),
          .partial_columns = ceil_div(p.head_dim_v, kColumnStep) * kColumnStep,
          .window_left = p.window_left,
          .window_right = p.window_right,
          .attention_chunk = p.attention_chunk,
          .num_splits = p.num_splits,
          .varlen_q = varlen_q,
          .causal = p.causal != 0,
          .prefix = p.prefix_mode != FLASHSPARK_PREFIX_NONE,
          .deterministic = p.deterministic != 0,
          .dequantizes_kv = p.k.dtype == FLASHSPARK_FLOAT8_E4M3,
          .needs_score_mod = needs_score_mod(p),
          .has_functions = has_functions(p) || has_block_lists(p) || p.dropout_p > 0,
          .block_sparse = has_block_lists(p),
          .function_words = function_words(p, wide),
          .wide_positions = wide,
          .block_size_q = p.block_size_q,
          .block_size_k = p.block_size_k,
          .left_padded = p.leftpad_k != nullptr};
}

int64_t Shape::num_m_blocks(int64_t tile_rows) const {
  const int64_t of_longest = ceil_div(rows, tile_rows);
  if (!varlen_q) return of_longest;
  // Sequences lie end to end, and each wastes less than one tile.
  return std::min(of_longest * num_seqs, tokens * group / tile_rows + num_seqs);
}

int64_t Shape::visible_keys(int64_t tile_tokens) const {
  if (prefix) return max_seqlen_k;
  const int64_t in_chunks = attention_chunk > 0 ? std::min(attention_chunk, kMaxTokens) + tile_tokens : kMaxTokens;
  const int64_t keys = std::min(max_seqlen_k, in_chunks);
  if (window_left < 0 || (window_right < 0 && !causal)) return keys;
  const int64_t right = causal ? 0 : window_right;
  return std::min(keys, std::min(window_left, kMaxTokens) + right + tile_tokens);
}

}  // namespace flashspark::cuda
