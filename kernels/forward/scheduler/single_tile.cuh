// A row tile a CTA. Where keys are split evenly, each of num_splits CTAs takes a part of the row tile's keys.
#pragma once

#include "attention/mask.cuh"
#include "forward/arguments.hpp"

namespace flashspark {

// The key tiles of a row tile that a CTA computes: [first, first + count) of its sequence's.
struct KeyTileRange {
  int32_t first, count;
  bool is_final;         // all of them: the result needs no combine
  int32_t partial_slot;  // where the partial result goes, unless final
  bool has_next;         // the CTA goes on with another row tile
};

// What a CTA computes at once.
struct WorkTile {
  RowTile rows;
  KeyTileRange keys;
};

// What a CTA learns from the arguments alone, before the previous kernel in the stream has ended.
struct GridCoordinate {
  int32_t seq, head_kv;  // with cu_seqlens_q heads are KV heads, and the sequence is found from `rank`
  int32_t rank;          // of the row tile among those of its head
};
// Arguments: with SequenceArguments and TileSchedulerArguments, as those of every kernel that finds work tiles.
template <class Arguments>
FLASHSPARK_DEVICE GridCoordinate grid_coordinate(const Arguments &a) {
  const int32_t cta = static_cast<int32_t>(ptx::cta_x());
  const int32_t section = cta / (a.num_m_blocks * a.l2_section_heads);
  const int32_t first_head = section * a.l2_section_heads;
  const int32_t heads = min_of(a.l2_section_heads, a.num_heads_times_batch - first_head);
  const int32_t inside = cta - section * a.num_m_blocks * a.l2_section_heads;
  const int32_t rank = inside / heads;
  const int32_t head = first_head + inside - rank * heads;
  const int32_t seq = head / a.num_heads_kv;
  return {ptx::uniform(seq), ptx::uniform(head - seq * a.num_heads_kv), ptx::uniform(rank)};
}

// Walks the sequences from the last to the first, 32 at a time, until `rank` row tiles are passed. Tiles of a sequence
// also count from the last, so that the rows that see most keys start first.
FLASHSPARK_DEVICE RowTile varlen_row_tile(const SequenceArguments &a, int32_t rank, int32_t rows) {
  const int32_t lane = ptx::lane();
  RowTile row_tile{};
  for (int32_t base = a.num_seqs - 1; base >= 0; base -= 32) {
    const int32_t b = base - lane;
    SequenceRows q{};
    if (b >= 0) q = queries_of(a, read_query_lengths(a, b));
    const int32_t passed = prefix_sum(ceil_div(q.tokens * static_cast<int32_t>(a.group.value), rows));
    const uint32_t beyond = ptx::ballot(passed > rank);
    if (beyond == 0) {
      rank -= ptx::shuffle(passed, 31);
      continue;
    }
    const uint32_t winner = ptx::lowest_bit(beyond);
    row_tile.seq = ptx::uniform(base - static_cast<int32_t>(winner));
    row_tile.seqlen_q = ptx::uniform(ptx::shuffle(q.tokens, winner));
    row_tile.q_row = ptx::uniform(ptx::shuffle(q.row, winner));
    row_tile.first_row = ptx::uniform((ptx::shuffle(passed, winner) - 1 - rank) * rows);
    row_tile.valid = row_tile.first_row >= 0;  // wildly overlapping offsets may have more tiles than 31 bits count
    return row_tile;
  }
  return row_tile;
}

// The CTA's row tile of `rows` packed rows.
template <class Arguments>
FLASHSPARK_DEVICE RowTile single_tile(const Arguments &a, GridCoordinate coordinate, int32_t rows) {
  RowTile row_tile{};
  if (a.cu_seqlens_q != nullptr) {
    row_tile = varlen_row_tile(a, coordinate.rank, rows);
  } else {
    row_tile.seq = coordinate.seq;
    row_tile.seqlen_q = a.max_seqlen_q;
    if (a.seqused_q != nullptr) row_tile.seqlen_q = clamp(a.seqused_q[row_tile.seq], 0, a.max_seqlen_q);
    row_tile.first_row = (a.num_m_blocks - 1 - coordinate.rank) * rows;
    row_tile.valid = row_tile.first_row < row_tile.seqlen_q * static_cast<int32_t>(a.group.value);
  }
  row_tile.head_kv = coordinate.head_kv;
  row_tile.end_row = row_tile.seqlen_q * static_cast<int32_t>(a.group.value);
  return row_tile;
}

// The y-th of num_splits parts of the row tile's keys. How many key tiles that is depends on the mask (compute()).
FLASHSPARK_DEVICE KeyTileRange even_split(const TileSchedulerArguments &a) {
  const auto cta = static_cast<int32_t>(ptx::cta_x()), split = static_cast<int32_t>(ptx::cta_y());
  return {0, 0, a.num_splits == 1, cta * a.num_splits + split, false};
}

// Waits for the previous kernel in the stream, and lets the next one begin. Every CTA waits, whether it has work or
// not: otherwise the next kernel might start before the previous one has ended.
FLASHSPARK_DEVICE void wait_for_previous_kernel() {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
}

// Always false. Reads one word of every 64-byte line of the arguments, so that all of them are in the constant cache
// before the wait: a line first touched in the middle of a chain of dependent instructions puts its miss into it.
FLASHSPARK_DEVICE bool warm_constant_cache(const ForwardArguments &a) {
  uint32_t some = 0;
  FLASHSPARK_UNROLL
  for (uint32_t at = 0; at < sizeof a; at += 64) {
    uint32_t word;
    __builtin_memcpy(&word, reinterpret_cast<const char *>(&a) + at, sizeof word);
    some |= word;
  }
  return some == 0;  // no problem has arguments that are 0 everywhere
}

// Without Stream-K the y-th CTA of a row tile takes the y-th of num_splits even parts of its key tiles.
template <class Tiles>
FLASHSPARK_DEVICE Interval even_key_tiles(const TileSchedulerArguments &a, const Tiles &tiles) {
  const int32_t count = ceil_div(tiles.total(), a.num_splits);
  const int32_t begin = min_of(static_cast<int32_t>(ptx::cta_y()) * count, tiles.total());
  return {begin, min_of(begin + count, tiles.total())};
}

// Work tiles of a kernel without Stream-K (T: its Traits): one for each CTA. Schedulers have the members of this one;
// the kernel (forward/kernel.cuh) says in what order they are called.
template <class T>
struct SingleTileScheduler {
  const ForwardArguments &a;
  GridCoordinate coordinate{};

  explicit FLASHSPARK_DEVICE SingleTileScheduler(const ForwardArguments &arguments) : a(arguments) {}

  FLASHSPARK_DEVICE bool begin() {
    coordinate = grid_coordinate(a);
    if (coordinate.rank < 0 || warm_constant_cache(a)) return false;
    wait_for_previous_kernel();
    return true;
  }
  FLASHSPARK_DEVICE bool next(WorkTile &work) const {
    work = {single_tile(a, coordinate, T::kRows), even_split(a)};
    return work.rows.valid;
  }

  FLASHSPARK_DEVICE Keys keys(const WorkTile &work) const { return find_keys(a, work.rows.seq); }
  FLASHSPARK_DEVICE bool causal(const WorkTile &work) const { return is_causal(a, work.rows.seq); }
  FLASHSPARK_DEVICE void wait() const {}
  FLASHSPARK_DEVICE bool confirm() const { return true; }
  FLASHSPARK_DEVICE bool goes_on(const WorkTile &) const { return false; }
  template <class Tiles>
  FLASHSPARK_DEVICE Interval key_tiles(const WorkTile &, const Tiles &tiles) const {
    return even_key_tiles(a, tiles);
  }
};

}  // namespace flashspark
