// Stream-K (Osama et al., 2023, arXiv:2301.03598): short rows against many keys, of lengths that only the device knows.
#include <algorithm>

#include "cuda/heuristics.hpp"
#include "cuda/planner.hpp"

namespace flashspark::cuda {

bool uses_stream_k(const Shape &shape, const Instance &instance, const Machine &machine) {
  if (!supports_stream_k(instance) || shape.num_splits != 0 || shape.deterministic || shape.block_sparse) return false;
  const Heuristics &h = heuristics_of(machine.arch);
  if (shape.max_seqlen_k < h.stream_k_keys_per_token * shape.max_seqlen_q) return false;
  const Tile &tile = instance.tile(tiles_of(machine));
  const int64_t row_tiles = ceil_div(shape.rows, tile.max_rows()), keys = shape.visible_keys(shape.rows);
  const int64_t reread_bytes = row_tiles * shape.seq_heads * keys * shape.key_bytes;
  const int64_t l2_bytes = machine.l2_bytes * h.stream_k_reread_l2_percent / 100;
  if (row_tiles > h.stream_k_max_row_tiles || (row_tiles > 1 && reread_bytes > l2_bytes)) return false;
  // Positions have 32 bits, however long the device says that sequences are.
  const int64_t most_key_tiles = shape.key_rows / tile.keys + 1;
  return ceil_div(keys, tile.keys) > 1 && 2 * shape.seq_heads * row_tiles * most_key_tiles <= kMaxTokens;
}

StreamKLimits stream_k_limits(const Shape &shape, const Config &config, const Machine &machine) {
  const Tile &tile = *config.tile;
  const Heuristics &h = heuristics_of(machine.arch);
  // CTAs that compute parts of a wide value read the same keys, and should run at the same time: E52.
  const int64_t ctas = std::max<int64_t>(1, config.slots / config.value_ctas);
  const int64_t rows = std::min<int64_t>(shape.rows, tile.max_rows());
  const int64_t min_keys = h.min_range_keys * std::max<int64_t>(1, rows / h.min_range_rows);
  int32_t min_tiles_shift = 0;
  while (((int64_t{1} << min_tiles_shift) * tile.keys) < min_keys) ++min_tiles_shift;
  const int64_t small_keys =
      config.instance->tiling == Tiling::decode
          ? std::min<int64_t>(h.small_decode_keys_per_column * config.instance->head_dim, h.max_small_decode_keys)
          : std::min<int64_t>(h.small_short_q_tiles * tile.keys, h.max_small_short_q_keys);
  // With one CTA an SM all problems are as small as they can be.
  const int64_t small_tiles = ctas > machine.sm_count ? small_keys / tile.keys * machine.sm_count : 0;
  return {.ctas = static_cast<int32_t>(ctas),
          .min_tiles_shift = min_tiles_shift,
          .small_problem_ctas = machine.sm_count,
          .small_problem_tiles = static_cast<int32_t>(small_tiles),
          .tile_start_cost = static_cast<int32_t>(h.tile_start_cost)};
}

int32_t max_key_rows(const Shape &shape, const ForwardArguments &a) {
  if (a.tile_rows == 0) return a.key_rows;
  const int64_t row_tiles = shape.seq_heads * ceil_div(shape.rows, a.tile_rows);
  const int64_t key_tiles = kMaxTokens / (2 * row_tiles) - 1;
  return static_cast<int32_t>(std::min(kMaxTokens, key_tiles * a.tile_keys));
}

int32_t metadata_fingerprint(const ForwardArguments &a) {
  // FNV-1a, by Fowler, Noll and Vo.
  uint32_t hash = 2166136261u;
  const auto add = [&hash](int64_t value) { hash = (hash ^ static_cast<uint32_t>(value)) * 16777619u; };
  for (const int32_t n : {a.tile_rows, a.tile_keys, a.num_seqs, a.num_heads_kv, a.window_left, a.window_right,
                          a.stream_k.ctas, a.stream_k.min_tiles_shift, a.stream_k.small_problem_ctas,
                          a.stream_k.small_problem_tiles, a.stream_k.tile_start_cost})
    add(n);
  add(a.group.value);
  add(a.attention_chunk);
  for (const int32_t *lengths :
       {a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q, a.seqused_k, a.leftpad_k, a.kv_batch_index, a.causal_per_seq})
    add(lengths != nullptr);
  // Bounds and modes count only where no array has a sequence's own: a graph keeps the bounds it was captured with.
  if (a.causal_per_seq == nullptr) add(a.causal);
  if (a.cu_seqlens_q == nullptr && a.seqused_q == nullptr) add(a.max_seqlen_q);
  if (a.cu_seqlens_k == nullptr && a.seqused_k == nullptr) add(a.max_seqlen_k);
  return static_cast<int32_t>(hash);
}

}  // namespace flashspark::cuda
