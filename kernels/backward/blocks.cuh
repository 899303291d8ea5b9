// Which keys a CTA owns, which rows it walks over, and where scratch memory has them.
#pragma once

#include "attention/mask.cuh"
#include "backward/arguments.hpp"
#include "backward/config.hpp"
#include "ptx/backward.cuh"

namespace flashspark {

// Rows of scratch memory that lie before those of a sequence.
FLASHSPARK_DEVICE int32_t first_padded_row(const BackwardArguments &a, int32_t seq, int32_t row) {
  if (a.cu_seqlens_q == nullptr) return seq * a.seq_row_blocks * a.row_block;
  return quotient(row + seq * a.row_block, a.row_block) * a.row_block;
}

// A block of row_block rows of scratch memory: query tokens [first, first + row_block) of a sequence.
struct RowBlock {
  bool valid;
  int32_t seq, row;     // varlen: row of the sequence's first token in q and out; dense: 0
  int32_t first;        // token
  int32_t tokens, end;  // of the sequence: those in use, and those that q has
};

// All threads of a warp call it. Where wild offsets overlap, the first sequence is taken.
FLASHSPARK_DEVICE RowBlock find_row_block(const BackwardArguments &a, int32_t block) {
  RowBlock b{};
  if (a.cu_seqlens_q == nullptr) {
    b.seq = quotient(block, a.seq_row_blocks);
    if (b.seq >= a.num_seqs) return b;
    b.first = (block - b.seq * a.seq_row_blocks) * a.row_block;
    b.tokens = queries_of(a, read_query_lengths(a, b.seq)).tokens;
    b.end = a.max_seqlen_q;
    b.valid = b.first < b.end;
    return b;
  }
  for (int32_t base = 0; base < a.num_seqs; base += 32) {
    const int32_t seq = base + ptx::lane();
    SequenceRows q{}, all{};
    int32_t first = INT32_MAX;
    if (seq < a.num_seqs) {
      QueryLengths lengths = read_query_lengths(a, seq);
      q = queries_of(a, lengths);
      all = {q.row, min_of(a.max_seqlen_q, clamp(lengths.end, q.row, a.total_q) - q.row)};
      first = first_padded_row(a, seq, q.row);
    }
    const int32_t begin = block * a.row_block;
    const uint32_t found = ptx::ballot(begin >= first && begin - first < all.tokens);
    if (found == 0) continue;
    const uint32_t winner = ptx::lowest_bit(found);
    b.seq = ptx::uniform(base + static_cast<int32_t>(winner));
    b.row = ptx::uniform(ptx::shuffle(q.row, winner));
    b.tokens = ptx::uniform(ptx::shuffle(q.tokens, winner));
    b.end = ptx::uniform(ptx::shuffle(all.tokens, winner));
    b.first = begin - ptx::uniform(ptx::shuffle(first, winner));
    b.valid = true;
    return b;
  }
  return b;
}

FLASHSPARK_DEVICE Quotient split(int32_t n, int32_t by) {
  const int32_t q = quotient(n, by);
  return {q, n - q * by};
}

// The keys of a CTA: [first, first + a.key_tile) of a sequence and KV head, and the query heads whose rows it walks
// over.
struct KeyTile {
  bool valid;
  int32_t seq, head_kv, first;
  int32_t head_q, num_heads_q;
  int32_t number;      // among all tiles, of each KV head in one piece
  int64_t batch, row;  // of the sequence's first key in k and v
  int32_t held;        // keys that k has of the sequence, used or not
};

// Slots of scratch memory that lie before those of a sequence's key tiles, in the way of first_padded_row().
FLASHSPARK_DEVICE int32_t first_key_slot(const BackwardArguments &a, int32_t seq, int32_t row) {
  if (a.cu_seqlens_k == nullptr) return seq * a.num_key_tiles;
  return quotient(row + seq * a.key_tile, a.key_tile);
}

// The same where all sequences have the same lengths; head: a KV head, of all sequences.
FLASHSPARK_DEVICE KeyTile dense_key_tile(const BackwardArguments &a, int32_t head, int32_t rank) {
  const Quotient kv = split(head, a.num_heads_kv);
  KeyTile tile{};
  tile.seq = ptx::uniform(kv.quotient);
  tile.head_kv = ptx::uniform(kv.remainder);
  tile.num_heads_q = static_cast<int32_t>(a.group.value);
  tile.head_q = tile.head_kv * tile.num_heads_q;
  tile.first = ptx::uniform(rank * a.key_tile);
  tile.batch = tile.seq;
  tile.held = a.max_seqlen_k;
  tile.valid = tile.first < tile.held;
  return tile;
}

// A few heads take turns, so that the rows of a few are in L2 at a time; of their tiles those of the first keys come
// first: under a causal mask they see most rows, and the CTAs with the most work start before the others. With turns
// (turns.cuh) the last keys come first.
FLASHSPARK_DEVICE KeyTile find_key_tile(const BackwardArguments &a, int32_t cta) {
  const auto group = static_cast<int32_t>(a.group.value);
  const int32_t heads = a.num_heads_kv * a.head_parts * (a.cu_seqlens_k == nullptr ? a.num_seqs : 1);
  const int32_t first_head = quotient(cta, a.num_key_tiles * a.section_heads) * a.section_heads;
  const Quotient at = split(cta - first_head * a.num_key_tiles, min_of(heads - first_head, a.section_heads));
  const Quotient head = split(first_head + at.remainder, a.head_parts);  // a KV head, of all sequences if dense
  int32_t rank = at.quotient;
  KeyTile tile{};
  tile.number = ptx::uniform(head.quotient * a.num_key_tiles + rank);
  tile.num_heads_q = quotient(group, a.head_parts);
  if (a.cu_seqlens_k == nullptr) {
    const Quotient kv = split(head.quotient, a.num_heads_kv);
    tile.seq = ptx::uniform(kv.quotient);
    tile.head_kv = ptx::uniform(kv.remainder);
    tile.head_q = tile.head_kv * group + ptx::uniform(head.remainder) * tile.num_heads_q;
    tile.first = ptx::uniform((a.dq_turns != nullptr ? a.num_key_tiles - 1 - rank : rank) * a.key_tile);
    tile.batch = tile.seq;
    tile.held = a.max_seqlen_k;
    tile.valid = tile.first < tile.held;
    return tile;
  }
  tile.head_kv = ptx::uniform(head.quotient);
  tile.head_q = tile.head_kv * group + ptx::uniform(head.remainder) * tile.num_heads_q;
  for (int32_t base = 0; base < a.num_seqs; base += 32) {
    const int32_t seq = base + ptx::lane();
    int32_t row = 0, held = 0;
    if (seq < a.num_seqs) {
      row = clamp(a.cu_seqlens_k[seq], 0, a.key_rows);
      held = clamp(a.cu_seqlens_k[seq + 1], row, a.key_rows) - row;
    }
    const int32_t passed = prefix_sum(ceil_div(held, a.key_tile));
    const uint32_t beyond = ptx::ballot(passed > rank);
    if (beyond == 0) {
      rank -= ptx::shuffle(passed, 31);
      continue;
    }
    const uint32_t winner = ptx::lowest_bit(beyond);
    tile.seq = ptx::uniform(base + static_cast<int32_t>(winner));
    tile.row = ptx::uniform(ptx::shuffle(row, winner));
    tile.held = ptx::uniform(ptx::shuffle(held, winner));
    const int32_t of_seq = ceil_div(tile.held, a.key_tile);
    const int32_t number = rank - (ptx::shuffle(passed, winner) - of_seq);
    tile.first = ptx::uniform((a.dq_turns != nullptr ? of_seq - 1 - number : number) * a.key_tile);
    tile.valid = tile.first >= 0 && tile.first < tile.held;
    return tile;
  }
  return tile;
}

// The blocks of rows that a CTA visits: blocks [begin, end) of a sequence's tokens, of each query head of the group.
struct RowWalk {
  int32_t begin, end;  // block numbers
  int32_t head;        // of all heads
  int32_t block;

  FLASHSPARK_DEVICE bool is_last_of_head() const { return block + 1 == end; }
  FLASHSPARK_DEVICE RowWalk next() const {
    return is_last_of_head() ? RowWalk{begin, end, head + 1, begin} : RowWalk{begin, end, head, block + 1};
  }
  FLASHSPARK_DEVICE RowWalk previous() const {
    return block == begin ? RowWalk{begin, end, head - 1, end - 1} : RowWalk{begin, end, head, block - 1};
  }
};

// The same of parts of walks (walks.cuh): with a causal mask back and forth, a head upwards, the next one downwards;
// else a head begins with `origin`, and goes on with the first block behind the last one.
struct TurnWalk : RowWalk {
  int32_t origin, step;
  bool goes_back;

  FLASHSPARK_DEVICE TurnWalk next() const {
    TurnWalk w = *this;
    if (goes_back) {
      if (block == (step > 0 ? end - 1 : begin)) {
        w.head += 1, w.step = -step;
      } else {
        w.block += step;
      }
      return w;
    }
    w.block = block + 1 == end ? begin : block + 1;
    w.head += w.block == origin;
    return w;
  }
  FLASHSPARK_DEVICE TurnWalk moved(int32_t blocks) const {
    TurnWalk w = *this;
    w.block += blocks * step;
    return w;
  }
  // Blocks behind this one, each a step further.
  FLASHSPARK_DEVICE int32_t following() const {
    if (step < 0) return block - begin;
    return (block < origin ? origin : end) - 1 - block;
  }
};

// Of walks (walks.cuh) without a mask: turns of a part, and from one tile's first turn to the next one's.
FLASHSPARK_DEVICE Interval turns_of_part(const BackwardArguments &a, int32_t part) {
  const int32_t turns = a.seq_row_blocks / kWalkTurnBlocks;
  return {quotient(part * turns, a.walk_parts), quotient((part + 1) * turns, a.walk_parts)};
}
FLASHSPARK_DEVICE int32_t turn_shift(const BackwardArguments &a) {
  return quotient(a.seq_row_blocks / kWalkTurnBlocks, a.walk_parts) >= 2 * a.num_key_tiles ? 2 : 1;
}
// Whether CTAs have added to the second sum of dq at a sequence's turn of a walk.
FLASHSPARK_DEVICE bool has_second_sum(const BackwardArguments &a, int32_t turn) {
  if (a.num_walks == 0) return true;  // else both are cleared
  if (a.causal != 0) return turn * (kWalkTurnBlocks * a.row_block) >= a.num_walks * a.key_tile;
  const int32_t part = quotient((turn + 1) * a.walk_parts - 1, a.seq_row_blocks / kWalkTurnBlocks);
  return turn - turns_of_part(a, part).begin < (a.num_key_tiles - 1) * turn_shift(a);
}

}  // namespace flashspark
