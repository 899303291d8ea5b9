// Even shares of all work, found on the device from the lengths: the host knows bounds alone, and one long sequence
// among short ones would leave most of a grid idle. Positions 0, 1, ... count tiles of keys: of every sequence, of each
// of its KV heads, of each of its row tiles; and before each row tile the positions that stand for the time its start
// takes. A share is a stretch of positions; of a row tile that several shares meet in each computes a piece, and the
// combine kernel, which finds the same shares from the same lengths, joins the pieces.
#pragma once

#include "forward/mask.cuh"

namespace flashspark {

// Positions cut into periods of which each is cut into so many even shares: one period for all, or where all row tiles
// have equally many keys one that ends with a row tile, so that no share goes on in another tile.
struct Decomposition {
  int32_t total, period, ctas;  // shares of a period
  int32_t tile_start_cost;      // positions before the keys of each row tile
  // apart > 0: shares are of whole row tiles, all of `tile` positions; the x-th takes those at x * tile, and at `apart`
  // positions further, and so on.
  int32_t stride, tile_positions;

  // The positions of a share: none for those that are too many.
  FLASHSPARK_DEVICE Interval contiguous_range(int32_t range) const {
    const int32_t of_period = quotient(range, ctas), inside = range - of_period * ctas;
    const int32_t each = quotient(period, ctas), more = period - each * ctas;
    const int32_t begin = of_period * period + inside * each + min_of(inside, more);
    return {min_of(total, begin), min_of(total, begin + each + (inside < more ? 1 : 0))};
  }
  // From its first position to behind its last: what lies between is all its own only where apart == 0.
  FLASHSPARK_DEVICE Interval range_of(int32_t n) const {
    if (stride == 0) return contiguous_range(n);
    return n * tile_positions < stride ? Interval{n * tile_positions, total} : Interval{0, 0};
  }
  // The share that holds a position.
  FLASHSPARK_DEVICE int32_t cta_of(int32_t position) const {
    const int32_t of_period = quotient(position, period), inside = position - of_period * period;
    const int32_t each = quotient(period, ctas), more = period - each * ctas;
    const int32_t longer = more * (each + 1);  // positions in shares that hold one more
    return of_period * ctas + (inside < longer ? quotient(inside, each + 1) : more + quotient(inside - longer, each));
  }
};

// `total` > 0 tiles of keys in `units` row tiles; of_each > 0: so many in each.
FLASHSPARK_DEVICE Decomposition decompose(int32_t total, int32_t units, int32_t of_each, const StreamKLimits &limits) {
  const int32_t most = total < limits.small_problem_tiles ? limits.small_problem_ctas : limits.ctas;
  const int32_t used = min_of(most, max_of(1, total >> limits.min_tiles_shift));
  // Where tiles are alike: several pieces of a tile, or several tiles a share, unless the longest share is more than a
  // twentieth above the mean.
  if (of_each > 0 && units <= used) {
    const int32_t pieces = quotient(used, units);
    if (pieces * units * 21 >= used * 20) return {total, of_each, pieces, 0, 0, 0};
  } else if (of_each > 0) {
    const int32_t together = quotient(units + used - 1, used);
    // Shares side by side take neighbouring tiles, the KV heads of a sequence, whose rows lie beside each other: 16/8
    // D64 B128 2k with an e4m3 cache, of which a head's row is 64 bytes, 139 us with four tiles in turn.
    if (units * 21 >= together * used * 20)
      return {total, together * of_each, 1, 0, quotient(units + together - 1, together) * of_each, of_each};
  }
  // Shares that begin in the middle of a tile start as well as those that come upon several: only the latter count.
  const int32_t tile_start_cost = units > used / 2 ? limits.tile_start_cost : 0;
  return {total + tile_start_cost * units, total + tile_start_cost * units, used, tile_start_cost, 0, 0};
}

// Where the pieces of a row tile lie whose positions are [begin, begin + tiles): the block that begins it has a place
// of its own for that, those that go on in it have one of another kind.
struct Contributors {
  int32_t first_cta, count;

  FLASHSPARK_DEVICE int32_t partial_slot(int32_t n, int32_t all_shares) const {
    return n == 0 ? first_cta : all_shares + first_cta + n - 1;
  }
};
FLASHSPARK_DEVICE Contributors contributors_of(const Decomposition &decomposition, int32_t begin, int32_t tiles) {
  const int32_t first = decomposition.cta_of(begin);
  return {first, decomposition.cta_of(begin + tiles - 1) - first + 1};
}

// What one lane knows of its sequence among 32.
struct SequenceWork {
  int32_t tokens, q_row;
  int32_t first_tile, tiles;  // of keys, that some row of it keeps
  int32_t row_tiles;
  int32_t tiles_through,
      row_tiles_through;  // tiles of keys and row tiles of it and of the sequences of the lanes before it
};

FLASHSPARK_DEVICE SequenceWork sequence_work(const ForwardArguments &a, int32_t rows, int32_t keys, int32_t first_seq) {
  const int32_t seq = first_seq + static_cast<int32_t>(ptx::thread_index() % 32);
  SequenceWork w{};
  if (seq < a.num_seqs) {
    // All is read before anything is looked at, even where no row makes the lengths stale: reads that wait for each
    // other cost a round trip each (0.2 us of 9.9 for 64/8 B1 2k).
    const QueryLengths query_lengths = read_query_lengths(a, seq);
    const KeyLengths key_lengths = read_key_lengths(a, seq);
    const SequenceRows queries = queries_of(a, query_lengths);
    w.q_row = queries.row;
    w.tokens = queries.tokens;
    const Keys used = w.tokens > 0 ? keys_of(a, key_lengths) : Keys{};
    const SequenceMask mask = sequence_mask(a, {true, seq, 0, w.tokens, w.q_row, 0, 0}, used, is_causal(a, seq));
    const int32_t begin = window_interval(a, mask, 0).begin, end = window_interval(a, mask, w.tokens - 1).end;
    w.first_tile = begin / keys;
    const int32_t tiles = max_of(1, ceil_div(end, keys) - w.first_tile);  // rows without keys have results, too
    w.tiles = w.tokens > 0 ? tiles : 0;
    w.row_tiles = (w.tokens * static_cast<int32_t>(a.group.value) + rows - 1) >> ptx::lowest_bit(rows);
  }
  w.tiles_through = prefix_sum(w.tiles * w.row_tiles * a.num_heads_kv);
  w.row_tiles_through = prefix_sum(w.row_tiles * a.num_heads_kv);
  return w;
}

// The spread of the whole problem; `first` is the work of the first 32 sequences.
FLASHSPARK_DEVICE Decomposition find_decomposition(const ForwardArguments &a, int32_t rows, int32_t keys,
                                                   const SequenceWork &first) {
  int32_t total = ptx::shuffle(first.tiles_through, 31), units = ptx::shuffle(first.row_tiles_through, 31);
  int32_t most = first.tiles, least = first.tiles > 0 ? first.tiles : INT32_MAX;
  for (int32_t seq = 32; seq < a.num_seqs; seq += 32) {
    const SequenceWork w = sequence_work(a, rows, keys, seq);
    total += ptx::shuffle(w.tiles_through, 31);
    units += ptx::shuffle(w.row_tiles_through, 31);
    most = max_of(most, w.tiles);
    if (w.tiles > 0) least = min_of(least, w.tiles);
  }
  most = ptx::reduce_max(most);
  least = ptx::reduce_min(least);
  total = ptx::uniform(total);
  return total == 0 ? Decomposition{0, 1, 1, 0, 0, 0}
                    : decompose(total, ptx::uniform(units), most == least ? ptx::uniform(most) : 0, a.stream_k);
}

// A row tile and its positions.
struct PositionedRowTile {
  RowTile row_tile;
  int32_t begin, count;
  int32_t first_tile;  // of the sequence's keys
};

// Sequences, a multiple of 32, and their positions.
struct BatchPrefix {
  int32_t seqs, positions;
};

// The row tile at a position behind what is passed; `w` is the work of the 32 sequences there. Passes on to those that
// hold the position. None is found (work.found) where no sequence does, or where the position lies before what is
// passed, as a schedule's wild numbers may have it: a block would else meet one tile again and again.
FLASHSPARK_DEVICE PositionedRowTile row_tile_at(const ForwardArguments &a, int32_t rows, int32_t keys, int32_t position,
                                                int32_t tile_start_cost, SequenceWork w, BatchPrefix &prefix) {
  if (position < prefix.positions) return {};
  uint32_t beyond;
  while ((beyond = ptx::ballot(prefix.positions + w.tiles_through + tile_start_cost * w.row_tiles_through >
                               position)) == 0) {
    prefix.positions += ptx::shuffle(w.tiles_through + tile_start_cost * w.row_tiles_through, 31);
    prefix.seqs += 32;
    if (prefix.seqs >= a.num_seqs) return {};
    w = sequence_work(a, rows, keys, prefix.seqs);
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
  const int32_t unit = clamp(quotient(max_of(position - first, 0), tile.count), 0, row_tiles * a.num_heads_kv - 1);
  tile.begin = first + unit * tile.count;
  tile.row_tile.valid = true;
  tile.row_tile.seq = prefix.seqs + static_cast<int32_t>(lane);
  tile.row_tile.head_kv = quotient(unit, row_tiles);
  tile.row_tile.seqlen_q = of_lane(w.tokens);
  tile.row_tile.q_row = of_lane(w.q_row);
  tile.row_tile.first_row = (unit - tile.row_tile.head_kv * row_tiles) * rows;
  tile.row_tile.end_row = tile.row_tile.seqlen_q * static_cast<int32_t>(a.group.value);
  return tile;
}

// The keys of a row tile that a block computes: tiles [first, first + count) of the sequence's.
struct KeyTileRange {
  int32_t first, count;
  bool is_final;         // all of them: the result is final
  int32_t partial_slot;  // of the piece's result, unless whole
  bool has_next;         // the block's share goes on in another row tile
};

// Without shares block (x, y) takes the y-th of num_splits pieces of the x-th row tile, whatever it is.
FLASHSPARK_DEVICE KeyTileRange even_split(const ForwardArguments &a) {
  const auto block = static_cast<int32_t>(ptx::cta_x()), piece = static_cast<int32_t>(ptx::cta_y());
  return {0, 0, a.num_splits == 1, block * a.num_splits + piece, false};
}

// Where a block's share goes on behind a piece. Every warp keeps it in shared memory of its own: d256_prefill has no
// registers for it, and finding all anew costs a round trip for each 32 sequences.
struct WorkRange {
  int32_t next, end, tile_start_cost;  // positions; `start` of them before the keys of each row tile
  BatchPrefix prefix;                  // behind which `at` lies
  int32_t skip;                        // positions between its row tiles, which are others'
};
FLASHSPARK_DEVICE void save_range(ptx::SharedAddress memory, const WorkRange &range) {
  ptx::warp_barrier();  // all lanes have read what was kept before
  if (ptx::thread_index() % 32 == 0) {
    const auto word = [](int32_t x) { return static_cast<uint32_t>(x); };
    ptx::store_shared_8(memory, word(range.next), word(range.end));
    ptx::store_shared_8(memory + 8, word(range.tile_start_cost), word(range.prefix.seqs));
    ptx::store_shared_8(memory + 16, word(range.prefix.positions), word(range.skip));
    ptx::store_shared_8(memory + 24, 0, 0);  // read with the word before
  }
  ptx::warp_barrier();  // it is there
}
FLASHSPARK_DEVICE WorkRange load_range(ptx::SharedAddress memory) {
  const auto of = [](uint32_t word) { return ptx::uniform(static_cast<int32_t>(word)); };
  const ptx::Vector16 x = ptx::load_shared_16(memory), y = ptx::load_shared_16(memory + 16);
  return {of(x.word[0]), of(x.word[1]), of(x.word[2]), {of(x.word[3]), of(y.word[0])}, of(y.word[1])};
}

// The next row tile of the block's share, from where `share` is, and the keys of it that fall to the block. No work is
// found where the block has no share.
FLASHSPARK_DEVICE KeyTileRange find_key_range(const ForwardArguments &a, int32_t rows, int32_t keys, bool is_first,
                                              WorkRange &range, RowTile &row_tile) {
  const SequenceWork w = sequence_work(a, rows, keys, range.prefix.seqs);
  const auto block = static_cast<int32_t>(ptx::cta_x());
  if (is_first) {
    const Decomposition all = find_decomposition(a, rows, keys, w);
    const auto [begin, end] = all.range_of(block);
    row_tile.valid = begin < end;
    if (!row_tile.valid) return {};
    range = {begin, end, all.tile_start_cost, {0, 0}, max_of(0, all.stride - all.tile_positions)};
  }
  const PositionedRowTile tile = row_tile_at(a, rows, keys, range.next, range.tile_start_cost, w, range.prefix);
  row_tile = tile.row_tile;
  if (!row_tile.valid) return {};
  const int32_t first = clamp(range.next - tile.begin, 0, tile.count - 1);
  const int32_t count = max_of(1, min_of(tile.count - first, range.end - range.next));
  range.next += count + range.skip;
  const int32_t first_key = max_of(first - range.tile_start_cost, 0),
                end_key = max_of(first + count - range.tile_start_cost, 0);
  if (a.page_table != nullptr && a.kv_batch_index == nullptr)  // its latency passes while masks are worked out
    ptx::prefetch(a.page_table + row_tile.seq * a.page_table_stride +
                  divide((tile.first_tile + first_key) * keys, a.page_size).quotient);
  return {tile.first_tile + first_key, end_key - first_key, count == tile.count,
          first == 0 ? block : a.stream_k.ctas + block - 1, range.next < range.end};
}

// The same, of a share that is kept in `memory` after its first piece.
FLASHSPARK_DEVICE KeyTileRange next_key_range(const ForwardArguments &a, int32_t rows, int32_t keys, bool is_first,
                                              ptx::SharedAddress memory, RowTile &row_tile) {
  WorkRange range{};
  if (!is_first) range = load_range(memory);
  const KeyTileRange found = find_key_range(a, rows, keys, is_first, range, row_tile);
  if (found.has_next) save_range(memory, range);
  return found;
}

}  // namespace flashspark
