// Even shares of all work, found on the device from the lengths: the host knows bounds alone, and one long sequence among
// short ones would leave most of a grid idle. Positions 0, 1, ... count tiles of keys: of every sequence, of each of its
// KV heads, of each of its row tiles. A share is a stretch of positions, and of a row tile that two or more shares meet
// in each computes a piece.
#pragma once

#include "forward/row_bounds.cuh"

namespace flashspark {

// The keys of a row tile that a block computes: tiles [first, first + count) of the sequence's.
struct Piece {
  int32_t first, count;
  bool whole;     // all of them: the result is final
  int32_t place;  // of the piece's result, unless whole
  int32_t next;   // position that the block's share goes on at; -1: its end
};

// What one lane knows of its sequence among 32.
struct SequenceWork {
  int32_t tokens, q_row;
  int32_t first_tile, tiles;  // of keys, that some row of it keeps
  int32_t row_tiles;
  int32_t passed;  // positions of it and of the sequences of the lanes before it
};

template <int32_t rows, int32_t keys>
FLASHSPARK_DEVICE SequenceWork sequence_work(const ForwardArguments &a, int32_t first_seq) {
  const int32_t seq = first_seq + static_cast<int32_t>(ptx::thread_index() % 32);
  SequenceWork w{};
  if (seq < a.num_seqs) w.tokens = tokens_of(a, seq);
  if (w.tokens > 0) {
    if (a.cu_seqlens_q != nullptr) w.q_row = a.cu_seqlens_q[seq];
    const Work work{true, seq, 0, w.tokens, w.q_row, 0, 0};
    const Mask mask = find_mask(a, work, keys_of(a, seq));
    const int32_t begin = seen(a, mask, 0).begin, end = seen(a, mask, w.tokens - 1).end;
    w.first_tile = begin / keys;
    w.tiles = max_of(1, ceil_div(end, keys) - w.first_tile);  // rows without keys have results, too
    w.row_tiles = ceil_div(w.tokens * static_cast<int32_t>(a.group.value), rows);
  }
  w.passed = prefix_sum(w.tiles * w.row_tiles * a.num_heads_kv);
  return w;
}

// Shares are equal but for one position; used ones hold one at least.
FLASHSPARK_DEVICE int32_t share_begin(int32_t share, int32_t total, int32_t used) {
  const int32_t each = total / used, more = total - each * used;
  return share * each + min_of(share, more);
}
FLASHSPARK_DEVICE int32_t share_of(int32_t position, int32_t total, int32_t used) {
  const int32_t each = total / used, more = total - each * used;
  const int32_t longer = more * (each + 1);  // positions in shares that hold one more
  return position < longer ? position / (each + 1) : more + (position - longer) / each;
}

FLASHSPARK_DEVICE void say_split(const ForwardArguments &a, const SplitTile &tile) {
  if (ptx::thread_index() == 0 && ptx::block_y() == 0 && ptx::block_z() == 0) a.split_tiles[ptx::block_x()] = tile;
}

// Without shares block (x, y) takes the y-th of num_splits pieces of the x-th row tile, whatever it is.
FLASHSPARK_DEVICE Piece split_evenly(const ForwardArguments &a, const Work &work) {
  const int32_t first = static_cast<int32_t>(ptx::block_x()) * a.num_splits;
  if (a.num_splits > 1) {
    SplitTile split{};
    if (work.found)
      split = {a.num_splits, first, first, work.seq, work.head_kv, work.first_row, work.end_row, work.q_row};
    say_split(a, split);
  }
  return {0, 0, a.num_splits == 1, first + static_cast<int32_t>(ptx::block_y()), -1};
}

// The row tile at position `at` of the share (-1: at its begin), and the keys of it that fall to this block.
template <int32_t rows, int32_t keys>
FLASHSPARK_DEVICE Piece take_piece(const ForwardArguments &a, int32_t at, Work &work) {
  SequenceWork w = sequence_work<rows, keys>(a, 0);
  int32_t total = ptx::shuffle(w.passed, 31);
  for (int32_t seq = 32; seq < a.num_seqs; seq += 32)
    total += ptx::shuffle(sequence_work<rows, keys>(a, seq).passed, 31);
  total = ptx::uniform(total);
  const auto block = static_cast<int32_t>(ptx::block_x());
  const int32_t used = min_of(a.shares, total);
  work.found = block < used;
  if (!work.found) {
    say_split(a, {});
    return {};
  }
  if (at < 0) at = share_begin(block, total, used);
  const int32_t end = share_begin(block + 1, total, used);

  int32_t first_seq = 0, passed = 0;  // of the 32 sequences in view, and of the positions before them
  uint32_t beyond;
  while ((beyond = ptx::ballot(passed + w.passed > at)) == 0) {
    passed += ptx::shuffle(w.passed, 31);
    first_seq += 32;
    w = sequence_work<rows, keys>(a, first_seq);
  }
  const uint32_t lane = ptx::lowest_bit(beyond);
  const auto of_lane = [lane](int32_t x) { return ptx::uniform(ptx::shuffle(x, lane)); };
  const int32_t tiles = of_lane(w.tiles), row_tiles = of_lane(w.row_tiles);
  const int32_t inside = at - passed - of_lane(w.passed) + tiles * row_tiles * a.num_heads_kv;
  const int32_t unit = inside / tiles, first = inside - unit * tiles;
  work.seq = first_seq + static_cast<int32_t>(lane);
  work.head_kv = unit / row_tiles;
  work.seqlen_q = of_lane(w.tokens);
  work.q_row = of_lane(w.q_row);
  work.first_row = (unit - work.head_kv * row_tiles) * rows;
  work.end_row = work.seqlen_q * static_cast<int32_t>(a.group.value);

  const int32_t count = min_of(tiles - first, end - at);
  const int32_t next = at + count < end ? at + count : -1;
  if (next < 0) {  // of the pieces before none is of a tile that begins here and does not end here
    SplitTile split{};
    if (first == 0 && count < tiles) {
      const int32_t last = share_of(at + tiles - 1, total, used);
      split = {last - block + 1, block,          a.shares + block - 1, work.seq,
               work.head_kv,     work.first_row, work.end_row,         work.q_row};
    }
    say_split(a, split);
  }
  // The block that begins a tile answers for it, and has a place of its own for that.
  return {of_lane(w.first_tile) + first, count, count == tiles, first == 0 ? block : a.shares + block - 1, next};
}

}  // namespace flashspark
