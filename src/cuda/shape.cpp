#include "cuda/shape.hpp"

#include <algorithm>

#include "dtype.hpp"

namespace flashspark::cuda {
namespace {

bool needs_score_mod(const Params &p) {
  return p.softcap > 0 || p.rel_logits != nullptr || p.alibi_slopes != nullptr || p.rswa_window > 0 ||
         p.prefix_mode != FLASHSPARK_PREFIX_NONE || p.attention_chunk > 0 ||
         (is_paged(p) && p.page_size % kGroupRows != 0);
}

int64_t key_rows(const Params &p) {
  // Without pages there is nothing that a page number could name.
  if (is_paged(p)) return p.num_pages == 0 ? 0 : std::min(p.num_page_slots * p.page_size, kMaxTokens);
  return is_varlen_k(p) ? p.total_k : p.max_seqlen_k;
}

}  // namespace

Shape shape_of(const Params &p) {
  const int64_t group = p.num_heads_q / p.num_heads_kv;
  const bool varlen_q = is_varlen_q(p);
  constexpr int64_t kColumnStep = 16;  // columns of an MMA fragment pair, in which partial results are stored
  return {.num_seqs = p.num_seqs,
          .num_heads_kv = p.num_heads_kv,
          .head_dim = p.head_dim,
          .head_dim_v = p.head_dim_v,
          .max_seqlen_q = p.max_seqlen_q,
          .max_seqlen_k = p.max_seqlen_k,
          .group = group,
          .rows = p.max_seqlen_q * group,
          .tokens = varlen_q ? p.total_q : p.num_seqs * p.max_seqlen_q,
          .seq_heads = p.num_seqs * p.num_heads_kv,
          .grid_heads = varlen_q ? p.num_heads_kv : p.num_seqs * p.num_heads_kv,
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
          .needs_score_mod = needs_score_mod(p)};
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
