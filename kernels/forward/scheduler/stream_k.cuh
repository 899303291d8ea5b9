// Stream-K (Osama et al. 2023, arXiv:2301.03598): even ranges of all work, found on the device from the lengths. The
// host knows bounds alone, and one long sequence among short ones would leave most of a grid of even splits idle.
//
// Positions 0, 1, ... count key tiles: of every sequence, of each of its KV heads, of each of its row tiles; and before
// each row tile `tile_start_cost` positions that stand for the time its start takes. Each CTA takes a range of
// positions. Where several ranges meet in a row tile, each CTA computes a partial result, and the combine kernel, which
// finds the same ranges from the same lengths, joins them. Two sequences of 6 and 8 key tiles, start cost 2, three
// CTAs:
//
//   position   0  1  2  3  4  5 : 6  7  8  9 10 11 :12 13 14 15 16 17
//   tile       s  s A0 A1 A2 A3 :A4 A5  s  s B0 B1 :B2 B3 B4 B5 B6 B7
//              <----- CTA 0 ---->:<---- CTA 1 ----->:<---- CTA 2 ---->
//
//   CTA 0 begins A: slot 0.  CTA 1 goes on with A: slot 3, and begins B: slot 1.  CTA 2 goes on with B: slot 4.
#pragma once

#include "attention/mask.cuh"
#include "forward/scheduler/single_tile.cuh"

namespace flashspark {

// Positions cut into periods, each of which is cut into `ctas` even ranges: one period for all, or where all row tiles
// have equally many keys one that ends with a row tile, so that no range goes on in another.
struct Decomposition {
  int32_t total, period, ctas;
  int32_t tile_start_cost;  // positions before the keys of each row tile
  // stride > 0: ranges are of whole row tiles, all of `tile_positions` positions; range n has those at
  // n * tile_positions, and `stride` positions further, and so on.
  int32_t stride, tile_positions;

  // The positions of range n; empty for CTAs beyond the last range.
  FLASHSPARK_DEVICE Interval contiguous_range(int32_t n) const {
    const int32_t of_period = quotient(n, ctas), inside = n - of_period * ctas;
    const int32_t each = quotient(period, ctas), more = period - each * ctas;
    const int32_t begin = of_period * period + inside * each + min_of(inside, more);
    return {min_of(total, begin), min_of(total, begin + each + (inside < more ? 1 : 0))};
  }
  // From its first position to behind its last; with a stride, row tiles of other ranges lie in between.
  FLASHSPARK_DEVICE Interval range_of(int32_t n) const {
    if (stride == 0) return contiguous_range(n);
    return n * tile_positions < stride ? Interval{n * tile_positions, total} : Interval{0, 0};
  }
  // The CTA whose contiguous range holds a position.
  FLASHSPARK_DEVICE int32_t cta_of(int32_t position) const {
    const int32_t of_period = quotient(position, period), inside = position - of_period * period;
    const int32_t each = quotient(period, ctas), more = period - each * ctas;
    const int32_t longer = more * (each + 1);  // positions of the ranges that hold one more
    return of_period * ctas + (inside < longer ? quotient(inside, each + 1) : more + quotient(inside - longer, each));
  }
};

// `total` > 0 key tiles in `row_tiles` row tiles; of_each > 0: so many in each of them.
FLASHSPARK_DEVICE Decomposition decompose(int32_t total, int32_t row_tiles, int32_t of_each,
                                          const StreamKLimits &limits) {
  const int32_t most = total < limits.small_problem_tiles ? limits.small_problem_ctas : limits.ctas;
  const int32_t used = min_of(most, max_of(1, total >> limits.min_tiles_shift));
  // Row tiles of equal length: several ranges a row tile, or several row tiles a range, unless the longest range is
  // more than a twentieth above the mean.
  if (of_each > 0 && row_tiles <= used) {
    const int32_t ranges = quotient(used, row_tiles);
    if (ranges * row_tiles * 21 >= used * 20) return {total, of_each, ranges, 0, 0, 0};
  } else if (of_each > 0) {
    const int32_t together = quotient(row_tiles + used - 1, used);
    // Neighbouring CTAs take neighbouring row tiles, the KV heads of one sequence, whose rows lie side by side in
    // memory (docs/experiments.md E49).
    if (row_tiles * 21 >= together * used * 20)
      return {total, together * of_each, 1, 0, quotient(row_tiles + together - 1, together) * of_each, of_each};
  }
  // Every CTA starts one row tile, whether its range begins there or in the middle: only further starts cost more.
  const int32_t tile_start_cost = row_tiles > used / 2 ? limits.tile_start_cost : 0;
  return {total + tile_start_cost * row_tiles, total + tile_start_cost * row_tiles, used, tile_start_cost, 0, 0};
}

// The CTAs that compute a row tile at positions [begin, begin + positions), and where their partial results lie: a CTA
// has one slot for the row tile that its range begins in the middle of, and one for the row tile that it begins.
struct Contributors {
  int32_t first_cta, count;

  FLASHSPARK_DEVICE int32_t partial_slot(int32_t n, int32_t num_ctas) const {
    return n == 0 ? first_cta : num_ctas + first_cta + n - 1;
  }
};
FLASHSPARK_DEVICE Contributors contributors_of(const Decomposition &decomposition, int32_t begin, int32_t positions) {
  const int32_t first = decomposition.cta_of(begin);
  return {first, decomposition.cta_of(begin + positions - 1) - first + 1};
}

// What a lane knows of one of 32 sequences.
struct SequenceWork {
  int32_t tokens, q_row;
  int32_t first_tile, tiles;  // key tiles that some row of it visits
  int32_t row_tiles;
  // Inclusive prefix sums over the lanes, times KV heads.
  int32_t tiles_through, row_tiles_through;
};

// The keys that the rows of a sequence visit, as one interval. It may hold more, where score modifications leave gaps.
template <bool has_score_mod>
FLASHSPARK_DEVICE Interval visited_keys(const SequenceArguments &a, const SequenceMask &mask, int32_t tokens) {
  if constexpr (has_score_mod) {
    if (a.rswa_window > 0 || a.prefix_mode != PrefixMode::none) return {mask.begin, mask.end};
  }
  return {window_interval<has_score_mod>(a, mask, 0).begin, window_interval<has_score_mod>(a, mask, tokens - 1).end};
}

// Of sequences [first_seq, first_seq + 32), in row tiles of `rows` packed rows and key tiles of `keys` keys.
template <bool has_score_mod>
FLASHSPARK_DEVICE SequenceWork sequence_work(const SequenceArguments &a, int32_t rows, int32_t keys,
                                             int32_t first_seq) {
  const int32_t seq = first_seq + ptx::lane();
  SequenceWork w{};
  if (seq < a.num_seqs) {
    // All lengths are read before one is used, even where a sequence without rows makes them stale: dependent reads
    // would cost a round trip each (docs/experiments.md E39).
    const QueryLengths query_lengths = read_query_lengths(a, seq);
    const KeyLengths key_lengths = read_key_lengths(a, seq);
    const SequenceRows queries = queries_of(a, query_lengths);
    w.q_row = queries.row;
    w.tokens = queries.tokens;
    const Keys used = w.tokens > 0 ? keys_of(a, key_lengths) : Keys{};
    const SequenceMask mask = sequence_mask(a, {true, seq, 0, w.tokens, w.q_row, 0, 0}, used, is_causal(a, seq));
    const Interval visited = visited_keys<has_score_mod>(a, mask, w.tokens);
    w.first_tile = visited.begin / keys;
    const int32_t tiles = max_of(1, ceil_div(visited.end, keys) - w.first_tile);  // rows without keys have results, too
    w.tiles = w.tokens > 0 ? tiles : 0;
    w.row_tiles = (w.tokens * static_cast<int32_t>(a.group.value) + rows - 1) >> ptx::lowest_bit(rows);
  }
  w.tiles_through = prefix_sum(w.tiles * w.row_tiles * a.num_heads_kv);
  w.row_tiles_through = prefix_sum(w.row_tiles * a.num_heads_kv);
  return w;
}

// Of the whole problem; `first` is the work of the first 32 sequences.
template <bool has_score_mod>
FLASHSPARK_DEVICE Decomposition find_decomposition(const SequenceArguments &a, const StreamKLimits &limits,
                                                   int32_t rows, int32_t keys, const SequenceWork &first) {
  int32_t total = ptx::shuffle(first.tiles_through, 31), row_tiles = ptx::shuffle(first.row_tiles_through, 31);
  int32_t most = first.tiles, least = first.tiles > 0 ? first.tiles : INT32_MAX;
  for (int32_t seq = 32; seq < a.num_seqs; seq += 32) {
    const SequenceWork w = sequence_work<has_score_mod>(a, rows, keys, seq);
    total += ptx::shuffle(w.tiles_through, 31);
    row_tiles += ptx::shuffle(w.row_tiles_through, 31);
    most = max_of(most, w.tiles);
    if (w.tiles > 0) least = min_of(least, w.tiles);
  }
  most = ptx::reduce_max(most);
  least = ptx::reduce_min(least);
  total = ptx::uniform(total);
  return total == 0 ? Decomposition{0, 1, 1, 0, 0, 0}
                    : decompose(total, ptx::uniform(row_tiles), most == least ? ptx::uniform(most) : 0, limits);
}

// A row tile and its positions.
struct PositionedRowTile {
  RowTile rows;
  int32_t begin, count;
  int32_t first_tile;  // of the sequence's keys
};

// The first `seqs` sequences, a multiple of 32, and how many positions they have.
struct BatchPrefix {
  int32_t seqs, positions;
};

// The row tile at a position behind `prefix`; `w` is the work of the 32 sequences that follow it. Moves `prefix` on to
// the sequences that hold the position. The row tile is not valid where no sequence holds it, or where the position
// lies before the prefix, as wild scheduler metadata may have it: a CTA would otherwise meet one tile again and again.
template <bool has_score_mod>
FLASHSPARK_DEVICE PositionedRowTile row_tile_at(const SequenceArguments &a, int32_t rows, int32_t keys,
                                                int32_t position, int32_t tile_start_cost, SequenceWork w,
                                                BatchPrefix &prefix) {
  if (position < prefix.positions) return {};
  uint32_t beyond;
  while ((beyond = ptx::ballot(prefix.positions + w.tiles_through + tile_start_cost * w.row_tiles_through >
                               position)) == 0) {
    prefix.positions += ptx::shuffle(w.tiles_through + tile_start_cost * w.row_tiles_through, 31);
    prefix.seqs += 32;
    if (prefix.seqs >= a.num_seqs) return {};
    w = sequence_work<has_score_mod>(a, rows, keys, prefix.seqs);
  }
  const uint32_t lane = ptx::lowest_bit(beyond);
  const auto of_lane = [lane](int32_t x) { return ptx::uniform(ptx::shuffle(x, lane)); };
  PositionedRowTile tile{};
  tile.count = of_lane(w.tiles) + tile_start_cost;
  tile.first_tile = of_lane(w.first_tile);
  const int32_t row_tiles = of_lane(w.row_tiles);
  const int32_t first = prefix.positions + of_lane(w.tiles_through + tile_start_cost * w.row_tiles_through) -
                        tile.count * row_tiles * a.num_heads_kv;
  if (tile.count <= 0 || row_tiles <= 0) return {};
  const int32_t index = clamp(quotient(max_of(position - first, 0), tile.count), 0, row_tiles * a.num_heads_kv - 1);
  tile.begin = first + index * tile.count;
  tile.rows.valid = true;
  tile.rows.seq = prefix.seqs + static_cast<int32_t>(lane);
  tile.rows.head_kv = quotient(index, row_tiles);
  tile.rows.seqlen_q = of_lane(w.tokens);
  tile.rows.q_row = of_lane(w.q_row);
  tile.rows.first_row = (index - tile.rows.head_kv * row_tiles) * rows;
  tile.rows.end_row = tile.rows.seqlen_q * static_cast<int32_t>(a.group.value);
  return tile;
}

// What is left of a CTA's range. Every warp keeps it in shared memory of its own: d256_short_q has no registers for it,
// and finding it again costs a round trip for each 32 sequences (docs/experiments.md E44).
struct WorkRange {
  int32_t next, end;        // positions
  int32_t tile_start_cost;  // of the Decomposition
  BatchPrefix prefix;       // `next` lies behind it
  int32_t skip;             // positions of other ranges between two row tiles
};
FLASHSPARK_DEVICE void save_range(ptx::SharedAddress memory, const WorkRange &range) {
  ptx::warp_barrier();  // all lanes have read what was saved before
  if (ptx::thread_index() % 32 == 0) {
    const auto word = [](int32_t x) { return static_cast<uint32_t>(x); };
    ptx::store_shared_8(memory, word(range.next), word(range.end));
    ptx::store_shared_8(memory + 8, word(range.tile_start_cost), word(range.prefix.seqs));
    ptx::store_shared_8(memory + 16, word(range.prefix.positions), word(range.skip));
    ptx::store_shared_8(memory + 24, 0, 0);  // read with the words before
  }
  ptx::warp_barrier();  // all lanes may read it
}
FLASHSPARK_DEVICE WorkRange load_range(ptx::SharedAddress memory) {
  const auto of = [](uint32_t word) { return ptx::uniform(static_cast<int32_t>(word)); };
  const ptx::Vector16 x = ptx::load_shared_16(memory), y = ptx::load_shared_16(memory + 16);
  return {of(x.word[0]), of(x.word[1]), of(x.word[2]), {of(x.word[3]), of(y.word[0])}, of(y.word[1])};
}

// The next row tile of the CTA's range, and which of its key tiles are the CTA's; moves `range` on. With `is_first` the
// range is found first. The row tile is not valid where the CTA has no range.
template <bool has_score_mod, class Arguments>
FLASHSPARK_DEVICE WorkTile find_work_tile(const Arguments &a, int32_t rows, int32_t keys, bool is_first,
                                          WorkRange &range) {
  const SequenceWork w = sequence_work<has_score_mod>(a, rows, keys, range.prefix.seqs);
  const auto cta = static_cast<int32_t>(ptx::cta_x());
  if (is_first) {
    const Decomposition all = find_decomposition<has_score_mod>(a, a.stream_k, rows, keys, w);
    const auto [begin, end] = all.range_of(cta);
    if (begin >= end) return {};
    range = {begin, end, all.tile_start_cost, {0, 0}, max_of(0, all.stride - all.tile_positions)};
  }
  const PositionedRowTile tile =
      row_tile_at<has_score_mod>(a, rows, keys, range.next, range.tile_start_cost, w, range.prefix);
  if (!tile.rows.valid) return {};
  const int32_t first = clamp(range.next - tile.begin, 0, tile.count - 1);
  const int32_t count = max_of(1, min_of(tile.count - first, range.end - range.next));
  range.next += count + range.skip;
  const int32_t first_key = max_of(first - range.tile_start_cost, 0),
                end_key = max_of(first + count - range.tile_start_cost, 0);
  if (a.page_table != nullptr && a.kv_batch_index == nullptr)  // its latency passes while masks are worked out
    ptx::prefetch(a.page_table + tile.rows.seq * a.page_table_stride +
                  divide((tile.first_tile + first_key) * keys, a.page_size).quotient);
  return {tile.rows,
          {tile.first_tile + first_key, end_key - first_key, count == tile.count,
           first == 0 ? cta : a.stream_k.ctas + cta - 1, range.next < range.end}};
}

}  // namespace flashspark
