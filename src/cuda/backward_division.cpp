#include "cuda/backward_division.hpp"

#include <algorithm>

namespace flashspark::cuda {
namespace {

// In rows, what a CTA takes for sums in memory that several CTAs add to (docs/experiments.md E92).
constexpr int64_t kRowsOfSums = 128;

// Rows of a query head that the tiles of a KV head and sequence visit, whole blocks of them.
struct VisitedRows {
  int64_t longest = 0, all = 0, tiles = 0;
};

bool lengths_are_equal(const Params &p) {
  return !is_varlen_q(p) && !is_varlen_k(p) && p.seqused_q == nullptr && p.seqused_k == nullptr &&
         p.causal_per_seq == nullptr;
}
bool tiles_differ(const Params &p) {
  return p.causal != 0 || p.window_left >= 0 || p.window_right >= 0;
}

VisitedRows visited_rows(const Params &p, const BackwardTile &tile) {
  VisitedRows v;
  v.longest = p.max_seqlen_q;
  if (!lengths_are_equal(p)) {
    v.tiles = is_varlen_k(p) ? ceil_div(p.total_k, tile.keys()) : ceil_div(p.max_seqlen_k, tile.keys()) * p.num_seqs;
    v.all = v.tiles * p.max_seqlen_q / (tiles_differ(p) || p.causal_per_seq != nullptr ? 2 : 1);
    return v;
  }
  v.longest = 0;
  const int64_t shift = p.max_seqlen_k - p.max_seqlen_q, open = p.max_seqlen_q + p.max_seqlen_k;
  const int64_t left = p.window_left >= 0 ? p.window_left : open;
  const int64_t right = p.causal != 0 ? 0 : p.window_right >= 0 ? p.window_right : open;
  for (int64_t first = 0; first < p.max_seqlen_k; first += tile.keys()) {
    const int64_t last = std::min(first + tile.keys(), p.max_seqlen_k) - 1;
    const int64_t begin = std::max<int64_t>(0, first - shift - right),
                  end = std::min(p.max_seqlen_q, last - shift + left + 1);
    const int64_t rows = begin < end ? (ceil_div(end, tile.rows) - begin / tile.rows) * tile.rows : 0;
    v.longest = std::max(v.longest, rows);
    v.all += rows;
    v.tiles += 1;
  }
  v.all *= p.num_seqs, v.tiles *= p.num_seqs;
  return v;
}

}  // namespace

int64_t key_tiles_of_head(const Params &p, int64_t keys) {
  const int64_t of_longest = ceil_div(p.max_seqlen_k, keys);
  return is_varlen_k(p) ? std::min(of_longest * p.num_seqs, p.total_k / keys + p.num_seqs) : of_longest;
}

// CTAs take turns on the SMs. Where they differ in length, the longest start first, and shorter ones fill the gaps.
BackwardDivision divide_backward(const BackwardInstance &instance, const Params &p, const Machine &machine) {
  const BackwardTile &tile = instance.tile(machine.arch);
  const int64_t group = p.num_heads_q / p.num_heads_kv, places = int64_t{machine.sm_count} * tile.min_ctas;
  const VisitedRows v = visited_rows(p, tile);
  const int64_t rows_of_tile = int64_t{tile.tile_blocks()} * tile.rows;
  const auto cost_of_rows = [&](double rows) { return rows * static_cast<double>(tile.keys() * tile.min_ctas); };
  const auto per_place = [&](int64_t rows) { return static_cast<double>(rows) / static_cast<double>(places); };
  const auto whole_tiles = [&](int64_t parts) {
    const int64_t more = rows_of_tile + (parts > 1 ? kRowsOfSums : 0);
    const int64_t ctas = v.tiles * p.num_heads_kv * parts, longest = v.longest * group / parts + more;
    const double all = per_place(p.num_heads_kv * (v.all * group + v.tiles * parts * more));
    const double rows = tiles_differ(p) ? std::max(static_cast<double>(longest), all)
                                        : static_cast<double>(ceil_div(ctas, places) * longest);
    return BackwardDivision{parts, 0, 1, cost_of_rows(rows)};
  };
  BackwardDivision best = whole_tiles(1);
  if (p.deterministic != 0) return best;
  if (group > 1) {
    if (const BackwardDivision parts = whole_tiles(group); parts.cost < best.cost) best = parts;
  }
  // Few CTAs an SM, whose rows are in L2 whatever their order, and pieces that are worth what it takes to join them.
  constexpr int64_t kFewCtas = 4;
  const int64_t rows_of_piece = 3 * rows_of_tile;
  constexpr double kGain = 0.95;
  const bool can_have_pieces =
      lengths_are_equal(p) && instance.score_mod != ScoreMod::native && tile.sharing != KeySharing::columns;
  if (!can_have_pieces || v.tiles * p.num_heads_kv > kFewCtas * places) return best;
  const BackwardDivision whole = best;
  const int64_t head_rows = (v.all * group + v.tiles * rows_of_tile) / p.num_seqs;
  const auto take_pieces = [&](int64_t pieces, double rows) {
    const double cost = cost_of_rows(rows + static_cast<double>(rows_of_tile));
    if (cost < kGain * whole.cost && cost < best.cost) best = {1, pieces, head_rows / tile.rows, cost};
  };
  // Tiles of equal length in so many pieces each, of which a CTA has one; and all SMs with equal parts, of which most
  // have two pieces.
  const int64_t tiles = v.tiles * p.num_heads_kv, of_tile = places / std::max<int64_t>(1, tiles);
  if (!tiles_differ(p) && of_tile > 1 && v.longest * group >= of_tile * rows_of_piece)
    take_pieces(tiles * of_tile, static_cast<double>(v.longest * group + rows_of_tile) / static_cast<double>(of_tile));
  const int64_t rows = head_rows * p.num_heads_kv * p.num_seqs;
  const int64_t pieces = std::min(places, std::max<int64_t>(1, rows / rows_of_piece));
  take_pieces(pieces, static_cast<double>(rows) / static_cast<double>(pieces) + static_cast<double>(rows_of_tile));
  return best;
}

}  // namespace flashspark::cuda
