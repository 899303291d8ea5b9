#include "cuda/backward_division.hpp"

#include <algorithm>
#include <limits>

#include "mod.hpp"

namespace flashspark::cuda {
namespace {

// In rows, what a CTA takes for sums in memory that several CTAs add to (docs/experiments.md E92).
constexpr int64_t kRowsOfSums = 128;
// In rows, too, how far a CTA that adds to dq in turns stays behind the one before it. What a row takes with turns, in
// a loop of their own or beside the other one.
constexpr int64_t kRowsOfTurn = 170;
constexpr double kTurnCost = 1.05, kTurnCostAsAsked = 1.2;
// Walks are for grids whose CTAs begin together, about.
constexpr int64_t kWavesOfWalks = 2;
constexpr double kNever = 1e3;
// As many CTAs an SM are few: their rows are in L2 whatever their order.
constexpr int64_t kFewCtas = 4;
// How far at least a CTA stays behind the one before it in turns of a few steps.
constexpr int64_t kRowsBehind = 112;
// Heads that take turns else: each SM gets about as much work as the others, and the rows of a few heads stay in L2
// (docs/experiments.md E91).
constexpr int64_t kSectionHeads = 8;

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

// Of a head: of a tile of keys, or of a pair of them.
int64_t turns_of_walk(const Params &p, const BackwardTile &tile) {
  const int64_t turns = ceil_div(p.max_seqlen_q, tile.rows) / kWalkTurnBlocks;
  const int64_t of_tile = tile.keys() / (tile.rows * kWalkTurnBlocks);
  return p.causal != 0 ? 2 * turns - (ceil_div(p.max_seqlen_k, tile.keys()) - 1) * of_tile : turns;
}

// What there is to divide.
struct Work {
  const Params &p;
  const BackwardTile &tile;
  VisitedRows rows;
  int64_t group, places;  // places of CTAs on the SMs
  int64_t rows_of_tile;   // that take as long as to begin and end a tile

  Work(const Params &params, const BackwardTile &of, const Machine &machine)
      : p(params),
        tile(of),
        rows(visited_rows(params, of)),
        group(params.num_heads_q / params.num_heads_kv),
        places(int64_t{machine.sm_count} * of.min_ctas),
        rows_of_tile(int64_t{of.tile_blocks()} * of.rows) {}

  bool in_turns() const { return p.deterministic != 0 && tile.order != SumOrder::walks; }
  double cost_of_rows(double n) const { return n * static_cast<double>(tile.keys() * tile.min_ctas); }
  double per_place(int64_t n) const { return static_cast<double>(n) / static_cast<double>(places); }
};

// How long CTAs that add to dq in turns wait for each other. Where a mask makes tiles differ none waits, but the
// shortest come first, and at the end a few have the longest.
double rows_waited(const Work &w, int64_t ctas, int64_t heads, int64_t longest) {
  if (tiles_differ(w.p) || !lengths_are_equal(w.p)) return static_cast<double>(longest) / 2;
  const int64_t heads_at_once = ctas <= kFewCtas * w.places ? heads : std::min<int64_t>(heads, kSectionHeads);
  const int64_t of_head = std::min(w.rows.tiles / w.p.num_seqs, std::max<int64_t>(1, w.places / heads_at_once));
  return static_cast<double>((of_head - 1) * kRowsOfTurn);
}

// CTAs take turns on the SMs. Where they differ in length, the longest start first, and shorter ones fill the gaps.
BackwardDivision whole_tiles(const Work &w, int64_t parts) {
  const int64_t more = w.rows_of_tile + (parts > 1 ? kRowsOfSums : 0), heads = w.p.num_heads_kv * parts;
  const int64_t ctas = w.rows.tiles * heads, longest = w.rows.longest * w.group / parts + more;
  const double all = w.per_place(w.p.num_heads_kv * (w.rows.all * w.group + w.rows.tiles * parts * more));
  double rows = tiles_differ(w.p) ? std::max(static_cast<double>(longest), all)
                                  : static_cast<double>(ceil_div(ctas, w.places) * longest);
  const double turn_cost = w.tile.order == SumOrder::turns ? kTurnCost : kTurnCostAsAsked;
  if (w.in_turns()) rows = turn_cost * (rows + rows_waited(w, ctas, heads * w.p.num_seqs, longest));
  return {parts, 0, 1, w.cost_of_rows(rows)};
}

// Equal parts of all tiles: tiles of equal length in so many pieces each, of which a CTA has one; or all SMs have equal
// parts, of which most have two pieces. Pieces are worth what it takes to join them.
void try_pieces(const Work &w, BackwardDivision &best) {
  constexpr double kGain = 0.95;
  const int64_t rows_of_piece = 3 * w.rows_of_tile, tiles = w.rows.tiles * w.p.num_heads_kv;
  const int64_t head_rows = (w.rows.all * w.group + w.rows.tiles * w.rows_of_tile) / w.p.num_seqs;
  const double whole = best.cost;
  const auto take = [&](int64_t pieces, double rows) {
    const double cost = w.cost_of_rows(rows + static_cast<double>(w.rows_of_tile));
    if (cost < kGain * whole && cost < best.cost) best = {1, pieces, head_rows / w.tile.rows, cost};
  };
  const int64_t of_tile = w.places / std::max<int64_t>(1, tiles), of_longest = w.rows.longest * w.group;
  if (!tiles_differ(w.p) && of_tile > 1 && of_longest >= of_tile * rows_of_piece)
    take(tiles * of_tile, static_cast<double>(of_longest + w.rows_of_tile) / static_cast<double>(of_tile));
  const int64_t rows = head_rows * w.p.num_heads_kv * w.p.num_seqs;
  const int64_t pieces = std::min(w.places, std::max<int64_t>(1, rows / rows_of_piece));
  take(pieces, static_cast<double>(rows) / static_cast<double>(pieces) + static_cast<double>(w.rows_of_tile));
}

// Walks of some query heads of a group (kernels/backward/walks.cuh), and CTAs with equal parts of them.
BackwardDivision divide_walks(const Work &w) {
  const Params &p = w.p;
  const bool has_pairs = p.causal != 0;
  const int64_t tiles = w.rows.tiles / p.num_seqs, walks = has_pairs ? ceil_div(tiles, 2) : tiles;
  const int64_t turns = ceil_div(p.max_seqlen_q, w.tile.rows) / kWalkTurnBlocks;
  BackwardDivision best{.cost = std::numeric_limits<double>::max()};
  for (int64_t n = 1; n <= w.group; ++n) {
    // Of equals that with the fewest parts without a mask, where parts bring tiles closer together; else that with the
    // most heads, whose CTAs leave the fewest sums.
    const int64_t heads = has_pairs ? w.group + 1 - n : n;
    if (w.group % heads != 0) continue;
    const int64_t all = walks * p.num_seqs * p.num_heads_q / heads, length = heads * turns_of_walk(p, w.tile);
    int64_t parts = std::max<int64_t>(1, std::min(w.places / all, has_pairs ? length : turns / tiles));
    // Of more heads the parts of other pairs, which are cut elsewhere, would be there before their turn.
    if (has_pairs && heads > 2) parts = 1;
    const int64_t turns_of_part = has_pairs ? ceil_div(length, parts) : heads * ceil_div(turns, parts);
    if (heads > 1 && turns_of_part > kMostWalkTurns) continue;
    const int64_t rows = turns_of_part * kWalkTurnBlocks * w.tile.rows + (has_pairs ? 2 : 1) * w.rows_of_tile;
    const int64_t waves = ceil_div(all * parts, w.places);
    const double row_cost = waves > kWavesOfWalks ? kTurnCost * kNever : kTurnCost;
    const double cost = w.cost_of_rows(row_cost * static_cast<double>(waves * rows));
    if (cost >= best.cost) continue;
    const int64_t head_rows = (w.rows.all * w.group + w.rows.tiles * w.rows_of_tile) / p.num_seqs;
    best = {1, all * parts, head_rows / w.tile.rows, cost, walks, heads, parts};
  }
  return best;
}

}  // namespace

int64_t key_tiles_of_head(const Params &p, int64_t keys) {
  const int64_t of_longest = ceil_div(p.max_seqlen_k, keys);
  return is_varlen_k(p) ? std::min(of_longest * p.num_seqs, p.total_k / keys + p.num_seqs) : of_longest;
}

int64_t section_heads(const Params &p, const BackwardTile &tile, int64_t ctas, int64_t places, int64_t heads) {
  // The tiles with the most work of block lists may be anywhere in a section.
  if (ctas <= kFewCtas * places || has_block_lists(p)) return heads;
  // With two sums of dq as few as can be, so that their rows are in L2 however far apart their CTAs are; but each CTA
  // needs rows of its own (docs/experiments.md E112).
  if (const int64_t sums = tile.dq_sums(); sums > 1)
    return std::clamp<int64_t>(ceil_div(places * kRowsBehind, sums * std::max<int64_t>(1, p.max_seqlen_q)), 1,
                               kSectionHeads);
  // In turns, under a mask, the CTAs of a head that begin together follow each other over the same rows.
  if (p.deterministic != 0 && tiles_differ(p) && tile.keys() >= 128) return 1;
  return kSectionHeads;
}

bool fits_walks(const BackwardInstance &instance, const Params &p) {
  const BackwardTile &tile = instance.sm_120f;
  const int64_t blocks = ceil_div(p.max_seqlen_q, tile.rows), tiles = ceil_div(p.max_seqlen_k, tile.keys());
  if (!lengths_are_equal(p) || p.window_left >= 0 || p.window_right >= 0 || blocks % kWalkTurnBlocks != 0) return false;
  // Each tile begins with other rows, a turn at least from those of the next one.
  const bool has_room = p.causal != 0 ? p.max_seqlen_q == p.max_seqlen_k : blocks / kWalkTurnBlocks >= tiles;
  const bool has_numbers = 2 * p.num_heads_q * p.num_seqs * blocks * tile.rows <= INT32_MAX;  // of rows of both sums
  return has_room && has_numbers && turns_of_walk(p, tile) <= kMostWalkTurns;
}

BackwardDivision divide_backward(const BackwardInstance &instance, const Params &p, const Machine &machine) {
  const Work w(p, instance.tile(machine.arch), machine);
  if (w.tile.order == SumOrder::walks) return divide_walks(w);
  BackwardDivision best = whole_tiles(w, 1);
  // Two numbers have one sum, in whatever order they come.
  const int64_t most_parts = p.deterministic == 0 ? w.group : w.group % 2 == 0 ? 2 : 1;
  if (most_parts > 1) {
    if (const BackwardDivision parts = whole_tiles(w, most_parts); parts.cost < best.cost) best = parts;
  }
  // The kernels with the user's functions have whole tiles, too.
  const bool can_have_pieces = lengths_are_equal(p) && !is_of_functions(instance.index) &&
                               instance.score_mod != ScoreMod::native && w.tile.sharing != KeySharing::columns &&
                               !w.in_turns();
  if (can_have_pieces && w.rows.tiles * p.num_heads_kv <= kFewCtas * w.places) try_pieces(w, best);
  return best;
}

}  // namespace flashspark::cuda
